"""Trains the kernels of LESS on a frozen model:   python examples/less.py [OUTPUT]

Each layer's low-rank state learns to give the output of full attention, from the queries, keys and values that the
model computes under full attention. Then held-out text is decoded from a small cache, without and with the state.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_model
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import refreshkv
from refreshkv.baselines.less import LessCache, held, make_kernels, parallel
from refreshkv.baselines.streaming import StreamingCache

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH, LENGTH, BUDGET, SINKS = 40, 2, 192, 24, 4
recorded = []


def record(module, query, key, value, attention_mask, **settings):
    """Full attention, which leaves each layer's tensors in `recorded`."""
    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    recorded.append((query, key, value, output.transpose(1, 2), settings["scaling"]))
    return output, weights


def error(model, kernels, ids):
    """Squared error of the small cache's attention against full attention, relative to the latter, mean over layers."""
    recorded.clear()
    with torch.no_grad():
        model.model(ids, use_cache=False)
    layers = []
    for (query, key, value, full, scaling), kernel in zip(recorded, kernels, strict=True):
        found = parallel(query, key, value, kernel, held(ids.shape[1], 0, BUDGET, SINKS), scaling)
        difference = (found - full)[:, :, BUDGET + 1 :]  # until then nothing has left
        layers.append(difference.square().mean() / full[:, :, BUDGET + 1 :].square().mean())
    return torch.stack(layers).mean()


def decoding_loss(model, make_cache, ids, prompt):
    """Nats a token of what follows the prompt, decoded token by token."""
    cache, losses = make_cache(model.config, ids.shape[1], budget=BUDGET, sink_tokens=SINKS), []
    with torch.no_grad():
        for start, end in zip([0, *range(prompt, ids.shape[1] - 1)], range(prompt, ids.shape[1]), strict=True):
            logits = model(ids[:, start:end], past_key_values=cache).logits[:, -1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[:, end]))
    return torch.stack(losses).mean().item()


torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(ROOT / "base/python-4m", dtype=torch.float32).requires_grad_(False)
tokenizer = AutoTokenizer.from_pretrained(ROOT / "base/python-4m")
text = "".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "train").glob("*.py")))
tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
rows, held_out = rows[:-8], rows[-8:]

AttentionInterface.register("record", record)
model.set_attn_implementation("record")
kernels = make_kernels(model.config)
optimizer = torch.optim.Adam(kernels.parameters(), lr=3e-3)
for kernel in (untrained := make_kernels(model.config)):
    torch.nn.init.zeros_(kernel.key_out)
print(f"held-out error without the state {error(model, untrained, held_out).item():.4f}")
for step in range(STEPS):
    loss = error(model, kernels, rows[torch.arange(step * BATCH, (step + 1) * BATCH) % len(rows)])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        print(f"step {step + 1}  error {loss.item():.4f}")
print(f"held-out error with the state {error(model, kernels, held_out).item():.4f}")

model = refreshkv.enable(model.eval())
print(f"held-out loss without the state {decoding_loss(model, StreamingCache, held_out, 128):.4f}")
less = decoding_loss(model, lambda config, length, **rest: LessCache(config, length, kernels, **rest), held_out, 128)
print(f"held-out loss with the state {less:.4f}")
if len(sys.argv) > 1:
    save_model(kernels, f"{sys.argv[1]}.safetensors")
