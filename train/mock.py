"""The mock step: forward and backward before step 1, so that a run which cannot work fails before anything changes."""

import math

import torch
import torch.distributed as dist

from refreshkv.settings import SettingsError
from refreshkv.train.batch import Batch
from refreshkv.train.config import RunConfig
from refreshkv.train.loss import LossSums
from refreshkv.train.simulation import heaviest_simulation

CHECKED_TOKENS = 16
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest relative difference between the two ways to the loss."""


def mock_step(engine, batch: Batch, config: RunConfig) -> float:
    """Runs one micro-batch forward and backward with the most demanding simulation; returns its mean loss.

    The loss is multiplied by zero, so the gradients that remain are zeros, to which step 1 adds its own. Weights,
    optimizer and random state stay as they are. Raises `SettingsError` if the loss is not finite, or differs from the
    loss of the model's own logits.
    """
    states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    _validate_loss(engine, batch, config)
    engine.train()
    simulation = heaviest_simulation(config)
    sums = LossSums(*engine(**batch.model_arguments(simulation, config.parallel.sequence > 1)))
    engine.backward(sums.objective * 0.0, scale_wrt_gas=False)
    totals = torch.stack([sums.objective.detach().float(), sums.tokens])
    dist.all_reduce(totals)
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])
    loss = float(totals[0] / totals[1].clamp(min=1))
    if not math.isfinite(loss):
        raise SettingsError(
            "the loss of the mock step before training is not finite: check the model's weights and the sequences, or "
            "try training.dtype=fp32"
        )
    return loss


@torch.no_grad()
def _validate_loss(engine, batch: Batch, config: RunConfig) -> None:
    """Compares the training loss with the cross entropy of the logits that the whole model returns, on a few tokens.

    The model is in evaluation mode meanwhile, in which each process works on rows of its own.
    """
    model = engine.module
    ids, targets = batch.ids[:1, :CHECKED_TOKENS], batch.targets[:1, :CHECKED_TOKENS]
    every = torch.ones_like(ids, dtype=torch.bool)
    masks = {"simulation": None, "trace": None, "counted": every.nonzero()[:, 1], "partial": ~every, "decoded": ~every}
    model.eval()
    logits = model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)
    sums = LossSums(*model(input_ids=ids, use_cache=False, targets=targets, **masks))
    model.train()
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    difference = float((sums.total - expected).abs() / expected.abs().clamp(min=1e-6))
    if math.isfinite(difference) and difference > TOLERANCE[config.training.dtype]:
        raise SettingsError(
            f"training.loss={config.training.loss} is {difference:.1%} from the loss of the model's own logits: "
            f"{type(model).__name__} does more to them than its output layer, so it cannot be trained here"
        )
