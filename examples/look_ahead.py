"""Trains look-ahead queries beside a frozen model, and compares with the model without them:

    python examples/look_ahead.py [OUTPUT] [--steps 15] [--rows 8] [--queries 2] [--rank 8] [--seed 0] [--windows]

The text is NumPy's own tests, which the model of `base/` has not read: every fifth file is for the comparison.
"""

import argparse
import math
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

ROOT = Path(__file__).resolve().parents[1]
BATCH, LENGTH, PROMPT = 4, 512, 384

parser = argparse.ArgumentParser()
parser.add_argument("output", nargs="?", help="folder for the model with its look-ahead queries")
parser.add_argument("--steps", type=int, default=15)
parser.add_argument("--rows", type=int, default=8, help="rows of the comparison")
parser.add_argument("--queries", type=int, default=2)
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--learning-rate", type=float, default=1e-2)
parser.add_argument("--windows", action="store_true", help="4 observing queries, 12 recent positions, pooling ahead")
options = parser.parse_args()

torch.manual_seed(options.seed)
model = AutoModelForCausalLM.from_pretrained(ROOT / "base/python-4m", dtype=torch.float32).train()
tokenizer = AutoTokenizer.from_pretrained(ROOT / "base/python-4m")
windows = {"observation_window": 4, "recent_window": 12, "pool_ahead": True} if options.windows else {}
refresh = RefreshConfig(budget=64, **windows)
patterns = {
    "full step every 10": RefreshConfig(budget=64, stride=10, **windows),
    "selecting step every 3": RefreshConfig(budget=64, stride=NEVER, select_stride=3, **windows),
}


def rows_of(files: list[Path]) -> torch.Tensor:
    """The rows (N, LENGTH) of the files' text."""
    tokens = [tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"] for file in files]
    joined = torch.tensor([token for file in tokens for token in file])
    return joined[: len(joined) // LENGTH * LENGTH].view(-1, LENGTH)


@torch.no_grad()
def losses() -> dict[str, float]:
    """Loss in nats a token after the prompt, of rows for comparison: with full attention and with each pattern."""
    simulations = {"full": None, **{name: Simulation(PROMPT, config) for name, config in patterns.items()}}
    found = {}
    for name, simulation in simulations.items():
        sums = 0.0
        for row in test:
            logits = model(row[None], simulation=simulation, use_cache=False).logits[0, PROMPT - 1 : -1]
            sums += float(torch.nn.functional.cross_entropy(logits, row[PROMPT:]))
        found[name] = sums / len(test)
    return found


files = sorted(Path(numpy.__file__).parent.glob("*/tests/test_*.py"))
train = rows_of([file for number, file in enumerate(files) if number % 5])
test = rows_of(files[::5])
test = test[torch.linspace(0, len(test) - 1, options.rows).long()]
order = torch.randperm(len(train))

settings = SimulationConfig(stride=[10, NEVER], select_stride=[3, None], prompt_length=[256, 400])
look_ahead = LookAheadConfig(options.queries, options.rank, measured_steps=8, freeze_model=True)
with simulate(model, settings, seed=options.seed, refresh=refresh, look_ahead=look_ahead) as simulation:
    trained = [part for part in model.parameters() if part.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    for step in range(options.steps):
        for group in optimizer.param_groups:  # falls to 0 in a line
            group["lr"] = options.learning_rate * (1 - step / options.steps)
        batch = train[order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(train)]]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        simulation.step()
        if (step + 1) % max(1, options.steps // 15) == 0:
            figures = "  ".join(f"{name} {value:.4f}" for name, value in simulation.report().items())
            print(f"step {step + 1:3}  {figures}", flush=True)

model.eval()
if options.output:
    save_look_ahead(model, options.output)
    tokenizer.save_pretrained(options.output)
with_queries = losses()
remove_look_ahead(model)
without = losses()
print(f"{'pattern':24} {'perplexity without':>18} {'with':>8} {'gap closed':>10}")
for name, before in without.items():
    gap = before - without["full"]
    closed = f"{(before - with_queries[name]) / gap:10.1%}" if gap else ""
    print(f"{name:24} {math.exp(before):18.4f} {math.exp(with_queries[name]):8.4f} {closed}")
