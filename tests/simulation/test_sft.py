"""simulate() in TRL's SFTTrainer: the loss of the assistant's tokens alone, of padded batches, with LoRA."""

import pytest
import torch
from datasets import Dataset

from refreshkv import RefreshConfig, SimulationConfig, enable, simulate
from refreshkv.simulation.draw import draw_simulation, fitted
from refreshkv.simulation.padding import LeftPadding
from tests.helpers.jobs import ROOT
from tests.helpers.models import tiny_model

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

REFRESH = RefreshConfig(budget=6, stride=3)
SETTINGS = SimulationConfig(stride=[2, 3, 5])
SEED, STEPS = 5, 3
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
CHATS = [
    [
        {"role": "user", "content": f"value = {number}\n" * (4 + number % 3)},
        {"role": "assistant", "content": "return value\n" * (5 + number)},
    ]
    for number in range(2 * STEPS)
]


def chat_tokenizer():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "base" / "python-4m")
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, tokenizer.eos_token
    return tokenizer


def lora(model):
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, settings)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_of_the_assistants_tokens(tmp_path, checkpointing):
    """Losses and norms of gradients of the same batches with the simulation handed in; no user's token counts."""
    tokenizer = chat_tokenizer()
    model, other = (lora(tiny_model(dtype=torch.float32, vocab_size=len(tokenizer))) for _ in range(2))
    other = enable(other.get_base_model(), REFRESH).train()
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=0.0,  # every step has the weights of the first
        logging_steps=1,
        max_length=128,
        assistant_only_loss=True,
        gradient_checkpointing=checkpointing,
        loss_type="nll",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,  # which is TRL's default
    )
    batches = []
    with simulate(model, SETTINGS, SEED, REFRESH) as simulation:
        trainer = trl.SFTTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_dict({"messages": CHATS}),
            processing_class=tokenizer,
            callbacks=[simulation.callback],
        )
        collator = LeftPadding(trainer.data_collator)
        trainer.data_collator = lambda features: batches.append(collator(features)) or batches[-1]
        trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == STEPS
    for step, line in enumerate(lines, 1):
        batch = batches[step - 1]
        counted = batch["labels"] != -100
        assert set(tokenizer.decode(batch["input_ids"][counted]).split("\n")) == {"return value", ""}
        assert not counted[:, 0].any() and counted[:, -1].all()
        padding, length = int((batch["attention_mask"] == 0).sum(1).max()), counted.shape[1]
        drawn = draw_simulation(fitted(SETTINGS, length, padding, SEED, step), REFRESH, length, SEED, step)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        expected = other(**inputs, simulation=drawn, use_cache=False).loss
        gradients = torch.autograd.grad(expected, [part for part in other.parameters() if part.requires_grad])
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        with torch.no_grad():
            full = other(**inputs, use_cache=False).loss
        assert line["loss"] == pytest.approx(float(expected), abs=1e-4) and abs(expected - full) > 1e-3
        assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-4) and "loss partial" in line
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
