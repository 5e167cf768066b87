"""Trains a model with the refresh pattern simulated.

    deepspeed launch/train.py --config NAME_OR_FILE [--resume | --overwrite] [section.key=value ...]
    python launch/train.py --config NAME_OR_FILE --dry-run [--ranks N] [--gpu-memory GB] [section.key=value ...]

With --dry-run it prints what each GPU will need, how long a step should take, and what to change if it does not fit;
nothing is written. Without --config it trains the config `quickstart` and prepares its rows if they are missing.
"""

import argparse
import os
from pathlib import Path

from refreshkv.cli import run
from refreshkv.options import check_numbers
from refreshkv.settings import load_settings
from refreshkv.train.config import RunConfig


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file of the run, or a name in configs/")
    parser.add_argument("--resume", action="store_true", help="continue the run in training.output")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in training.output")
    parser.add_argument("--dry-run", action="store_true", help="print what the run needs, and end")
    parser.add_argument("--ranks", type=int, metavar="N", help="GPUs of the job that --dry-run is about")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="memory of each, if not as here")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(arguments)
    if args.resume and args.overwrite:
        parser.error("--resume continues a run and --overwrite replaces it: choose one")
    check_numbers(args)
    if (args.ranks or args.gpu_memory) and not args.dry_run:
        parser.error("--ranks and --gpu-memory need --dry-run")

    config = load_settings(RunConfig, args.config or "quickstart", args.overrides)
    if args.dry_run:
        print(dry_run(config, args.ranks, args.gpu_memory))
        return
    # imported late: DeepSpeed takes seconds, and a wrong setting or a dry run needs none of it
    from refreshkv.train.loop import train

    if args.config is None and not Path(config.data.folder).exists():
        prepare_once(config)
    train(config, args.resume, args.overwrite)


def dry_run(config: RunConfig, ranks: int | None, gigabytes: float | None) -> str:
    """The report of what the run needs, on GPUs as here or on others."""
    import torch

    from refreshkv.train.job import resolve
    from refreshkv.train.launcher import job_size
    from refreshkv.train.preflight import report
    from refreshkv.train.step_time import matmul_rate

    launched = job_size() if "WORLD_SIZE" in os.environ else None
    job = resolve(config, ranks or launched or max(1, torch.cuda.device_count()), dry=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    available = gigabytes * 1e9 if gigabytes else None
    if available is None and device.type == "cuda":
        available = float(torch.cuda.get_device_properties(device).total_memory)
    return report(job, available, matmul_rate(device, config.training.dtype))


def prepare_once(config: RunConfig) -> None:
    """Prepares the rows on rank 0, while the other ranks wait."""
    import torch.distributed as dist

    from refreshkv.data.rows import prepare_rows
    from refreshkv.train.engine import init_processes

    init_processes()
    if os.environ["RANK"] == "0":
        print(prepare_rows(config.data, config.refresh.budget))
    dist.barrier()


if __name__ == "__main__":
    run(main)
