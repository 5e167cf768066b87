"""Shows which model families work, or tries families of the installed transformers on tiny random models.

    refreshkv models
    refreshkv models --try qwen3_next gemma2
    refreshkv models --try all --record

Without options the recorded result is printed. The exit code is 1 if a tried family fails: it then gives other numbers
than it should, or breaks off with an error that is no refusal.
"""

import argparse
import json
import sys

from refreshkv import cli
from refreshkv.families.record import PAGE, RECORD, load_record, make_record, markdown_page, summary, text_table
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
    record = make_record({name: _try(name) for name in names})
    print(summary(record))
    if options.record:
        _write(record, whole=options.tried == ["all"])
    sys.exit(1 if any(values["result"] == "fails" for values in record["families"].values()) else 0)


def _try(name: str) -> Outcome:
    if name not in families():
        raise SettingsError(f"--try {name}: the installed transformers has no such causal language model")
    outcome = try_family(name)
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
        record = {**record, "families": dict(sorted({**before["families"], **record["families"]}.items()))}
    write_text(RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    write_text(PAGE, markdown_page(record))


if __name__ == "__main__":
    cli.run(main)
