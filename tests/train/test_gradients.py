"""Gradients and their norm do not depend on how the work is divided: stages of ZeRO, ranks, columns of rows."""

from dataclasses import replace

import pytest
import torch

from refreshkv import Trace
from refreshkv.simulation.distillation import divergence
from tests.helpers.gradients import SIMULATIONS, Case, all_rows, model_of, write_gradients
from tests.helpers.ranks import run_ranks

ALL = [
    Case(stage, sequence, simulation, recompute=simulation == "fixed")
    for stage in (0, 1, 2, 3)
    for sequence in (1, 2, 4)
    for simulation in ("fixed", "similarity")
]
FEW_GROUPS = [Case(0, 4, "similarity", kv_heads=2), Case(1, 4, "fixed", kv_heads=1), Case(2, 2, "fixed", kv_heads=1)]
"""Key/value heads fewer than ranks."""
ORDINARY = [Case(3, 4, "full"), Case(2, 2, "full"), Case(3, 1, "full", recompute=True, offload=True)]
ORDINARY += [Case(1, 1, "fixed", recompute=True, offload=True)]
HALF = [Case(3, 2, "similarity", recompute=0.5), Case(2, 1, "fixed", recompute=0.5)]
HALF += [Case(3, 1, "fixed", recompute=0.5, offload=True), Case(3, 1, "fixed", recompute=0.5, distilled=True)]
"""One of the two layers recomputes."""
WHOLE_LAYERS = [
    Case(3, 2, "fixed", recompute=True, whole_layers=True),
    Case(3, 1, "similarity", recompute=0.5, whole_layers=True),
    Case(3, 1, "fixed", recompute=0.5, offload=True, distilled=True, whole_layers=True),
]
DISTILLED = [Case(3, 2, "fixed", recompute=True, distilled=True), Case(1, 2, "similarity", distilled=True)]

SELECTING = [Case(1, 2, "selecting"), Case(0, 4, "selecting", kv_heads=2)]

SOFTCAP = [
    Case(0, 2, "selecting", family="gemma2"),
    Case(3, 2, "fixed", loss="logits", distilled=True, family="gemma2"),
]

LAYOUTS = {1: [1], 2: [1, 2], 4: [2, 4]}
"""Ranks -> how many share a row."""


def cases_of(world, everything):
    """Without `everything`, one schedule for each stage and layout; on four ranks stages 1 and 3 alone, and the other
    cases only where all ranks share a row."""
    cases = [
        case
        for case in ALL + FEW_GROUPS + ORDINARY + HALF + WHOLE_LAYERS + DISTILLED + SELECTING + SOFTCAP
        if case.sequence in LAYOUTS[world]
    ]
    if everything:
        return cases
    stages = {0, 1, 2, 3} if world < 4 else {1, 3}
    schedules = {0: "similarity", 1: "fixed", 2: "fixed", 3: "similarity"}
    return [
        case
        for case in cases
        if (
            case.stage in stages and case.simulation == schedules[case.stage] if case in ALL else case.sequence == world
        )
    ]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_gradients_equal_those_of_one_process(world, tmp_path):
    check_gradients(world, cases_of(world, everything=False), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_gradients_of_every_layout_stage_and_schedule(world, tmp_path):
    check_gradients(world, cases_of(world, everything=True), tmp_path)


def expected(case):
    """Plain autograd of the mean loss over all counted tokens, one process, all logits."""
    model, rows = model_of(case), all_rows()
    ids = rows["input_ids"]
    logits = model(ids, simulation=SIMULATIONS[case.simulation], use_cache=False).logits[:, :-1]
    target = torch.arange(1, ids.shape[1])
    counted = target >= rows["prompt_length"][:, None]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    objective = losses[counted].mean()
    if case.distilled:
        objective = objective + case.distillation.weight * mean_divergence(case, model, ids, logits, counted)
    objective.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients, torch.nn.utils.get_total_norm(list(gradients.values()))


def mean_divergence(case, model, ids, logits, counted):
    with torch.no_grad():
        teacher = model(ids, use_cache=False).logits[:, :-1]
    decoded = counted & (torch.arange(ids.shape[1] - 1) >= SIMULATIONS[case.simulation].prompt_length)
    temperature = case.distillation.temperature
    return divergence(logits[decoded], teacher[decoded], temperature).sum() / counted.sum()


def test_the_similarity_cases_have_checks_of_both_kinds():
    simulation, trace = SIMULATIONS["similarity"], Trace()
    model_of(Case(0, 1, "similarity"))(all_rows()["input_ids"], simulation=simulation, trace=trace, use_cache=False)
    for flags in trace.full_steps.values():
        checks = flags[:, simulation.prompt_length - 1 :: simulation.config.stride][:, 1:].float().mean()
        assert 0.1 < checks < 0.9


def check_gradients(world, cases, tmp_path):
    run_ranks(world, tmp_path / "printed.txt", write_gradients, cases, str(tmp_path))
    truth = {}
    for number, case in enumerate(cases):
        alone = replace(case, stage=0, sequence=1, recompute=False, offload=False, whole_layers=False)
        if alone not in truth:
            truth[alone] = expected(alone)
        gradients, norm = truth[alone]
        found = torch.load(tmp_path / f"{world}-{number}.pt")
        largest = max(gradient.abs().max() for gradient in gradients.values())
        assert largest > 1e-3
        for name, gradient in gradients.items():
            difference = (found["gradients"][name] - gradient).abs().max() / largest
            assert difference < 1e-5, f"{world} ranks, {case}, {name}: {difference:.1e}"
        assert found["norm"] == pytest.approx(float(norm), rel=1e-5), f"{world} ranks, {case}"
