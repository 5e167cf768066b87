"""The refresh pattern in transformers' Trainer:   python examples/trainer.py [OUTPUT]"""

import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from refreshkv import RefreshConfig, SimulationConfig, simulate

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 128

model = AutoModelForCausalLM.from_pretrained(ROOT / "base/python-4m", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(ROOT / "base/python-4m")
text = "".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "train").glob("*.py")))
tokens = tokenizer(text, verbose=False)["input_ids"]
rows = [tokens[start : start + LENGTH] for start in range(0, len(tokens) - LENGTH, LENGTH)]
data = Dataset.from_dict({"input_ids": rows, "labels": rows})

output = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
arguments = TrainingArguments(
    output_dir=output, max_steps=15, per_device_train_batch_size=4, learning_rate=3e-4, logging_steps=5, report_to=[]
)
with simulate(model, SimulationConfig(stride=[5, 10]), seed=0, refresh=RefreshConfig(budget=32)) as simulation:
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[simulation.callback])
    trainer.train()
trainer.save_model(output)
print(f"saved in {output}; its config.json carries the refresh settings")
