"""simulate(): every training pass equals one whose simulation is handed in, in plain loops, Trainer and with LoRA."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from refreshkv import DistillationConfig, RefreshConfig, SettingsError, SimulationConfig, enable, simulate
from refreshkv.simulation.draw import draw_simulation
from refreshkv.simulation.padding import LeftPadding
from refreshkv.train.batch import make_batch
from refreshkv.train.loss import CausalLossModel, LossSums
from tests.helpers.models import random_ids, tiny_model

REFRESH = RefreshConfig(budget=6, stride=3)
SETTINGS = SimulationConfig(stride=[2, 3, 5], plain_share=0.3)
LENGTH, SEED, STEPS = 40, 5, 6


def expected_loss(model, ids, step, settings=SETTINGS, **inputs):
    simulation = draw_simulation(settings, REFRESH, ids.shape[1], SEED, step)
    return model(input_ids=ids, labels=ids, simulation=simulation, use_cache=False, **inputs).loss


def models(**settings):
    """The same model twice: with `simulate` still to come, and enabled, for simulations that are handed in."""
    return tiny_model(**settings).train(), enable(tiny_model(**settings), REFRESH).train()


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_a_plain_loop(checkpointing):
    model, other = models()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    batches = [random_ids(2, LENGTH, seed) for seed in range(2)]
    with simulate(model, SETTINGS, seed=SEED, refresh=REFRESH) as simulation:
        drawn = set()
        for step in range(1, STEPS + 1):
            for ids in batches:  # the micro-batches of a step have the same simulation
                loss, expected = model(input_ids=ids, labels=ids).loss, expected_loss(other, ids, step)
                torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
                loss.backward()
                expected.backward()
            drawn.add(simulation.draw(LENGTH))
            simulation.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-11)
    assert None in drawn and len(drawn) > 3
    torch.testing.assert_close(model(input_ids=batches[0]).logits, other(input_ids=batches[0]).logits)


def test_prompts_in_chunks():
    model, other = models()
    settings, ids = SimulationConfig(stride=[2, 5], chunks=3), random_ids(2, LENGTH)
    with simulate(model, settings, seed=SEED, refresh=REFRESH) as simulation:
        assert len(simulation.draw(LENGTH).chunks) == 3
        loss = model(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(loss, expected_loss(other, ids, 1, settings), rtol=0, atol=1e-12)
        whole = expected_loss(other, ids, 1, SimulationConfig(stride=[2, 5]))
        assert (loss - whole).abs() > 1e-4


def test_figures_by_kind_of_position():
    model, other = models()
    ids, labels = random_ids(2, LENGTH), random_ids(2, LENGTH)
    labels[0, :15] = -100
    settings = SimulationConfig(stride=4, prompt_length=20)
    simulation = simulate(model, settings, SEED, REFRESH)
    model(input_ids=ids, labels=labels)
    logits = other(input_ids=ids, simulation=simulation.draw(LENGTH)).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    step = torch.arange(LENGTH - 1) - 19
    partial = ((step > 0) & (step % 4 != 0)).expand(2, -1).flatten()
    counted = labels[:, 1:].flatten() != -100
    figures = simulation.report()
    assert figures["loss partial"] == pytest.approx(float(losses[counted & partial].mean()), abs=1e-6)
    assert figures["loss full"] == pytest.approx(float(losses[counted & ~partial].mean()), abs=1e-6)
    assert figures["plain share"] == 0 and simulation.report() == {}


def test_evaluation_and_a_removed_simulation_are_ordinary():
    model, other = models()
    ids = random_ids(2, LENGTH)
    simulation = simulate(model, SimulationConfig(stride=3), SEED, REFRESH)
    full = other(input_ids=ids).logits
    assert not torch.equal(model(input_ids=ids).logits, full)
    assert torch.equal(model.eval()(input_ids=ids).logits, full)
    simulation.remove()
    assert torch.equal(model.train()(input_ids=ids).logits, full)
    simulate(model, seed=1).remove()  # the model's own refresh settings now


class Rows(torch.utils.data.Dataset):
    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(tmp_path, checkpointing):
    model, other = models(dtype=torch.float32)
    rows = random_ids(4 * STEPS, LENGTH)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=checkpointing,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        max_grad_norm=0.0,
    )
    with simulate(model, SETTINGS, SEED, REFRESH) as simulation:
        trainer = Trainer(model, arguments, train_dataset=Rows(rows), callbacks=[simulation.callback])
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
        trainer.train()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(1, STEPS + 1):
        own = rows[4 * step - 4 : 4 * step]
        loss = expected_loss(other, own, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        logged = trainer.state.log_history[step - 1]
        assert logged["loss"] == pytest.approx(float(loss), abs=1e-5)
        simulation = draw_simulation(SETTINGS, REFRESH, LENGTH, SEED, step)
        assert logged["plain share"] == (simulation is None) and ("loss partial" in logged) == (simulation is not None)


def test_lora():
    peft = pytest.importorskip("peft")
    model, other = models()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    others = peft.get_peft_model(other, config)
    ids = random_ids(2, LENGTH)
    with simulate(adapted.train(), SETTINGS, SEED, REFRESH):
        loss, expected = adapted(input_ids=ids, labels=ids).loss, expected_loss(others.train(), ids, 1)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
        loss.backward()
    assert {name for name, part in adapted.named_parameters() if part.grad is not None} == {
        name for name, _ in adapted.named_parameters() if "lora_" in name
    }


@pytest.mark.parametrize("items", [None, 50])
def test_distillation(items):
    """The loss and the gradients of our own loop's, with the number of tokens that a trainer hands in, or without."""
    model, other = models()
    distillation, settings = (
        DistillationConfig(weight=0.5, temperature=2.0),
        SimulationConfig(stride=4, prompt_length=20),
    )
    ids, more = random_ids(2, LENGTH), {} if items is None else {"num_items_in_batch": items}
    with simulate(model, settings, SEED, REFRESH, distillation) as simulation:
        drawn, loss = simulation.draw(LENGTH), model(input_ids=ids, labels=ids, **more).loss
        loss.backward()
        figures = simulation.report()
    batch = make_batch({"input_ids": ids}, "all", torch.device("cpu"))
    sums = LossSums(*CausalLossModel(other, "logits", distillation).train()(**batch.model_arguments(drawn, False)))
    expected = sums.objective / (items or sums.tokens)
    expected.backward()
    torch.testing.assert_close(loss, expected.double(), rtol=0, atol=1e-6)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-6)
    assert figures["divergence"] == pytest.approx(float(sums.divergence / sums.divergence_tokens), abs=1e-5) and drawn


def test_distillation_needs_labels():
    model, _ = models()
    with simulate(model, SimulationConfig(stride=4), SEED, REFRESH, DistillationConfig(weight=0.5)):
        with pytest.raises(SettingsError, match="pass labels= to the model"):
            model(input_ids=random_ids(1, LENGTH))


def test_refusals():
    model, _ = models()
    simulation = simulate(model, SETTINGS, SEED, REFRESH)
    with pytest.raises(SettingsError, match="simulated already: call remove"):
        simulate(model, SETTINGS, SEED, REFRESH)
    ids = random_ids(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    with pytest.raises(ValueError, match='only left padding is supported: set tokenizer.padding_side = "left"'):
        model(input_ids=ids, attention_mask=mask)
    with pytest.raises(ValueError, match="packed sequences"):
        model(input_ids=ids, position_ids=torch.cat([torch.arange(20), torch.arange(20)]).expand(2, -1))
    with pytest.raises(ValueError, match="pass no cache"):
        model(input_ids=ids, past_key_values=object())
    simulation.remove()
    with pytest.raises(SettingsError, match="takes a transformers model or a peft model around one, got Sequential"):
        simulate(torch.nn.Sequential(model))


def test_short_sequences_stay_plain():
    model, other = models()
    with simulate(model, SimulationConfig(pattern="paper", stride=50), SEED, REFRESH) as simulation:
        assert simulation.draw(50) is None and simulation.draw(1) is None and simulation.draw(51) is not None
        ids = random_ids(1, 20)
        assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)


def test_left_padding_moves_the_padding_of_a_collator():
    ids, mask = torch.tensor([[5, 6, 7, 0, 0], [1, 2, 3, 4, 5]]), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    labels = ids.masked_fill(mask == 0, -100)
    batch = LeftPadding(lambda features: {"input_ids": ids, "attention_mask": mask, "labels": labels, "n": 2})([])
    assert batch["input_ids"].tolist() == [[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]] and batch["n"] == 2
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1] * 5]
    assert batch["labels"].tolist() == [[-100, -100, 5, 6, 7], [1, 2, 3, 4, 5]]
