"""Recommends a threshold of the similarity schedule for a model (the paper's appendix A.4).

    python launch/sweep.py --model DIR_OR_HUB_ID --data ROWS [--thresholds 0.7,0.8,0.9] [refresh.key=value ...]

Measures the perplexity of rows' last tokens and the effective stride for each threshold, beside fixed schedules, and
recommends the threshold that saves most full steps among those that keep --keep of what refreshing gains. Writes
sweep.json, sweep.md and sweep.png; an interrupted sweep is continued with --resume.
"""

import argparse
import shlex
from pathlib import Path

from refreshkv import cli, enable
from refreshkv.data.rows import SPLITS
from refreshkv.loading import load_model
from refreshkv.settings import SettingsError
from refreshkv.train.evaluation import check_last_tokens, evaluate
from refreshkv.train.inputs import changed_config, check_tokens, device, model_path, open_split, own_config
from refreshkv.train.report import ROWS_FILE, check_output
from refreshkv.train.row_losses import RowRecords
from refreshkv.train.sweep import THRESHOLDS, Sweep, sweep_strategies
from refreshkv.train.sweep_report import FILES, build_sweep_report, sweep_table, write_sweep_report


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    output = arguments.output or Path("reports", f"{Path(arguments.model).resolve().name}-sweep")
    rows, split = open_split(arguments.data, arguments.split, arguments.rows)
    check_last_tokens(arguments.last_tokens, len(split[0]["input_ids"]))
    path = model_path(arguments.model)
    model = load_model(path, "--model", dtype=arguments.dtype)
    check_tokens(model, path, rows)
    config = changed_config(own_config(model), arguments.overrides, budget=arguments.budget)
    strategies = sweep_strategies(config, arguments.strides or [config.stride], arguments.thresholds)
    enable(model, config).to(device(arguments.device)).eval()
    records = RowRecords(check_output(output, arguments.overwrite, arguments.resume, FILES) / ROWS_FILE)

    options = {"batch_size": arguments.batch_size, "records": records}
    evaluation = evaluate(model, split, strategies, arguments.last_tokens, **options)

    sweep = Sweep(evaluation, arguments.keep)
    settings = {
        "data": arguments.data,
        "split": arguments.split,
        "refresh": config.to_dict(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }
    command = shlex.join(["python", "launch/sweep.py", *argv])
    report = build_sweep_report(sweep, arguments.model, settings, command)
    write_sweep_report(output, sweep, report)
    print("\n".join([sweep_table(sweep), *(f"warning: {text}" for text in evaluation.warnings)]))
    print(report["recommendation"]["text"])
    print(f"{output}: sweep.json, sweep.md, sweep.png")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a transformers model")
    parser.add_argument("--data", required=True, help="folder of rows that launch/prepare.py wrote")
    parser.add_argument("--split", choices=SPLITS, default="validation", help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, help="rows, spread over the split (default: 100 or all)")
    parser.add_argument("--last-tokens", type=int, default=256, help="tokens scored per row (default: %(default)s)")
    parser.add_argument("--thresholds", type=floats, default=THRESHOLDS, help="(default: 0.5 to 0.98)")
    parser.add_argument("--strides", type=whole_numbers, help="check strides (default: the model's own)")
    parser.add_argument("--keep", type=float, default=0.9, help="share of the gain to keep (default: %(default)s)")
    parser.add_argument("--budget", help="size of the small cache: tokens, or a fraction of the prompt such as 0.125")
    parser.add_argument("--batch-size", type=int, default=1, help="rows per forward pass (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="(default: the model's)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder of the report (default: reports/NAME_OF_THE_MODEL-sweep)")
    parser.add_argument("--resume", action="store_true", help="continue the sweep in --output")
    parser.add_argument("--overwrite", action="store_true", help="replace a sweep that the folder already holds")
    parser.add_argument("overrides", nargs="*", metavar="refresh.key=value", help="selection")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.resume and arguments.overwrite:
        raise SettingsError("--resume continues a sweep and --overwrite replaces it: choose one")
    if not 0 < arguments.keep <= 1:
        raise SettingsError(f"--keep is a share, more than 0 and at most 1, got {arguments.keep}")
    return arguments


def floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    cli.run(main)
