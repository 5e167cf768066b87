"""Look-ahead queries in our training, in `simulate`, in checkpoints and in exports."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import refreshkv
from refreshkv import LookAheadConfig, RefreshConfig, SettingsError, SimulationConfig, simulate
from refreshkv.attention.look_ahead import add_look_ahead, look_ahead_modules
from refreshkv.attention.look_ahead_file import LOOK_AHEAD_FILE, look_ahead_weights
from refreshkv.config import Trace
from refreshkv.data.config import DataConfig
from refreshkv.simulation.draw import draw_simulation
from refreshkv.train.adapter_config import AdapterConfig
from refreshkv.train.batch import make_batch
from refreshkv.train.checkpoint import save_checkpoint
from refreshkv.train.config import ModelConfig, RunConfig, TrainingConfig
from refreshkv.train.engine import build_engine, init_processes
from refreshkv.train.export import export
from refreshkv.train.export_error import ExportError
from refreshkv.train.job import resolve
from refreshkv.train.look_ahead import parameter_groups, validate_look_ahead
from refreshkv.train.loss import CausalLossModel, LossSums
from refreshkv.train.model import build_model
from refreshkv.train.run_folder import State
from refreshkv.train.step import train_step
from tests.helpers.jobs import SCRATCH
from tests.helpers.models import random_ids, tiny_enabled, tiny_model
from tests.helpers.ranks import run_ranks

REFRESH = RefreshConfig(budget=6, stride=3)
SETTINGS = SimulationConfig(stride=[3, 5], select_stride=[2, None])
LENGTH = 40


def divergence_of(model, ids, simulation):
    """The mean over layers, from a pass of its own."""
    trace = Trace(measured_steps=16)
    model(ids, simulation=simulation, trace=trace, use_cache=False)
    return torch.stack(list(trace.look_ahead_divergences.values())).mean()


@pytest.mark.parametrize("frozen", [False, True])
def test_simulate_adds_the_divergence_to_the_loss(frozen):
    model, ids = tiny_model().train(), random_ids(2, LENGTH)
    settings = LookAheadConfig(queries=2, rank=3, weight=0.7, freeze_model=frozen)
    simulation = simulate(model, SETTINGS, seed=5, refresh=REFRESH, look_ahead=settings)
    drawn = simulation.draw(LENGTH)
    other = add_look_ahead(tiny_enabled(config=REFRESH), 2, 3, seed=5)
    plain = other(ids, labels=ids, simulation=drawn, use_cache=False).loss
    expected = plain + 0.7 * divergence_of(other, ids, drawn)
    loss = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss.double(), expected.double(), rtol=0, atol=1e-5)  # the loss is float32
    loss.backward()
    expected.backward()
    gradients = {name: part.grad for name, part in other.named_parameters()}
    for name, part in model.named_parameters():
        if frozen and "look_ahead" not in name:
            assert part.grad is None and not part.requires_grad
        else:
            torch.testing.assert_close(part.grad, gradients[name], rtol=1e-5, atol=1e-7)
    assert simulation.report()["look-ahead divergence"] > 0
    simulation.remove()
    assert all(part.requires_grad for part in model.parameters())
    with pytest.raises(SettingsError, match="has 2 look-ahead queries of rank 3"):
        simulate(model, SETTINGS, look_ahead=LookAheadConfig(queries=4))
    with pytest.raises(SettingsError, match="queries must be at least 1"):
        LookAheadConfig(queries=0)


def test_a_few_steps_beside_a_frozen_model_lower_the_divergence():
    model, ids = tiny_model(dtype=torch.float32).train(), random_ids(4, LENGTH)
    look_ahead = LookAheadConfig(freeze_model=True)
    fixed = SimulationConfig(stride=4, prompt_length=12)
    with simulate(model, fixed, refresh=REFRESH, look_ahead=look_ahead) as simulation:
        optimizer = torch.optim.Adam([part for part in model.parameters() if part.requires_grad], lr=0.03)
        found = []
        for _ in range(12):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(simulation.report()["look-ahead divergence"])
    assert found[-1] < 0.9 * found[0]


def test_our_loss_is_that_of_simulate():
    model = add_look_ahead(tiny_enabled(dtype=torch.float32, config=REFRESH), 2, 3)
    settings, ids = LookAheadConfig(queries=2, rank=3, weight=0.7), random_ids(2, LENGTH)
    drawn = draw_simulation(SETTINGS, REFRESH, LENGTH, 5, 1)
    with torch.no_grad():
        expected = divergence_of(model, ids, drawn)
    loss_model = CausalLossModel(model, "chunked", look_ahead=settings).train()
    batch = make_batch({"input_ids": ids}, "all", ids.device)
    sums = LossSums(*loss_model(**batch.model_arguments(drawn, False)))
    assert sums.look_ahead / sums.tokens == pytest.approx(expected.item(), rel=1e-5)
    assert sums.objective.item() == pytest.approx((sums.total + 0.7 * sums.look_ahead).item(), rel=1e-5)
    plain = LossSums(*loss_model(**batch.model_arguments(None, False)))
    assert plain.look_ahead == 0 and plain.objective.item() == pytest.approx(plain.total.item(), rel=1e-6)


def write_deepspeed_json(folder):
    (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))


def run_config(folder, frozen=False, **training):
    return RunConfig(
        model=ModelConfig(scratch={**SCRATCH, "bos_token_id": 0, "eos_token_id": 0}),
        data=DataConfig(folder=str(folder / "rows"), row_length=LENGTH),
        refresh=RefreshConfig(budget=8, stride=4),
        simulation=SimulationConfig(stride=4, prompt_length=20),
        training=TrainingConfig(
            output=str(folder),
            deepspeed=str(folder / "deepspeed.json"),
            dtype="fp32",
            global_batch=2,
            warmup_steps=0,
            learning_rate=1e-3,
            look_ahead=LookAheadConfig(queries=2, rank=2, learning_rate=0.03, freeze_model=frozen),
            **training,
        ),
    )


def train(folder):
    """Two steps of a run with look-ahead queries on each rank, frozen and not, and a checkpoint of each."""
    rank, world = init_processes()
    for frozen in (False, True):
        own = folder / f"frozen-{frozen}"
        if rank == 0:
            own.mkdir()
            write_deepspeed_json(own)
        torch.distributed.barrier()
        config = run_config(own, frozen)
        config.training.global_batch = world
        job = resolve(config, world, dry=True)
        built = build_model(job)
        model = CausalLossModel(built, "chunked", None, config.training.look_ahead)
        engine = build_engine(model, job)
        simulation = draw_simulation(config.simulation, config.refresh, LENGTH, 0, 1)
        values = []
        for step in range(2):
            ids = torch.randint(300, (1, LENGTH), generator=torch.Generator().manual_seed(10 * step + rank))
            values.append(train_step(engine, [make_batch({"input_ids": ids}, "all", engine.device)], simulation))
        assert all(value["look-ahead divergence"] > 0 for value in values)
        save_checkpoint(engine, own, config, State(2, 0, world, 2, "rows"), None)
        if rank == 0:
            torch.save(dict(engine.module.state_dict()), own / "expected.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(2, folder / "printed.txt", train, folder)
    return folder


@pytest.mark.parametrize("frozen", [False, True])
def test_checkpoints_are_exported_with_their_queries(runs, tmp_path, frozen):
    folder = runs / f"frozen-{frozen}"
    export(folder, tmp_path / "out")
    expected = torch.load(folder / "expected.pt")
    model = refreshkv.enable(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    found = model.state_dict()
    assert found.keys() >= expected.keys() and (tmp_path / "out" / LOOK_AHEAD_FILE).is_file()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0)
    assert all(module.up.abs().max() > 0 for module in look_ahead_modules(model).values())
    torch.manual_seed(0)
    start = AutoModelForCausalLM.from_config(model.config, attn_implementation="sdpa")
    was_trained = not torch.equal(start.lm_head.weight, model.lm_head.weight)
    assert was_trained is not frozen


def test_an_export_with_other_queries_is_refused(runs, tmp_path, monkeypatch):
    from refreshkv.train import export as module

    def write_others(weights, folder):
        write({name: weight + 1.0 for name, weight in weights.items()}, folder)

    write = module.write_weights
    monkeypatch.setattr(module, "write_weights", write_others)
    with pytest.raises(ExportError, match="does not have the checkpoint's look-ahead queries"):
        export(runs / "frozen-True", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_queries_have_a_learning_rate_of_their_own(tmp_path):
    config = run_config(tmp_path, frozen=True)
    groups = parameter_groups(add_look_ahead(tiny_enabled()), config.training)
    assert [group.get("lr") for group in groups] == [None, 0.03]
    assert len(groups[1]["params"]) == 3 * 2 and all(isinstance(part, nn.Parameter) for part in groups[1]["params"])


@pytest.mark.parametrize(
    "section, changes, message",
    [
        ("training", {"adapter": AdapterConfig()}, "training.adapter"),
        ("training", {"activation_checkpointing": 0.5}, "training.activation_checkpointing"),
        ("simulation", {"pattern": "off", "prompt_length": None}, "simulation.pattern=off"),
        ("parallel", {"sequence": 2}, "parallel.sequence above 1"),
        ("distillation", {"weight": 1.0}, "freeze_model"),
    ],
)
def test_settings_that_exclude_look_ahead_are_refused(tmp_path, section, changes, message):
    config = run_config(tmp_path, frozen=True)
    for name, value in changes.items():
        setattr(getattr(config, section), name, value)
    with pytest.raises(SettingsError, match=message):
        validate_look_ahead(config, 2)
    with pytest.raises(SettingsError, match="ZeRO stage 3"):
        validate_look_ahead(run_config(tmp_path), 3)


def test_a_model_with_queries_is_not_trained_without_them(tmp_path):
    model = add_look_ahead(tiny_enabled(dtype=torch.float32))
    refreshkv.save_look_ahead(model, tmp_path / "model")
    assert look_ahead_weights(model)
    write_deepspeed_json(tmp_path)
    config = run_config(tmp_path)
    config.model = ModelConfig(path=str(tmp_path / "model"))
    config.training.look_ahead = None
    with pytest.raises(SettingsError, match="set training.look_ahead with the same queries"):
        build_model(resolve(config, 1, dry=True))
