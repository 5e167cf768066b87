"""The refresh pattern in TRL's SFTTrainer: LoRA, chat data, the loss of the assistant's tokens alone.

python examples/trl_sft.py [OUTPUT]
"""

import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from refreshkv import RefreshConfig, SimulationConfig, simulate
from refreshkv.simulation.padding import LeftPadding

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = (
    "{% for message in messages %}{{ '# ' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
)

model = AutoModelForCausalLM.from_pretrained(ROOT / "base/python-4m", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(ROOT / "base/python-4m")
tokenizer.chat_template = TEMPLATE
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))

files = sorted((ROOT / "train").glob("*.py"))
chats = [
    [
        {"role": "user", "content": f"Write {file.name}."},
        {"role": "assistant", "content": file.read_text(encoding="utf-8")[: 200 + 20 * number]},
    ]
    for number, file in enumerate(files)
]
output = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
arguments = SFTConfig(
    output_dir=output,
    max_steps=10,
    per_device_train_batch_size=2,
    learning_rate=1e-3,
    logging_steps=2,
    max_length=128,
    packing=False,  # packed sequences would see each other in the simulation, so they are refused
    assistant_only_loss=True,
    gradient_checkpointing=True,
    report_to=[],
    use_cpu=not torch.cuda.is_available(),
)
with simulate(model, SimulationConfig(stride=[5, 10]), seed=0, refresh=RefreshConfig(budget=32)) as simulation:
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict({"messages": chats}),
        processing_class=tokenizer,
        callbacks=[simulation.callback],
    )
    trainer.data_collator = LeftPadding(trainer.data_collator)
    trainer.train()
trainer.save_model(output)
print(f"adapter saved in {output}")
