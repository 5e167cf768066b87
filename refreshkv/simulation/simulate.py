"""simulate(): the refresh pattern in any training loop, through hooks on the model.

Shapes: `B` batch rows, `T` positions, `V` vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from refreshkv.attention.enable import enable
from refreshkv.config import RefreshConfig, Simulation
from refreshkv.settings import SettingsError
from refreshkv.simulation.draw import draw_simulation
from refreshkv.simulation.positions import partial_positions
from refreshkv.simulation.settings import SimulationConfig

LOSS_CHUNK = 1024
"""Positions whose losses are computed at a time for the figures, so that float32 logits of few positions exist."""

SIMULATED: WeakSet[nn.Module] = WeakSet()
"""Models whose hooks a `TrainingSimulation` has set."""


def simulate(
    model: nn.Module, settings: SimulationConfig | None = None, seed: int = 0, refresh: RefreshConfig | None = None
) -> "TrainingSimulation":
    """Lets every training-mode forward pass of `model` simulate the refresh pattern; evaluation mode stays as it is.

    A pass draws its simulation from the seed and the number of the optimizer step alone, so all ranks and all
    micro-batches of a step agree. Each pass checks that all full-attention layers took part.

        with simulate(model, SimulationConfig(stride=[5, 10]), refresh=RefreshConfig(budget=0.125)) as simulation:
            for batch in batches:
                model(**batch, labels=batch["input_ids"]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                simulation.step()

    With transformers' `Trainer` and its subclasses: `Trainer(..., callbacks=[simulation.callback])`.

    Args:
        model: a transformers decoder, or a peft model around one, before a trainer wraps it.
        settings: what a step simulates; None for the defaults of `SimulationConfig`.
        seed: seed of the draws.
        refresh: the selection; None for the one that `model.config.refreshkv` holds. Written there.

    Raises `SettingsError` if the model cannot be refreshed or is simulated already.
    """
    return TrainingSimulation(model, settings or SimulationConfig(), seed, refresh)


@dataclass
class LossFigures:
    """Sums of losses since the last report, by the kind of position that predicts.

    They stay on the device: only `report` reads them, so that no pass waits for the device.
    """

    sums: dict[str, float | Tensor] = field(default_factory=lambda: {"full": 0.0, "partial": 0.0})
    tokens: dict[str, int | Tensor] = field(default_factory=lambda: {"full": 0, "partial": 0})
    passes: int = 0
    plain_passes: int = 0

    def report(self) -> dict[str, float]:
        """The mean losses in nats, without a kind that had no token, and the share of plain passes."""
        means = {f"loss {kind}": float(self.sums[kind] / count) for kind, count in self.tokens.items() if count}
        return {**means, "plain share": self.plain_passes / self.passes} if self.passes else {}


class TrainingSimulation:
    """What `simulate` returns. `remove()`, or the end of a `with` block, makes the model an ordinary one again."""

    def __init__(self, model: nn.Module, settings: SimulationConfig, seed: int, refresh: RefreshConfig | None):
        decoder_model = _transformers_model(model)
        if decoder_model in SIMULATED:
            raise SettingsError("this model is simulated already: call remove() of the first simulation")
        enable(decoder_model, refresh)
        self.settings, self.seed = settings, seed
        self.refresh = RefreshConfig.from_dict(decoder_model.config.refreshkv)
        self.number = 1
        """Number of the optimizer step that the next pass belongs to; the first is 1."""
        self.figures = LossFigures()
        self.model = decoder_model
        self._current: Simulation | None = None
        decoder: Any = decoder_model.base_model
        self._handles = [
            decoder.register_forward_pre_hook(self._add_simulation, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._count_losses, with_kwargs=True),
        ]
        SIMULATED.add(decoder_model)

    def __enter__(self) -> "TrainingSimulation":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def step(self) -> None:
        """Ends an optimizer step: the next pass belongs to the following one."""
        self.number += 1

    def remove(self) -> None:
        """Takes the hooks off the model. It stays enabled, and attends in full."""
        for handle in self._handles:
            handle.remove()
        SIMULATED.discard(self.model)

    @property
    def callback(self) -> TrainerCallback:
        """A callback for transformers' `Trainer`: it counts the optimizer steps, also after a resume, and adds the
        figures to the log history."""
        return _Callback(self)

    def report(self) -> dict[str, float]:
        """`loss full`, `loss partial` (nats a token) and `plain share` since the last report."""
        figures, self.figures = self.figures.report(), LossFigures()
        return figures

    def draw(self, length: int) -> Simulation | None:
        """What the current step simulates for sequences of `length` tokens; None for a plain step.

        Sequences too short for the prompt and one decoded token stay plain.
        """
        if length < 2 or (self.settings.pattern == "paper" and length <= min(self.settings.strides)):
            return None
        return draw_simulation(self.settings, self.refresh, length, self.seed, self.number)

    def _add_simulation(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the decoder, in training mode: adds the simulation to the keywords."""
        if not decoder.training or kwargs.get("simulation") is not None or kwargs.get("refresh") is not None:
            return args, kwargs
        if kwargs.get("past_key_values") is not None:
            raise ValueError("a simulated training pass takes whole sequences: pass no past_key_values")
        inputs = kwargs.get("input_ids", args[0] if args else None)
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        assert inputs is not None, "transformers refuses a call with neither"
        self._current = self.draw(inputs.shape[1])
        return args, {**kwargs, "use_cache": False, "simulation": self._current}

    def _count_losses(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """After the model, in training mode: adds the losses of its logits to the figures."""
        if not model.training:
            return
        self.figures.passes += 1
        self.figures.plain_passes += self._current is None
        labels, logits = kwargs.get("labels"), getattr(output, "logits", None)
        if labels is None or logits is None or logits.shape[1] != labels.shape[1]:
            return
        losses = _next_token_losses(logits, labels)
        counted = labels[:, 1:] != -100
        partial = partial_positions(self._current, torch.arange(labels.shape[1] - 1, device=labels.device))
        for kind, where in (("full", counted & ~partial), ("partial", counted & partial)):
            self.figures.sums[kind] += losses.double().where(where, 0.0).sum()
            self.figures.tokens[kind] += where.sum()


class _Callback(TrainerCallback):
    """Keeps a `TrainingSimulation` at the trainer's optimizer step."""

    def __init__(self, simulation: TrainingSimulation):
        self.simulation = simulation

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.simulation.number = state.global_step + 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.simulation.number = state.global_step + 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            figures = self.simulation.report()
            logs.update(figures)
            state.log_history[-1].update(figures)


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers decoder itself, or the one inside a peft model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    if not isinstance(inner, PreTrainedModel):
        raise SettingsError(
            f"simulate() takes a transformers model or a peft model around one, got {type(model).__name__}: call it "
            "before the model is wrapped"
        )
    return inner


@torch.no_grad()
def _next_token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses of the next tokens: logits (B, T, V), labels (B, T) -> (B, T - 1) float32, 0 where the label is -100."""
    parts = []
    for start in range(0, labels.shape[1] - 1, LOSS_CHUNK):
        targets = labels[:, start + 1 : start + 1 + LOSS_CHUNK]
        chunk = logits[:, start : start + targets.shape[1]].float()
        parts.append(F.cross_entropy(chunk.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets))
    return torch.cat(parts, dim=1)
