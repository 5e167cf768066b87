"""simulate() where it is used awkwardly: short and padded rows, copies, several models, trainers that resume."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from refreshkv import DistillationConfig, RefreshConfig, SettingsError, SimulationConfig, enable, simulate
from refreshkv.config import Simulation
from refreshkv.simulation.draw import draw_simulation
from tests.helpers.models import padded_positions, random_ids, tiny_model

REFRESH = RefreshConfig(budget=6, stride=3)
SETTINGS = SimulationConfig(stride=[2, 3, 5], plain_share=0.3)
LENGTH, SEED, STEPS = 40, 5, 6


def simulated(settings=SETTINGS, **arguments):
    model = tiny_model().train()
    return model, simulate(model, settings, SEED, REFRESH, **arguments)


def draws_of(simulation, length, padding, steps=40):
    for number in range(1, steps + 1):
        simulation.number = number
        yield simulation.draw(length, padding)


def test_prompts_of_padded_rows():
    """Each prompt has tokens of every batch row; the loss is that of the same simulation handed in."""
    model, simulation = simulated(SimulationConfig(stride=[2, 3, 5]))
    other = enable(tiny_model(), REFRESH).train()
    ids, mask = random_ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, :32] = 0
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": padded_positions(mask),
        "labels": ids.where(mask.bool(), -100),
    }
    prompts = [drawn.prompt_length for drawn in draws_of(simulation, LENGTH, 32)]
    assert set(prompts) == {34, 35}  # from a quarter of 8 tokens to all but the largest stride below 8
    for number in range(1, 4):
        simulation.number = number
        expected = other(**inputs, simulation=simulation.draw(LENGTH, 32), use_cache=False).loss
        torch.testing.assert_close(model(**inputs).loss, expected, rtol=0, atol=1e-12)
        assert simulation.draw(LENGTH) == draw_simulation(simulation.settings, REFRESH, LENGTH, SEED, number)


@pytest.mark.parametrize(
    ("settings", "length", "padding", "bounds"),
    [
        (SimulationConfig(stride=3, prompt_length=[10, 20]), LENGTH, 15, (16, 20)),
        (SimulationConfig(stride=3, prompt_length=[10, 20]), 15, 0, (10, 14)),
        (SimulationConfig(stride=3, prompt_length=[10, 20]), LENGTH, 20, None),
        (SimulationConfig(stride=3, prompt_length=20), 20, 0, None),
        (SimulationConfig(stride=3, prompt_length=20), LENGTH, 19, (20, 20)),
        (SimulationConfig(stride=3), LENGTH, LENGTH - 1, None),
        (SimulationConfig(pattern="paper", stride=10), LENGTH, 29, (30, 30)),
        (SimulationConfig(pattern="paper", stride=10), LENGTH, 30, None),
        (SimulationConfig(pattern="paper", stride=50), LENGTH, 0, None),
    ],
)
def test_bounds_of_prompts(settings, length, padding, bounds):
    _, simulation = simulated(settings)
    if bounds is None:
        with pytest.warns(UserWarning, match="too short for .*: its pass stays plain"):
            assert set(draws_of(simulation, length, padding)) == {None}
        return
    prompts = [drawn.prompt_length for drawn in draws_of(simulation, length, padding)]
    assert (min(prompts), max(prompts)) == bounds


def test_other_masks_and_packed_keywords_are_refused():
    model, _ = simulated()
    ids = random_ids(1, LENGTH)
    for mask in (torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), torch.zeros(1, 1, LENGTH, LENGTH)):
        with pytest.raises(ValueError, match="not a prepared 4D mask"):
            model(input_ids=ids, attention_mask=mask)
    with pytest.raises(ValueError, match="packed sequences"):
        model(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 20, LENGTH], dtype=torch.int32))


def test_two_models_at_once():
    (first, one), (second, two) = simulated(), simulated(SimulationConfig(stride=4, prompt_length=20))
    other, ids = enable(tiny_model(), REFRESH).train(), random_ids(2, LENGTH)
    with one, two:
        for _ in range(3):
            for model, simulation in ((first, one), (second, two)):
                expected = other(input_ids=ids, simulation=simulation.draw(LENGTH), use_cache=False).logits
                assert torch.equal(model(input_ids=ids).logits, expected)
            one.step()
    assert (one.number, two.number) == (4, 1)


def test_removing_twice_leaves_a_later_simulation():
    model, simulation = simulated()
    with simulation:
        simulation.remove()
        later = simulate(model, SimulationConfig(stride=3), SEED)
    ids = random_ids(1, LENGTH)
    expected = enable(tiny_model(), REFRESH).train()(input_ids=ids, simulation=later.draw(LENGTH)).logits
    assert torch.equal(model(input_ids=ids).logits, expected)
    with pytest.raises(SettingsError, match="simulated already"):
        simulate(model)
    later.remove()
    model.set_attn_implementation("sdpa")  # an ordinary model again, which takes right padding
    mask = torch.ones_like(ids)
    mask[:, -4:] = 0
    full = tiny_model().train()(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, full)


def test_a_copy_is_an_ordinary_model():
    """Such as the reference model of preference training; it can be simulated by itself."""
    model, simulation = simulated(SimulationConfig(stride=3))
    copied, ids = copy.deepcopy(model), random_ids(1, LENGTH)
    full = enable(tiny_model(), REFRESH).train()(input_ids=ids).logits
    assert torch.equal(copied(input_ids=ids, labels=ids).logits, full) and simulation.report() == {}
    assert not torch.equal(model(input_ids=ids).logits, full)
    with simulate(copied, SimulationConfig(stride=3), SEED):
        assert torch.equal(copied(input_ids=ids).logits, model(input_ids=ids).logits)


def test_data_parallel_is_refused():
    model, _ = simulated()
    replica = model.model._replicate_for_data_parallel()
    with pytest.raises(SettingsError, match=r"torch.nn.DataParallel.*start one process a GPU"):
        replica(input_ids=random_ids(1, LENGTH))


def test_a_simulation_of_ones_own_goes_first():
    model, _ = simulated(SimulationConfig(stride=3))
    other, ids, own = enable(tiny_model(), REFRESH).train(), random_ids(1, LENGTH), Simulation(9, REFRESH)
    assert torch.equal(model(input_ids=ids, simulation=own).logits, other(input_ids=ids, simulation=own).logits)


def lora_around(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


def test_distillation_that_a_call_passes_by_is_refused():
    model, simulation = simulated(SimulationConfig(stride=3), distillation=DistillationConfig(weight=0.5))
    ids = random_ids(1, LENGTH)
    model.forward(input_ids=ids, labels=ids)
    with pytest.raises(SettingsError, match="left out of this step, because only a part of the model"):
        simulation.step()
    model(input_ids=ids, labels=ids)
    simulation.step()


class Rows(torch.utils.data.Dataset):
    """Rows of different lengths where `lengths` has several."""

    def __init__(self, rows, lengths=(LENGTH,)):
        ids = random_ids(rows, LENGTH)
        self.rows = [ids[row, : lengths[row % len(lengths)]] for row in range(rows)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def left_padded(features):
    width = max(len(feature["input_ids"]) for feature in features)
    parts = {"input_ids": 0, "labels": -100}
    batch = {
        name: torch.stack(
            [torch.nn.functional.pad(row[name], (width - len(row[name]), 0), value=fill) for row in features]
        )
        for name, fill in parts.items()
    }
    return {**batch, "attention_mask": (batch["labels"] != -100).long()}


def trainer_of(model, simulation, folder, rows=None, **arguments):
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        **arguments,
    }
    rows = rows or Rows(2 * STEPS)
    arguments = TrainingArguments(output_dir=str(folder), **settings)
    return Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=Rows(4),
        data_collator=left_padded,
        callbacks=[simulation.callback],
    )


def figures_of(trainer):
    names = ("loss", "loss full", "loss partial", "plain share")
    return [{name: line.get(name) for name in names} for line in trainer.state.log_history if "loss" in line]


def test_a_resumed_trainer_continues_the_draws_and_evaluates_in_full(tmp_path):
    model, simulation = simulated()
    whole = trainer_of(
        model, simulation, tmp_path / "run", save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3
    )
    whole.train()
    evaluated = [line["eval_loss"] for line in whole.state.log_history if "eval_loss" in line]
    with torch.no_grad():
        batch = left_padded([Rows(4)[number] for number in range(4)])
        full = enable(copy.deepcopy(model), REFRESH).eval()(**batch).loss
    assert len(evaluated) == 2 and evaluated[-1] == pytest.approx(float(full), abs=1e-6)
    model, simulation = simulated()
    resumed = trainer_of(model, simulation, tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert simulation.number == STEPS + 1
    mine, theirs = figures_of(resumed)[3:], figures_of(whole)[3:]
    assert len(mine) == 3 and all(
        ours == pytest.approx(other, abs=1e-9) for ours, other in zip(mine, theirs, strict=True)
    )


def test_rows_of_many_lengths_in_trainer(tmp_path):
    model, simulation = simulated(SimulationConfig(stride=[2, 30], prompt_length=[4, 20]))
    rows = Rows(2 * STEPS, lengths=(LENGTH, 3, 17, 9))
    with pytest.warns(UserWarning, match="stays plain"):
        trainer = trainer_of(model, simulation, tmp_path, rows, train_sampling_strategy="group_by_length")
        trainer.train()
    figures = figures_of(trainer)
    assert len(figures) == STEPS and any(line["loss partial"] for line in figures)


def test_a_peft_model_made_after_simulate_has_its_figures(tmp_path):
    """As `SFTTrainer(peft_config=...)` makes one."""
    model, simulation = simulated(SimulationConfig(stride=3), distillation=DistillationConfig(weight=0.5))
    trainer = trainer_of(lora_around(model), simulation, tmp_path, max_steps=2)
    trainer.train()
    assert all(line["loss partial"] for line in figures_of(trainer)) and trainer.state.log_history[0]["divergence"] >= 0
