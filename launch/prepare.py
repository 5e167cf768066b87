"""Turns text into rows of tokens, once, before training.

    python launch/prepare.py [--config configs/NAME.yaml] [--overwrite] [data.key=value ...]

The file is a whole run's; only its `data` section is used, and `refresh.budget` for the report. Without --config it is
configs/quickstart.yaml: the tests of the installed NumPy, no download. configs/corpora/ has further sources.
"""

import argparse
from pathlib import Path

from refreshkv import cli
from refreshkv.data.rows import prepare_rows
from refreshkv.settings import load_settings
from refreshkv.train.config import RunConfig

QUICKSTART = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=QUICKSTART, help="YAML file of the run (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace rows that data.folder already holds")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings on top of the file's")
    arguments = parser.parse_args(argv)

    run = load_settings(RunConfig, arguments.config, arguments.overrides)
    print(prepare_rows(run.data, run.refresh.budget, overwrite=arguments.overwrite))


if __name__ == "__main__":
    cli.run(main)
