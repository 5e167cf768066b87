"""Turns a training checkpoint into a plain transformers folder, checked, and pushes it to the Hub if asked to.

    python launch/export.py CHECKPOINT OUT [--merge | --adapter] [--report DIR] [--overwrite]
        [--push-to-hub REPO [--private]]

CHECKPOINT is a checkpoint's folder, or a run's: then its newest finished checkpoint. What was written is loaded again,
and must compute what the checkpoint does, before it gets the name OUT. Adapters are merged into their base model, or,
with --adapter, written alone in peft's format.
"""

import argparse
import os
from pathlib import Path

from refreshkv.cli import run


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint's folder, or a run's")
    parser.add_argument("output", type=Path, metavar="OUT", help="the folder to write")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--merge", action="store_true", help="merge adapters into the model, as without it; a check")
    form.add_argument("--adapter", action="store_true", help="write the adapters alone, in peft's format")
    parser.add_argument("--report", type=Path, metavar="DIR", help="evaluation whose table goes into the model card")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in OUT")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the export to this repository, made if missing")
    parser.add_argument("--private", action="store_true", help="the repository must be private")
    args = parser.parse_args(arguments)
    if args.private and not args.push_to_hub:
        parser.error("--private needs --push-to-hub REPO")

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # an export needs no GPU, and DeepSpeed would look for one
    from refreshkv.train.export import export
    from refreshkv.train.hub import push, validate_push

    if args.push_to_hub:
        validate_push(args.push_to_hub)
    form = "merged" if args.merge else "adapter" if args.adapter else "model"
    print(export(args.checkpoint, args.output, args.report, args.overwrite, args.push_to_hub, form), flush=True)
    if args.push_to_hub:
        print("pushed to", push(args.output, args.push_to_hub, args.private))


if __name__ == "__main__":
    run(main)
