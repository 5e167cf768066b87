"""Training end to end: loss and speed with the kernels, with the naive form, and without the pattern, on one GPU.

    python launch/prepare.py --config configs/corpora/python-packages.yaml data.row_length=8192
    python benchmarks/loss_curves.py rows/python-packages [--steps 200] [--naive-steps 50] [--output OUT]

A Llama of 96 million parameters is trained with launch/train.py from the same random weights on the same rows, once for
each of RUNS; the first two simulate the same prompts and strides. Prints a line for each and how far the losses of the
naive form lie from the kernels'; writes loss_curves.json, loss_curves.png and the log of each run into OUT. Without a
GPU both run the naive form, and the losses must be equal.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from output import pyplot, save
from refreshkv.tables import column_table

TRAIN = Path(__file__).resolve().parent.parent / "launch" / "train.py"
RUNS = ("kernels", "plain", "naive")
WARM = 10  # steps whose times do not count
LAST = 50

Record = dict[str, float]


def main() -> None:
    args = read_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.seconds
    info = json.loads((args.data / "rows.json").read_text())
    records, complete = {}, True
    for name in RUNS:
        records[name] = run(name, args, info, deadline)
        complete &= len(records[name]) == steps_of(name, args)
        result = {
            "runs": {name: summary(steps, info["data"]["row_length"]) for name, steps in records.items()},
            "naive against kernels": difference(records["kernels"], records.get("naive", [])),
            "settings": {"rows": info["fingerprint"], **settings("kernels", args, info, args.output)},
        }
        print(json.dumps({name: result["runs"][name]}), flush=True)
        save(args.output, "loss_curves.json", {**result, "records": records})
    print(table(result))
    plot(records, args.output / "loss_curves.png")
    sys.exit(0 if complete else 1)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of prepared rows")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--naive-steps", type=int, help="steps of the naive form (default: as many)")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--strides", type=int, nargs="+", default=[10, 50], help="each step draws one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e6, help="stop after this long, with the steps there are")
    parser.add_argument("--quick", action="store_true", help="2 layers of 64: does everything run?")
    parser.add_argument("--output", type=Path, default=Path("runs/loss-curves"), help="default: %(default)s")
    args = parser.parse_args()
    args.naive_steps = args.steps if args.naive_steps is None else args.naive_steps
    return args


def steps_of(name: str, args: argparse.Namespace) -> int:
    return args.naive_steps if name == "naive" else args.steps


def settings(name: str, args: argparse.Namespace, info: dict[str, Any], output: Path) -> dict[str, Any]:
    """The run's configuration. The learning rate does not depend on the number of steps: a shorter run is the beginning
    of a longer one."""
    length, steps = info["data"]["row_length"], steps_of(name, args)
    pattern = {"pattern": "off"} if name == "plain" else {"pattern": "whole", "stride": args.strides}
    return {
        "model": {
            "scratch": {
                "model_type": "llama",
                "hidden_size": 64 if args.quick else 768,
                "intermediate_size": 128 if args.quick else 2560,
                "num_hidden_layers": 2 if args.quick else 12,
                "num_attention_heads": 4 if args.quick else 12,
                "num_key_value_heads": 2 if args.quick else 4,
                "head_dim": 16 if args.quick else 64,
                "vocab_size": info["vocabulary_size"],
                "max_position_embeddings": length,
                "tie_word_embeddings": True,
                "bos_token_id": 0,
                "eos_token_id": 0,
                "pad_token_id": None,
            }
        },
        "data": {"folder": str(args.data.resolve()), "row_length": length},
        "refresh": {"budget": args.budget, "stride": args.strides[0]},
        "simulation": pattern,
        "training": {
            "output": str(output),
            "deepspeed": str(TRAIN.parent.parent / "configs" / "deepspeed" / "zero2.json"),
            "dtype": "bf16",
            "steps": steps,
            "global_batch": 1,
            "micro_batch": 1,
            "learning_rate": 3e-4,
            "lr_schedule": "constant_with_warmup",
            "warmup_steps": 20,
            "seed": args.seed,
            "log_every": 1,
            "save_every": steps,
        },
    }


def run(name: str, args: argparse.Namespace, info: dict[str, Any], deadline: float) -> list[Record]:
    """Trains in a process of its own; its steps, as far as it came."""
    environment = {key: value for key, value in os.environ.items() if key != "REFRESHKV_OPS"}
    if name == "naive":
        environment["REFRESHKV_OPS"] = "naive"
    with tempfile.TemporaryDirectory() as folder, (args.output / f"{name}.log").open("w") as log:
        config, output = Path(folder, "run.yaml"), Path(folder, "run")
        config.write_text(yaml.safe_dump(settings(name, args, info, output)))
        command = [sys.executable, str(TRAIN), "--config", str(config)]
        left = max(1.0, deadline - time.monotonic())
        try:
            code = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=left).returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {left:.0f} s"
        if code:
            print(f"{name}: {code}", *Path(log.name).read_text().splitlines()[-20:], sep="\n", flush=True)
        return read_metrics(output / "metrics.jsonl")


def read_metrics(path: Path) -> list[Record]:
    """A record a step; a line that a killed process left unfinished is none."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def summary(steps: list[Record], length: int) -> dict[str, float]:
    if not steps:
        return {"steps": 0}
    seconds = statistics.median(length / step["tokens/s"] for step in steps[WARM:] or steps)
    return {
        "steps": len(steps),
        "first loss": round(steps[0]["loss"], 4),
        "last loss": round(steps[-1]["loss"], 4),
        "step ms": round(seconds * 1e3, 1),
        "tokens/s": round(length / seconds),
    }


def difference(kernels: list[Record], naive: list[Record]) -> dict[str, dict[str, float]]:
    """Absolute differences of the losses, over all steps that both have and over the last."""
    apart = [abs(one["loss"] - other["loss"]) for one, other in zip(kernels, naive, strict=False)]
    parts = {f"{len(apart)} steps": apart, f"the last {min(LAST, len(apart))}": apart[-LAST:]}
    return {name: {"mean": statistics.fmean(part), "largest": max(part)} for name, part in parts.items() if part}


def table(result: dict[str, Any]) -> str:
    columns = ("steps", "first loss", "last loss", "step ms", "tokens/s")
    lines = [("", *columns)] + [
        (name, *(str(values.get(column, "")) for column in columns)) for name, values in result["runs"].items()
    ]
    text = [column_table(lines, text_columns=0)]
    for name, values in result["naive against kernels"].items():
        text.append(f"naive against kernels, {name}: mean {values['mean']:.3g}, largest {values['largest']:.3g}")
    return "\n".join(text)


def plot(records: dict[str, list[Record]], path: Path) -> None:
    figure, (losses, apart) = pyplot().subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    for name, style in zip(RUNS, ("-", "-", ":"), strict=True):
        steps = records[name]
        losses.plot([step["step"] for step in steps], [step["loss"] for step in steps], style, label=name)
    losses.set_ylabel("loss")
    losses.legend()
    both = list(zip(records["kernels"], records["naive"], strict=False))
    apart.plot([one["step"] for one, _ in both], [other["loss"] - one["loss"] for one, other in both], color="black")
    apart.set_ylabel("naive - kernels")
    apart.set_xlabel("step, one row each")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
