"""Trains the kernels of LESS on a frozen model, and compares a small cache without and with their state:

    python examples/less.py [OUTPUT] [--budget 24] [--steps 40] [--rows 8] [--rank 8] [--seed 0 1]
    python examples/less.py --model DIR --data ROWS --data ROWS2 --train ROWS3 --budget 1024 256 --scored 512 \\
        --steps 300 --batch 1 --positions 256 --learning-rate 1e-2 --rows 24 --device cuda --dtype bfloat16

Each layer's low-rank state learns to give the output of full attention, from the queries, keys and values that the
model computes under full attention. Then the last tokens of test sequences are scored under full attention,
StreamingLLM (the same cache without the state), LESS, and the recommended selection at the same K, in the parallel
form, which equals decoding with `LessCache`. Without --data, the model of `base/` reads this repository's sources.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_model
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import refreshkv
from refreshkv import RefreshConfig, Simulation
from refreshkv.baselines.less import held, make_kernels, parallel
from refreshkv.data.rows import load_rows

ROOT = Path(__file__).resolve().parents[1]
LENGTH, SINKS = 192, 4

parser = argparse.ArgumentParser()
parser.add_argument("output", nargs="?", help="the kernels are saved as OUTPUT.safetensors")
parser.add_argument("--model", default=ROOT / "base/python-4m")
parser.add_argument("--data", action="append", default=[], help="prepared rows whose test split is scored; repeatable")
parser.add_argument("--train", help="prepared rows whose train split is learned from; the first --data without it")
parser.add_argument("--budget", type=int, nargs="+", default=[24], help="K, one table line each")
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--batch", type=int, default=2, help="sequences of a step")
parser.add_argument("--positions", type=int, default=512, help="most query positions of a sequence that a step takes")
parser.add_argument("--rows", type=int, default=8, help="test sequences of each text")
parser.add_argument("--scored", type=int, default=64, help="last tokens that are scored, after a prompt of the rest")
parser.add_argument("--length", type=int, help="only the first tokens of each sequence")
parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one training each")
parser.add_argument("--learning-rate", type=float, default=3e-3)
parser.add_argument("--device", default="cpu")
parser.add_argument("--dtype", default="float32")
options = parser.parse_args()


def read_rows():
    """The training sequences, and the test sequences of each text by its name: (N, T) each."""
    if options.data:
        split = load_rows(options.train or options.data[0]).train
        train = split[torch.randperm(len(split))[: options.steps * options.batch].tolist()]["input_ids"]
        tests = {name: load_rows(name).test[: options.rows]["input_ids"] for name in options.data}
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        text = "".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "train").glob("*.py")))
        tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
        train, tests = rows[: -options.rows], {"held-out": rows[-options.rows :]}
    cut = slice(options.length)
    return train[:, cut].to(options.device), {name: rows[:, cut].to(options.device) for name, rows in tests.items()}


recorded, following = [], {}
"""Each layer's tensors in the last pass; the kernels and the budget that the tokens after the prompt follow, if any."""


def attention(module, query, key, value, attention_mask, **settings):
    """Full attention, which leaves each layer's tensors in `recorded`; after the prompt, what `following` says."""
    for name, term in {"softcap": "a softcap", "s_aux": "sinks"}.items():
        if settings.get(name) is not None:
            raise SystemExit(
                f"--model {options.model}: its attention has {term}, which LESS lacks: choose another model"
            )
    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if following:
        late = torch.arange(key.shape[2] - options.scored, key.shape[2], device=key.device)
        kernel = following["kernels"][module.layer_idx]
        found = small_cache(query, key, value, kernel, following["budget"], late, settings["scaling"])
        output[:, -options.scored :] = found.transpose(1, 2)
    else:
        recorded.append((query, key, value, output.transpose(1, 2), settings["scaling"]))
    return output, weights


def small_cache(query, key, value, kernel, budget, positions, scaling):
    """The attention of the queries at `positions` (Q,) to the small cache and the state: (B, H, Q, D) float32."""
    query, key, value = query[:, :, positions].float(), key.float(), value.float()
    return parallel(query, key, value, kernel, held(key.shape[2], 0, budget, SINKS, positions), scaling, positions)


def record(ids):
    """Computes the sequences (B, T) under full attention, for `recorded`."""
    recorded.clear()
    with torch.no_grad():
        model.model(ids, use_cache=False)


def errors(kernels, budget, positions):
    """Of each recorded layer: squared error of the small cache's attention, relative to full attention."""
    for (query, key, value, full, scaling), kernel in zip(recorded, kernels, strict=True):
        full = full[:, :, positions].float()
        found = small_cache(query, key, value, kernel, budget, positions, scaling)
        yield (found - full).square().mean() / full.square().mean()


def some_positions(length, budget):
    """Positions at which tokens have left the cache, drawn without order."""
    return (budget + 1 + torch.randperm(length - budget - 1)[: options.positions]).to(options.device)


@torch.no_grad()
def test_error(kernels, budget, rows):
    """Mean over layers, of the first test sequences."""
    record(rows[:2])
    late = torch.arange(budget + 1, rows.shape[1], device=rows.device)[-options.scored :]
    return torch.stack(list(errors(kernels, budget, late))).mean().item()


@torch.no_grad()
def losses(rows, **simulation):
    """Nats a scored token of each row."""
    found = []
    for row in rows:
        logits = model(row[None], use_cache=False, logits_to_keep=options.scored + 1, **simulation).logits[0, :-1]
        found.append(torch.nn.functional.cross_entropy(logits.float(), row[-options.scored :]))
        recorded.clear()
    return torch.stack(found).double()


def losses_under(kernels, budget, rows):
    following.update(kernels=kernels, budget=budget)
    found = losses(rows)
    following.clear()
    return found


torch.manual_seed(options.seed[0])
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).requires_grad_(False)
model = model.to(options.device).eval()
train, tests = read_rows()
AttentionInterface.register("less", attention)
model.set_attn_implementation("less")

trained = {}
for budget in options.budget:
    for seed in options.seed:
        torch.manual_seed(seed)
        trained[budget, seed] = make_kernels(model.config, options.rank).to(options.device)
        for kernel in trained[budget, seed]:
            kernel.key_out.data *= 0.01  # or thousands of tokens that left outweigh the cache at the start
without = make_kernels(model.config, options.rank).to(options.device)
for kernel in without:
    kernel.key_out.data *= 0.0  # the state has no weight
optimizers = {case: torch.optim.Adam(kernels.parameters(), options.learning_rate) for case, kernels in trained.items()}

began, order = time.monotonic(), torch.randperm(len(train))
for step in range(options.steps):
    for optimizer in optimizers.values():
        optimizer.param_groups[0]["lr"] = options.learning_rate * (1 - step / options.steps)  # falls to 0 in a line
    record(train[order[torch.arange(step * options.batch, (step + 1) * options.batch) % len(train)]])
    means = {}
    for (budget, seed), kernels in trained.items():
        positions, mean = some_positions(train.shape[1], budget), 0.0
        for error in errors(kernels, budget, positions):
            error.backward()  # layer by layer, so that one layer's graph exists at a time
            mean += error.item() / len(kernels)
        means[f"K={budget} seed {seed}"] = mean
        optimizers[budget, seed].step()
        optimizers[budget, seed].zero_grad()
    if (step + 1) % max(1, options.steps // 10) == 0:
        figures = "  ".join(f"{case} error {mean:.4f}" for case, mean in means.items())
        print(f"step {step + 1}  {figures}", flush=True)
train_seconds, began = time.monotonic() - began, time.monotonic()

full, streaming, less, recommended = {}, {}, {}, {}
for name, rows in tests.items():
    full[name] = losses(rows)
    for budget in options.budget:
        streaming[name, budget] = losses_under(without, budget, rows)
        for seed in options.seed:
            less[name, budget, seed] = losses_under(trained[budget, seed], budget, rows)
            print(f"K = {budget}, seed {seed}")
            print(f"{name} error without the state {test_error(without, budget, rows):.4f}")
            print(f"{name} error with the state {test_error(trained[budget, seed], budget, rows):.4f}")
            print(f"{name} loss without the state {streaming[name, budget].mean().item():.4f}")
            print(f"{name} loss with the state {less[name, budget, seed].mean().item():.4f}", flush=True)

model = refreshkv.enable(model, RefreshConfig())
for name, rows in tests.items():
    for budget in options.budget:
        selection = RefreshConfig.recommended(budget=budget)
        recommended[name, budget] = losses(rows, simulation=Simulation(rows.shape[1] - options.scored, selection))

print(f"\nperplexity of the last {options.scored} of {train.shape[1]} tokens as a ratio to full attention's")
print("| text | K | seed | full attention | StreamingLLM | LESS | better rows | gap closed | recommended selection |")
print("|---|---|---|---|---|---|---|---|---|")
for (name, budget, seed), found in less.items():
    base, before = full[name], streaming[name, budget]
    ratios = [math.exp((other - base).mean()) for other in (before, found, recommended[name, budget])]
    closed = ((before - found).mean() / (before - base).mean()).item()
    better = f"{int((found < before).sum())}/{len(found)}"
    figures = (
        f"{math.exp(base.mean()):.3f} | {ratios[0]:.3f} | {ratios[1]:.3f} | {better} | {closed:.1%} | {ratios[2]:.3f}"
    )
    print(f"| {name} | {budget} | {seed} | {figures} |")
memory = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if options.device.startswith("cuda") else ""
device = torch.cuda.get_device_name() if memory else "CPU"
print(
    f"\nrank {options.rank}, {options.steps} steps of {options.batch} x {train.shape[1]} tokens; {device}{memory}; "
    f"training {train_seconds:.0f} s, scoring {time.monotonic() - began:.0f} s"
)
if options.output:
    for (budget, seed), kernels in trained.items():
        save_model(kernels, f"{options.output}{f'-{budget}-{seed}' if len(trained) > 1 else ''}.safetensors")
