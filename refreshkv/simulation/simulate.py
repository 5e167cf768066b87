"""simulate(): the refresh pattern in any training loop, through hooks on the model.

Shapes: `B` batch rows, `T` positions, `V` vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from refreshkv.attention.enable import enable
from refreshkv.attention.look_ahead import ensure_look_ahead, freeze_model, mean_divergence
from refreshkv.attention.look_ahead_config import LookAheadConfig
from refreshkv.cache.keyword import given_cache
from refreshkv.config import RefreshConfig, Simulation, Trace
from refreshkv.settings import SettingsError
from refreshkv.simulation.distillation import DistillationConfig, divergence, without_dropout
from refreshkv.simulation.draw import draw_simulation, fitted
from refreshkv.simulation.positions import decoded_positions, partial_positions
from refreshkv.simulation.settings import SimulationConfig

LOSS_CHUNK = 1024
"""Positions whose losses are computed at a time for the figures, to bound the memory of float32 logits."""

KINDS = ("loss full", "loss partial", "divergence", "look-ahead divergence")
"""Names of the figures. Each is a mean over predicted tokens, the last one over passes."""

LOSS_KEYWORDS = ("num_items_in_batch", "shift_labels")
"""Keywords of a model's call that only its loss uses."""

SIMULATED: WeakSet[nn.Module] = WeakSet()
"""Models whose hooks a `TrainingSimulation` has set."""


def simulate(
    model: nn.Module,
    settings: SimulationConfig | None = None,
    seed: int = 0,
    refresh: RefreshConfig | None = None,
    distillation: DistillationConfig | None = None,
    look_ahead: LookAheadConfig | None = None,
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
        distillation: adds the divergence from the model's own full-attention predictions to the loss that the model
            returns, at the cost of one more forward pass; the call then needs `labels`. None: no distillation.
        look_ahead: adds look-ahead queries to the model, unless it has some of this shape, and adds the divergence of
            their scores to the loss that the model returns. Call this before the optimizer is made, and save with
            `save_look_ahead`. None: no look-ahead.

    Raises `SettingsError` if the model cannot be refreshed or is simulated already.
    """
    return TrainingSimulation(model, settings or SimulationConfig(), seed, refresh, distillation, look_ahead)


@dataclass
class LossFigures:
    """Sums of losses since the last report, by the kind of position that predicts.

    They stay on the device, so that no pass waits for it; only `report` reads them.
    """

    sums: dict[str, float | Tensor] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    tokens: dict[str, int | Tensor] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    passes: int = 0
    plain_passes: int = 0

    def add(self, kind: str, values: Tensor, where: Tensor) -> None:
        """Adds the `values` where `where` is True; both have the same shape."""
        self.sums[kind] += values.detach().double().where(where, 0.0).sum()
        self.tokens[kind] += where.sum()

    def sum_over_ranks(self, device: torch.device) -> None:
        """Sums the figures over all ranks; every rank must call this. device: where their process group computes the
        sum."""
        values = [*self.sums.values(), *self.tokens.values(), self.passes, self.plain_passes]
        kind = torch.float32 if device.type == "mps" else torch.float64
        totals = torch.stack([torch.as_tensor(value, dtype=kind, device=device) for value in values])
        dist.all_reduce(totals)
        *parts, passes, plain_passes = totals.tolist()
        self.sums = dict(zip(KINDS, parts[: len(KINDS)], strict=True))
        self.tokens = {kind: int(count) for kind, count in zip(KINDS, parts[len(KINDS) :], strict=True)}
        self.passes, self.plain_passes = int(passes), int(plain_passes)

    def report(self) -> dict[str, float]:
        """The mean losses in nats, except of kinds without a token, and the share of plain passes."""
        means = {kind: float(self.sums[kind] / count) for kind, count in self.tokens.items() if count}
        return {**means, "plain share": self.plain_passes / self.passes} if self.passes else {}


class TrainingSimulation:
    """A model's simulation in training, made by `simulate`. After `remove()`, or after its `with` block, no pass
    simulates."""

    def __init__(
        self,
        model: nn.Module,
        settings: SimulationConfig,
        seed: int,
        refresh: RefreshConfig | None,
        distillation: DistillationConfig | None = None,
        look_ahead: LookAheadConfig | None = None,
    ):
        decoder_model = _transformers_model(model)
        if decoder_model in SIMULATED:
            raise SettingsError("this model is simulated already: call remove() of the first simulation")
        if look_ahead is not None and decoder_model is not model:
            raise SettingsError("simulate(look_ahead=...) with adapters is not supported: leave one of them out")
        enable(decoder_model, refresh)
        self.frozen: list[nn.Parameter] = []
        """Parameters that `remove` unfreezes."""
        self.look_ahead = look_ahead
        if look_ahead is not None:
            ensure_look_ahead(decoder_model, look_ahead, seed)
            self.frozen = freeze_model(decoder_model) if look_ahead.freeze_model else []
        self.settings, self.seed = settings, seed
        self.distillation = distillation or DistillationConfig()
        self.refresh = RefreshConfig.from_dict(decoder_model.config.refreshkv)
        self.number = 1
        """Number of the optimizer step that the next pass belongs to; the first is 1."""
        self.figures = LossFigures()
        self.model = decoder_model
        self._current: Simulation | None = None
        self._trace: Trace | None = None
        self._is_teaching = False
        self._is_removed = False
        self._is_unfinished = False
        """Whether the decoder was called and the model's hook has not run since."""
        self._decoder: Any = decoder_model.base_model
        self._decoder_handle = self._decoder.register_forward_pre_hook(
            self._add_simulation, with_kwargs=True, prepend=True
        )
        self._outer = model
        self._outer_handle = model.register_forward_hook(self._after_model, with_kwargs=True, always_call=True)
        SIMULATED.add(decoder_model)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TrainingSimulation":
        """The hooks of a copied model refer to this object; they do nothing in passes of the copy."""
        return self

    def __enter__(self) -> "TrainingSimulation":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def step(self) -> None:
        """Ends an optimizer step: the next pass belongs to the following one."""
        self._end_step(self.number + 1)

    def _end_step(self, number: int) -> None:
        """Continues with the optimizer step `number`; refuses if passes of this step left out the distillation."""
        if self.distillation.weight and self._is_unfinished:
            raise SettingsError(
                "simulate(distillation=...) was left out of this step, because only a part of the model was called, "
                "or its `forward`, past its hooks: call the model that simulate() was given"
            )
        self.number = number

    def remove(self) -> None:
        """Removes the hooks. The model stays enabled, keeps its look-ahead queries, and uses full attention in calls
        without a simulation; `model.set_attn_implementation("sdpa")` replaces that attention too."""
        if self._is_removed:
            return
        self._is_removed = True
        self._decoder_handle.remove()
        self._outer_handle.remove()
        for part in self.frozen:
            part.requires_grad_(True)
        SIMULATED.discard(self.model)

    @property
    def callback(self) -> TrainerCallback:
        """A callback for transformers' `Trainer`: it counts the optimizer steps, also after a resume, and adds the
        figures of all ranks to the log history."""
        return _Callback(self)

    def report(self) -> dict[str, float]:
        """`loss full`, `loss partial`, `divergence`, `look-ahead divergence` (in nats) and `plain share` of this rank
        since the last report; the callback's figures are those of all ranks."""
        figures, self.figures = self.figures.report(), LossFigures()
        return figures

    def draw(self, length: int, padding: int = 0) -> Simulation | None:
        """Draws what the current step simulates for sequences of `length` tokens; None for a plain step.

        padding: padded columns of the shortest batch row; the prompt ends behind them. A batch whose shortest row has
        no room for a prompt and one decoded token gets a plain pass.
        """
        settings = fitted(self.settings, length, padding, self.seed, self.number)
        if settings is None:
            return None
        return draw_simulation(settings, self.refresh, length, self.seed, self.number)

    def _add_simulation(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the decoder, in training mode: adds the simulation to the keywords."""
        if getattr(decoder, "_is_replica", False):
            raise SettingsError(
                "simulate() does not work under torch.nn.DataParallel, which Trainer uses for several GPUs in one "
                "process: start one process a GPU (torchrun or accelerate launch), or set CUDA_VISIBLE_DEVICES=0"
            )
        if self._is_teaching or decoder is not self._decoder or not decoder.training or _is_given(kwargs):
            return args, kwargs
        if given_cache(kwargs) is not None:
            raise ValueError("a simulated training pass takes whole sequences: pass no cache")
        inputs = kwargs.get("input_ids", args[0] if args else None)
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        assert inputs is not None, "transformers refuses a call with neither"
        self._current = self.draw(inputs.shape[1], _most_padding(kwargs.get("attention_mask")))
        self._is_unfinished = self._current is not None
        added: dict[str, Any] = {"use_cache": False, "simulation": self._current}
        if self.look_ahead is not None:
            trace: Trace = kwargs.get("trace") or Trace()
            trace.measured_steps = self.look_ahead.measured_steps
            trace.look_ahead_divergences.clear()
            self._trace = added["trace"] = trace
        return args, {**kwargs, **added}

    def _after_model(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """After the model, in training mode: counts the losses of its logits, and distils."""
        if self._is_teaching or model is not self._outer or not model.training:
            return None
        self._is_unfinished = False
        if output is None:  # an error ended the pass
            return None
        self.figures.passes += 1
        self.figures.plain_passes += self._current is None
        labels: Any = kwargs.get("labels")
        logits: Any = getattr(output, "logits", None)
        has_logits = labels is not None and logits is not None and logits.shape[1] == labels.shape[1]
        if self.distillation.weight and self._current is not None:
            if not has_logits or output.loss is None:
                raise SettingsError(
                    "simulate(distillation=...) adds to the loss that the model returns: pass labels= to the model, "
                    "and let it return its logits (no loss of the trainer's own, no fused loss)"
                )
            assert logits is not None
            output.loss = output.loss + self._distillation_loss(args, kwargs, logits)
        if self.look_ahead is not None:
            self._add_look_ahead_loss(output, labels, kwargs)
        log_probs = getattr(output, "log_probs", None)
        if has_logits:
            assert labels is not None and logits is not None
            self._count_losses(_next_token_losses(logits, labels), labels)
        elif labels is not None and log_probs is not None and log_probs.shape == labels[:, 1:].shape:
            self._count_losses(-log_probs, labels)  # TRL's output layer, which returns no logits
        return output

    def _add_look_ahead_loss(self, output: Any, labels: Tensor | None, kwargs: dict[str, Any]) -> None:
        """Adds the weighted divergence of the look-ahead queries' scores to the model's loss. If the loss is divided by
        the tokens of several passes, the divergence is multiplied by this pass's share of them."""
        assert self.look_ahead is not None and self._trace is not None
        if labels is None or getattr(output, "loss", None) is None:
            raise SettingsError(
                "simulate(look_ahead=...) adds to the loss that the model returns: pass labels= to the model (no loss "
                "of the trainer's own)"
            )
        found = mean_divergence(self.model, self._trace)
        if self._current is not None:
            self.figures.add("look-ahead divergence", found, torch.ones_like(found, dtype=torch.bool))
        tokens = kwargs.get("num_items_in_batch")
        share = 1.0 if tokens is None else (labels[:, 1:] != -100).sum() / tokens
        output.loss = output.loss + self.look_ahead.weight * share * found

    def _count_losses(self, losses: Tensor, labels: Tensor) -> None:
        """Adds the losses (B, T - 1) of labels (B, T) to the figures."""
        counted = labels[:, 1:] != -100
        partial = partial_positions(self._current, _predicting(labels))
        self.figures.add("loss full", losses, counted & ~partial)
        self.figures.add("loss partial", losses, counted & partial)

    def _distillation_loss(self, args: tuple, kwargs: dict[str, Any], logits: Tensor) -> Tensor:
        """The weighted divergences of the decoded tokens from a pass with full attention, divided by the number of
        tokens that the model's loss is divided by: logits (B, T, V) -> scalar."""
        inputs = {name: value for name, value in kwargs.items() if name not in ("labels", *LOSS_KEYWORDS)}
        self._is_teaching = True
        try:
            with torch.no_grad(), without_dropout(self.model):
                teacher = self.model(*args, **{**inputs, "use_cache": False}).logits
        finally:
            self._is_teaching = False
        counted = kwargs["labels"][:, 1:] != -100
        decoded = decoded_positions(self._current, _predicting(kwargs["labels"]))
        where = (counted & decoded).nonzero(as_tuple=True)
        kind = torch.promote_types(logits.dtype, torch.float32)
        found = divergence(logits[where].to(kind), teacher[where].to(kind), self.distillation.temperature)
        self.figures.add("divergence", found, torch.ones_like(found, dtype=torch.bool))
        tokens = kwargs.get("num_items_in_batch")
        return self.distillation.weight * found.sum() / (counted.sum().clamp(min=1) if tokens is None else tokens)


class _Callback(TrainerCallback):
    """Keeps a `TrainingSimulation` at the trainer's optimizer step."""

    def __init__(self, simulation: TrainingSimulation):
        self.simulation = simulation

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.simulation.number = state.global_step + 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.simulation._end_step(state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            if dist.is_initialized() and dist.get_world_size() > 1:  # every rank logs
                self.simulation.figures.sum_over_ranks(args.device)
            figures = self.simulation.report()
            logs.update(figures)
            state.log_history[-1].update(figures)


def _is_given(kwargs: dict[str, Any]) -> bool:
    """Whether the caller has handed in a simulation of its own."""
    return kwargs.get("simulation") is not None or kwargs.get("refresh") is not None


def _most_padding(mask: Any) -> int:
    """The padding of the shortest batch row, from an attention mask (B, T); 0 without one."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return 0
    return int((mask == 0).sum(dim=1).max())


def _predicting(labels: Tensor) -> Tensor:
    """The positions that predict a label: labels (B, T) -> (T - 1,)."""
    return torch.arange(labels.shape[1] - 1, device=labels.device)


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
