"""The refresh pattern in a training loop of one's own:   python examples/plain_loop.py [OUTPUT]"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from refreshkv import RefreshConfig, SimulationConfig, simulate

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH, LENGTH = 15, 4, 128

model = AutoModelForCausalLM.from_pretrained(ROOT / "base/python-4m", dtype=torch.float32).train()
tokenizer = AutoTokenizer.from_pretrained(ROOT / "base/python-4m")
text = "".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "train").glob("*.py")))
tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)

settings = SimulationConfig(stride=[5, 10], plain_share=0.25)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
with simulate(model, settings, seed=0, refresh=RefreshConfig(budget=32)) as simulation:
    for step in range(STEPS):
        batch = rows[torch.arange(step * BATCH, (step + 1) * BATCH) % len(rows)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        simulation.step()
        figures = "  ".join(f"{name} {value:.3f}" for name, value in simulation.report().items())
        print(f"step {step + 1:2}  loss {loss.item():.3f}  {figures}")

if len(sys.argv) > 1:
    model.save_pretrained(sys.argv[1])
    tokenizer.save_pretrained(sys.argv[1])
