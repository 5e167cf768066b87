"""Shows which model families work, or tries families of the installed transformers on tiny random models.

    refreshkv models
    refreshkv models --try qwen3_next gemma2
    refreshkv models --try all --record

Families that read images are tried with text, and some of them with an image in the prompt too (`NAME+image`). Without
options the recorded result is printed. The exit code is 1 if a tried family fails: it then gives other numbers
than it should, or breaks off with an error that is no refusal.
"""

import argparse
import json
import sys

from refreshkv import cli
from refreshkv.families import images
from refreshkv.families.record import (
    PAGE,
    RECORD,
    WITH_IMAGE,
    load_record,
    make_record,
    markdown_page,
    summary,
    text_table,
)
from refreshkv.families.tiny import families
from refreshkv.families.trial import Outcome, try_family
from refreshkv.files import write_text
from refreshkv.settings import SettingsError


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--try", dest="tried", nargs="+", metavar="FAMILY", help="model types, or all")
    parser.add_argument("--record", action="store_true", help="write the result into a checkout, and docs/models.md")
    options = parser.parse_args(arguments)
    if not options.tried:
        if options.record:
            raise SettingsError("--record writes what was tried: give --try all too")
        print(text_table(load_record()))
        return
    names = list(families()) if options.tried == ["all"] else options.tried
    outcomes = {name: _try(name) for name in names}
    record = make_record(outcomes, {name: _try_images(name) for name in names if name in images.MODELS})
    print(summary(record))
    if options.record:
        _write(record, whole=options.tried == ["all"])
    results = [values["result"] for what in ("families", "images") for values in record[what].values()]
    sys.exit(1 if "fails" in results else 0)


def _try(name: str) -> Outcome:
    if name not in families():
        raise SettingsError(f"--try {name}: the installed transformers has no such decoder")
    return _printed(name, try_family(name))


def _try_images(name: str) -> Outcome:
    return _printed(name + WITH_IMAGE, images.try_images(name))


def _printed(name: str, outcome: Outcome) -> Outcome:
    print(f"{name}: {outcome.result}  {outcome.reason or outcome.layers}", flush=True)
    return outcome


def _write(record: dict, whole: bool) -> None:
    """Writes the record and the page; a record of some families replaces theirs only."""
    if not PAGE.parent.is_dir():
        raise SettingsError(f"--record writes into a checkout, and there is no folder {PAGE.parent}")
    if not whole:
        before = load_record()
        if before["transformers"] != record["transformers"]:
            raise SettingsError("--record of some families needs the release of the others: give --try all")
        merged = {what: dict(sorted({**before[what], **record[what]}.items())) for what in ("families", "images")}
        record = {**record, **merged}
    write_text(RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    write_text(PAGE, markdown_page(record))


if __name__ == "__main__":
    cli.run(main)
