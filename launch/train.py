"""Trains a model with the refresh pattern simulated.

    deepspeed launch/train.py --config configs/NAME.yaml [--resume | --overwrite] [section.key=value ...]

Without --config it trains configs/quickstart.yaml and prepares its rows if they are missing.
"""

import argparse
import os
from pathlib import Path

from refreshkv.cli import run
from refreshkv.settings import load_settings
from refreshkv.train.config import RunConfig

QUICKSTART = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="the run's YAML file")
    parser.add_argument("--resume", action="store_true", help="continue the run in training.output")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in training.output")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(arguments)
    if args.resume and args.overwrite:
        parser.error("--resume continues a run and --overwrite replaces it: choose one")

    config = load_settings(RunConfig, args.config or QUICKSTART, args.overrides)

    from refreshkv.train.loop import train

    if args.config is None and not Path(config.data.folder).exists():
        prepare_once(config)
    train(config, args.resume, args.overwrite)


def prepare_once(config: RunConfig) -> None:
    """Prepares the rows on rank 0, while the others wait."""
    import torch.distributed as dist

    from refreshkv.data.rows import prepare_rows
    from refreshkv.train.engine import init_processes

    init_processes()
    if os.environ["RANK"] == "0":
        print(prepare_rows(config.data, config.refresh.budget))
    dist.barrier()


if __name__ == "__main__":
    run(main)
