"""Turns text into sequences of tokens ("rows"), once, before training.

    python launch/prepare.py [--config NAME_OR_FILE] [--overwrite] [data.key=value ...]

The config is that of a whole run; its `data` section is used, and `refresh.budget` for the report. Without --config
it is `quickstart`: the tests of the installed NumPy, no download. configs/corpora has further sources.
"""

import argparse

from refreshkv import cli
from refreshkv.data.rows import prepare_rows
from refreshkv.settings import load_settings
from refreshkv.train.config import RunConfig


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config",
        default="quickstart",
        help="YAML file, or a name in configs/ or configs/corpora/ (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the rows that data.folder holds")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings on top of the config's")
    options = parser.parse_intermixed_args(arguments)

    run = load_settings(RunConfig, options.config, options.overrides, folders=("", "corpora"))
    print(prepare_rows(run.data, run.refresh.budget, overwrite=options.overwrite))


if __name__ == "__main__":
    cli.run(main)
