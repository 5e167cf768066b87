"""The loss without the whole logits equals the plain one: values, kinds of positions, every gradient."""

import pytest
import torch

from refreshkv import RefreshConfig, Simulation
from refreshkv.families.record import load_record, outcomes_of
from refreshkv.families.tiny import tiny_model as tiny_family
from refreshkv.settings import SettingsError
from refreshkv.simulation.distillation import DistillationConfig, divergence, divergence_and_gradient
from refreshkv.simulation.positions import partial_positions
from refreshkv.train import chunked_loss
from refreshkv.train.batch import answer_targets, make_batch
from refreshkv.train.loss import POSTPROCESSED, CausalLossModel, LossSums, validate_output_layer
from tests.helpers.models import random_ids, tiny_enabled, tiny_model

SIMULATION = Simulation(7, RefreshConfig(budget=4, stride=5))


def rows(answers=(3, 6)):
    prompt = torch.tensor([7, 7])
    return {"input_ids": random_ids(2, 20), "prompt_length": prompt, "answer_length": torch.tensor(answers)}


def sums_and_gradients(kind, batch, model=None, scale=3.0, distillation=None):
    model = model or tiny_enabled(dtype=torch.float32)
    sums = LossSums(*CausalLossModel(model, kind, distillation)(**batch.model_arguments(SIMULATION, split=False)))
    (sums.objective * scale).backward()
    return sums, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("loss_on", ["all", "answers"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_chunked_loss_equals_the_plain_one(monkeypatch, chunk, loss_on, tied):
    model = tiny_enabled(dtype=torch.float32, tie_word_embeddings=tied)
    monkeypatch.setattr(chunked_loss, "LOGITS_AT_ONCE", chunk * model.config.vocab_size)
    batch = make_batch(rows(), loss_on, torch.device("cpu"))
    plain, gradients = sums_and_gradients("logits", batch, tiny_enabled(dtype=torch.float32, tie_word_embeddings=tied))
    found, own = sums_and_gradients("chunked", batch, model)
    for name, one, other in zip(LossSums._fields, plain, found, strict=True):
        assert float(other.detach()) == pytest.approx(float(one.detach()), rel=1e-6), name
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


def test_an_output_layer_with_a_bias():
    results = []
    for kind in ("logits", "chunked"):
        model = tiny_enabled(dtype=torch.float32)
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, model.config.vocab_size))
        results.append(sums_and_gradients(kind, make_batch(rows(), "all", torch.device("cpu")), model)[1])
    torch.testing.assert_close(results[1]["lm_head.bias"], results[0]["lm_head.bias"], rtol=1e-5, atol=1e-5)


def test_no_counted_token_leaves_gradients_of_zeros():
    for kind in ("chunked", "logits"):
        sums, gradients = sums_and_gradients(kind, make_batch(rows((0, 0)), "answers", torch.device("cpu")))
        assert [float(part.detach()) for part in sums] == [0] * len(sums)
        assert all(gradient is not None and not gradient.any() for gradient in gradients.values()), kind


@pytest.mark.parametrize("settings", [{}, {"family": "gemma2", "final_logit_softcapping": 2.0}])
def test_bfloat16_sums_its_chunks_in_float32(monkeypatch, settings):
    settings = {"dtype": torch.float32, "tie_word_embeddings": False, **settings}
    batch = make_batch(rows(), "all", torch.device("cpu"))
    _, plain = sums_and_gradients("logits", batch, tiny_enabled(**settings))
    monkeypatch.setattr(chunked_loss, "LOGITS_AT_ONCE", 61)
    sums, found = sums_and_gradients("chunked", batch, tiny_enabled(**settings).bfloat16())
    assert sums.objective.dtype == torch.float32 and found["lm_head.weight"].dtype == torch.bfloat16
    error = (found["lm_head.weight"].float() - plain["lm_head.weight"]).norm() / plain["lm_head.weight"].norm()
    assert error < 0.1


def test_calls_without_targets_give_logits_as_before():
    ids, model = random_ids(2, 20), tiny_enabled(dtype=torch.float32)
    before = model(ids).logits
    names = [name for name, _ in model.named_parameters()]
    loss_model = CausalLossModel(model, "chunked")
    for changed in (model, loss_model):
        assert torch.equal(changed(ids).logits, before)
        assert [name for name, _ in changed.named_parameters()] == names


@pytest.mark.parametrize("name", POSTPROCESSED)
def test_models_that_change_their_logits_are_refused(name):
    model = tiny_model()
    setattr(model.config, name, 8.0)
    with pytest.raises(SettingsError, match=f"config.{name} changes its logits"):
        CausalLossModel(model, "chunked")


@pytest.mark.parametrize(
    ("family", "reason"),
    [("bert", "has weights of its own beside its decoder"), ("kosmos-2.5", "transformers names no decoder within it")],
)
def test_models_with_more_than_a_decoder_and_an_output_layer_are_refused(family, reason):
    with pytest.raises(SettingsError, match=reason) as caught:
        CausalLossModel(tiny_family(family), "chunked")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name, how in outcomes_of(load_record()).items() if how.result == "passes"])
@torch.no_grad()
def test_the_logits_of_every_other_family_are_those_of_the_output_layer(family):
    model, ids = tiny_family(family), random_ids(2, 12)
    try:
        validate_output_layer(model)
    except SettingsError:
        return
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    found = chunked_loss.capped(model.get_output_embeddings()(hidden), chunked_loss.logit_softcap(model.config))
    torch.testing.assert_close(found, model(ids, use_cache=False).logits.to(found.dtype), rtol=0, atol=1e-5)


def test_losses_by_kind_of_position():
    model, ids = tiny_enabled(dtype=torch.float32), random_ids(2, 20)
    partial = partial_positions(SIMULATION, torch.arange(20))
    assert partial.nonzero().flatten().tolist() == [7, 8, 9, 10, 12, 13, 14, 15, 17, 18, 19]
    with torch.no_grad():
        outputs = model(ids, labels=ids, simulation=SIMULATION)
    sums, _ = sums_and_gradients("chunked", make_batch(rows(), "all", ids.device), model)
    assert float(sums.total / sums.tokens) == pytest.approx(float(outputs.loss), rel=1e-5)
    assert (int(sums.tokens), int(sums.partial_tokens)) == (38, 20)
    logits = outputs.logits[:, :-1].log_softmax(-1)
    expected = -logits.gather(-1, ids[:, 1:, None]).squeeze(-1)[:, partial[:-1]].sum()
    assert float(sums.partial) == pytest.approx(float(expected), rel=1e-5)


def test_losses_of_answers_alone():
    model, ids = tiny_enabled(dtype=torch.float32), random_ids(2, 20)
    answers = answer_targets(torch.tensor([7, 7]), torch.tensor([3, 6]), 20)
    assert [row.nonzero().flatten().tolist() for row in answers] == [[6, 7, 8], [6, 7, 8, 9, 10, 11]]
    with torch.no_grad():
        logits = model(ids, simulation=SIMULATION).logits
    losses = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    sums, _ = sums_and_gradients("chunked", make_batch(rows(), "answers", ids.device), model)
    assert float(sums.total) == pytest.approx(float(losses[0, 6:9].sum() + losses[1, 6:12].sum()), rel=1e-5)
    assert float(sums.partial) == pytest.approx(
        float(losses[0, 7:9].sum() + losses[1, 7:11].sum()), rel=1e-5
    )  # 6 and 11 are full
    assert (int(sums.tokens), int(sums.partial_tokens)) == (9, 6)


def test_the_gradient_of_the_divergence():
    student = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 11, dtype=torch.float64)
    for temperature in (0.5, 1.0, 3.0):
        plain = divergence(student, teacher, temperature)
        expected = torch.autograd.grad(plain.sum(), student)[0]
        found, gradient = divergence_and_gradient(student.detach(), teacher, temperature)
        torch.testing.assert_close(found, plain.detach())
        torch.testing.assert_close(gradient, expected)
        assert float(found.min()) > 0 and not divergence(teacher, teacher, temperature).any()


@pytest.mark.parametrize("kind", ["logits", "chunked"])
@pytest.mark.parametrize("loss_on", ["all", "answers"])
@pytest.mark.parametrize("settings", [{}, {"family": "gemma2", "final_logit_softcapping": 2.0}])
def test_the_objective_of_a_distillation(monkeypatch, kind, loss_on, settings):
    """Against plain autograd over two whole passes, the full-attention one without gradient; also with a softcap of the
    logits."""
    monkeypatch.setattr(chunked_loss, "LOGITS_AT_ONCE", 7 * 61)
    distillation = DistillationConfig(weight=0.7, temperature=2.0)
    batch = make_batch(rows(), loss_on, torch.device("cpu"))
    truth = tiny_enabled(dtype=torch.float32, **settings)
    logits = truth(batch.ids, simulation=SIMULATION, use_cache=False).logits
    with torch.no_grad():
        teacher = truth(batch.ids, use_cache=False).logits
    after = batch.counted & (batch.positions >= SIMULATION.prompt_length)
    losses = torch.nn.functional.cross_entropy(logits[batch.counted], batch.targets[batch.counted], reduction="sum")
    log_student, log_teacher = ((side[after] / 2.0).log_softmax(-1) for side in (logits, teacher))
    pulled = 4.0 * (log_teacher.exp() * (log_teacher - log_student)).sum()
    (3.0 * (losses + 0.7 * pulled)).backward()

    model = tiny_enabled(dtype=torch.float32, **settings)
    sums, gradients = sums_and_gradients(kind, batch, model, distillation=distillation)
    assert float(sums.total) == pytest.approx(float(losses.detach()), rel=1e-5)
    assert float(sums.divergence) == pytest.approx(float(pulled.detach()), rel=1e-4) and float(pulled.detach()) > 1e-3
    assert float(sums.objective.detach()) == pytest.approx(float(losses.detach() + 0.7 * pulled.detach()), rel=1e-5)
    assert int(sums.divergence_tokens) == int(after.sum())
    for name, parameter in truth.named_parameters():
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5 * largest)


def test_the_teacher_has_no_dropout():
    model, seen = tiny_enabled(dtype=torch.float32).train(), []
    for layer in model.model.layers:
        layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Dropout(0.5))
        layer.mlp[1].register_forward_hook(
            lambda module, *_: seen.append((torch.is_grad_enabled(), module.training)) and None
        )
    frozen = model.model.layers[0].self_attn.eval()
    loss_model = CausalLossModel(model, "chunked", DistillationConfig(weight=1.0))
    loss_model(**make_batch(rows(), "all", torch.device("cpu")).model_arguments(SIMULATION, split=False))
    assert seen == [(False, False)] * 2 + [(True, True)] * 2 and model.training and not frozen.training
