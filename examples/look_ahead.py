"""Trains look-ahead queries beside a frozen model, and compares with the model without them:

    python examples/look_ahead.py [OUTPUT] [--selection paper windows] [--steps 15] [--rows 8] [--queries 2] [--rank 8]
    python examples/look_ahead.py --model DIR --data ROWS --data ROWS2 --train ROWS3 --budget 1024 --scored 512 \\
        --selection paper windows --steps 100 --batch 1 --measured-steps 4 --rows 16 --device cuda --dtype bfloat16

Each selection gets queries of its own: the paper's, and one with windows, for a selection that serves many tokens.
Without --data, the text is NumPy's own tests, which the model of `base/` has not read: every fifth file is for the
comparison.
"""

import argparse
import math
import time
from pathlib import Path

import numpy
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from refreshkv import (
    NEVER,
    LookAheadConfig,
    RefreshConfig,
    Simulation,
    SimulationConfig,
    remove_look_ahead,
    save_look_ahead,
    simulate,
)
from refreshkv.attention.look_ahead import look_ahead_modules
from refreshkv.data.rows import load_rows

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 512
ROWS_AT_ONCE = 4
"""Test sequences of a pass."""

parser = argparse.ArgumentParser()
parser.add_argument("output", nargs="?", help="folder for the model with the first selection's look-ahead queries")
parser.add_argument("--model", default=ROOT / "base/python-4m")
parser.add_argument("--data", action="append", default=[], help="prepared rows whose test split is scored; repeatable")
parser.add_argument("--train", help="prepared rows whose train split is learned from; the first --data without it")
parser.add_argument("--selection", nargs="+", choices=("paper", "windows"), default=["paper"])
parser.add_argument("--budget", type=int, default=64, help="K")
parser.add_argument("--steps", type=int, default=15)
parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
parser.add_argument("--measured-steps", type=int, default=8, help="steps of a pass whose divergence is computed")
parser.add_argument("--rows", type=int, default=8, help="test sequences of each text")
parser.add_argument("--scored", type=int, default=128, help="last tokens that are scored, after a prompt of the rest")
parser.add_argument("--length", type=int, help="only the first tokens of each sequence")
parser.add_argument("--queries", type=int, default=2)
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--learning-rate", type=float, default=1e-2)
parser.add_argument("--device", default="cpu")
parser.add_argument("--dtype", default="float32", help="of the model; the look-ahead queries are trained in float32")
options = parser.parse_args()


def read_rows():
    """The training sequences, and the test sequences of each text by its name: (N, T) each."""
    if options.data:
        split = load_rows(options.train or options.data[0]).train
        train = split[torch.randperm(len(split))[: options.steps * options.batch].tolist()]["input_ids"]
        tests = {name: load_rows(name).test[: options.rows]["input_ids"] for name in options.data}
    else:
        files = sorted(Path(numpy.__file__).parent.glob("*/tests/test_*.py"))
        train, test = rows_of([file for number, file in enumerate(files) if number % 5]), rows_of(files[::5])
        tests = {"NumPy": test[torch.linspace(0, len(test) - 1, options.rows).long()]}
    cut = slice(options.length)
    return train[:, cut].to(options.device), {name: rows[:, cut].to(options.device) for name, rows in tests.items()}


def rows_of(files: list[Path]) -> torch.Tensor:
    """The rows (N, LENGTH) of the files' text."""
    tokens = [tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"] for file in files]
    joined = torch.tensor([token for file in tokens for token in file])
    return joined[: len(joined) // LENGTH * LENGTH].view(-1, LENGTH)


def windows_of(selection: str) -> dict:
    """What a selection changes in the paper's settings: windows that are smaller for small budgets."""
    if selection == "paper":
        return {}
    recent = min(192, options.budget // 5)
    return {"observation_window": 4, "recent_window": recent, "pool_kernel": 10, "pool_ahead": True}


def patterns_of(selection: str) -> dict[str, RefreshConfig]:
    """The compared patterns of a selection."""
    common = {"budget": options.budget, **windows_of(selection)}
    return {
        "full step every 10": RefreshConfig(stride=10, **common),
        "selecting step every 3": RefreshConfig(stride=NEVER, select_stride=3, **common),
    }


@torch.no_grad()
def losses(rows: torch.Tensor, config: RefreshConfig | None) -> torch.Tensor:
    """Nats a scored token of each row (N, T), under a pattern, or under full attention: (N,)."""
    simulation = None if config is None else Simulation(rows.shape[1] - options.scored, config)
    found = []
    for some in rows.split(ROWS_AT_ONCE):
        output = model(some, simulation=simulation, use_cache=False, logits_to_keep=options.scored + 1)
        logits = output.logits[:, :-1].float().transpose(1, 2)
        found.append(torch.nn.functional.cross_entropy(logits, some[:, -options.scored :], reduction="none").mean(1))
    return torch.cat(found).double().cpu()


def train_queries(selection: str) -> None:
    """Puts look-ahead queries beside the frozen model's attention and trains them under a selection."""
    length, scored = train.shape[1], options.scored
    prompts = [length - 2 * scored, length - scored + scored // 8]
    settings = SimulationConfig(stride=[10, NEVER], select_stride=[3, None], prompt_length=prompts)
    look_ahead = LookAheadConfig(
        options.queries, options.rank, measured_steps=options.measured_steps, freeze_model=True
    )
    refresh = RefreshConfig(budget=options.budget, **windows_of(selection))
    model.train()
    with simulate(model, settings, seed=options.seed, refresh=refresh, look_ahead=look_ahead) as simulation:
        for module in look_ahead_modules(model).values():
            module.float()
        trained = [part for part in model.parameters() if part.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
        began = time.monotonic()
        for step in range(options.steps):
            for group in optimizer.param_groups:  # falls to 0 in a line
                group["lr"] = options.learning_rate * (1 - step / options.steps)
            batch = train[order[torch.arange(step * options.batch, (step + 1) * options.batch) % len(train)]]
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            simulation.step()
            if (step + 1) % max(1, options.steps // 15) == 0:
                figures = "  ".join(f"{name} {value:.4f}" for name, value in simulation.report().items())
                print(
                    f"step {step + 1:3}  {figures}  {(time.monotonic() - began) / (step + 1):.2f} s a step", flush=True
                )
    model.eval()


torch.manual_seed(options.seed)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).to(options.device)
tokenizer = AutoTokenizer.from_pretrained(options.model)
train, tests = read_rows()
order = torch.randperm(len(train))

began = time.monotonic()
full = {text: losses(rows, None) for text, rows in tests.items()}
seconds = {"full attention": time.monotonic() - began}
print(f"perplexity of the last {options.scored} of {train.shape[1]} tokens, K = {options.budget}, {options.rows} rows")
table = [
    "| text | selection | pattern | full attention | without | with | gap closed |",
    "|---|---|---|---|---|---|---|",
]
for number, selection in enumerate(options.selection):
    began = time.monotonic()
    train_queries(selection)
    trained = time.monotonic()
    if options.output and number == 0:
        save_look_ahead(model, options.output)
        tokenizer.save_pretrained(options.output)
    cases = [(text, name) for text in tests for name in patterns_of(selection)]
    with_queries = {case: losses(tests[case[0]], patterns_of(selection)[case[1]]) for case in cases}
    remove_look_ahead(model)
    for text, name in cases:
        before, after = losses(tests[text], patterns_of(selection)[name]), with_queries[text, name]
        gain, gap = before - after, before - full[text]
        error = gain.std() / len(gain) ** 0.5 / gap.mean()
        figures = " | ".join(f"{math.exp(found.mean()):.4f}" for found in (full[text], before, after))
        closed = f"{(gain.mean() / gap.mean()).item():.1%} +- {error.item():.1%}"
        table.append(f"| {text} | {selection} | {name} | {figures} | {closed} |")
        print(f"{text}, {selection}, {name}: {figures}, gap closed {closed}", flush=True)
    seconds |= {f"training, {selection}": trained - began, f"scoring, {selection}": time.monotonic() - trained}

print("\n" + "\n".join(table))
memory = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if options.device.startswith("cuda") else ""
device = torch.cuda.get_device_name() if memory else "CPU"
print(
    f"\n{options.queries} queries of rank {options.rank}, {options.steps} steps of {options.batch} rows, seed "
    f"{options.seed}; {device}{memory}; " + ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items())
)
