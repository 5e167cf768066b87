"""Next-token loss, in total and by the kind of position that predicts (full or partial), and the self-distillation.

Shapes: `B` batch rows, `T` positions, `N` positions whose losses count, `M` of these that have a teacher, `E` hidden
size, `V` vocabulary.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from refreshkv.attention.look_ahead import mean_divergence
from refreshkv.attention.look_ahead_config import LookAheadConfig
from refreshkv.config import Simulation, Trace
from refreshkv.settings import SettingsError
from refreshkv.simulation.distillation import DistillationConfig, divergence, without_dropout
from refreshkv.train.chunked_loss import ChunkedLoss, capped, logit_softcap
from refreshkv.train.experts import router_loss, router_loss_weight, validate_router_loss
from refreshkv.train.frozen import drop_frozen

LossKind = Literal["chunked", "logits"]

POSTPROCESSED = (
    "logits_scaling", "logit_scale", "output_multiplier_scale", "output_multiplier", "lm_head_multiplier",
    "logits_soft_cap",
)  # fmt: skip
"""Configuration fields of models that change the logits after the output layer, and that the loss does not follow."""


class LossSums(NamedTuple):
    """Sums over tokens, float32 scalars. Averages are taken once the sums of all ranks are known."""

    objective: Tensor
    """What is minimised, the only differentiable one: the losses plus the weighted divergences of a distillation and
    the routers' weighted load-balancing loss times the number of tokens."""
    total: Tensor
    """Next-token losses."""
    tokens: Tensor
    partial: Tensor
    partial_tokens: Tensor
    divergence: Tensor
    """Divergences from the full-attention pass, over the tokens after the prompt."""
    divergence_tokens: Tensor
    look_ahead: Tensor
    """The mean divergence of the look-ahead queries' scores times the number of tokens; 0 without any."""


class CausalLossModel(nn.Module):
    """A causal language model that returns `LossSums` when it is given targets; this is what the engine trains.

    Its children are the modules of `model` under their own names, so parameters, checkpoints and exports have the names
    of the plain model. `model` itself is `causal_lm`: it computes logits with the same weights, in evaluations too.
    Only its output layer is exchanged, for a `LossHead` with the same parameters.

    Args:
        model: a transformers decoder after `refreshkv.enable`.
        kind: how the sums are computed (`TrainingConfig.loss`).
        distillation: adds the divergence from a full-attention pass; None for none.
        look_ahead: adds the divergence of the scores of the look-ahead queries that `model` has; None for none.

    Raises `SettingsError` if the logits of `model` are not the output of one linear layer, or its output bounded by
    `final_logit_softcapping`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kind: LossKind,
        distillation: DistillationConfig | None = None,
        look_ahead: LookAheadConfig | None = None,
    ):
        super().__init__()
        validate_output_layer(model)
        validate_router_loss(model)
        self.distillation, self.look_ahead = distillation or DistillationConfig(), look_ahead
        layer = model.get_output_embeddings()
        assert layer is not None  # it has been validated
        model.set_output_embeddings(LossHead(layer, kind, self.distillation, logit_softcap(model.config)))
        self._causal_lm = (model,)  # in a tuple, since as a child it would put its own name before all others
        for name, child in model.named_children():
            self.add_module(name, child)
        self.has_frozen = any(not part.requires_grad for part in self.parameters())
        """Whether some weights are not trained; they are no part of `state_dict` then."""
        if look_ahead is not None:  # its checkpoints are whole, also beside a frozen model
            self.has_frozen = False
        if self.has_frozen:
            self.register_state_dict_post_hook(drop_frozen)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model."""
        return self._causal_lm[0]

    @property
    def config(self) -> PretrainedConfig:
        """Configuration of the transformers model, which an evaluation reads."""
        return self.causal_lm.config

    @property
    def device(self) -> torch.device:
        """Device of the transformers model, which an evaluation reads."""
        return self.causal_lm.device

    def get_input_embeddings(self) -> nn.Module:
        """The transformers model's embeddings of tokens, which an evaluation reads the vocabulary's size from."""
        return self.causal_lm.get_input_embeddings()

    def train(self, mode: bool = True) -> "CausalLossModel":
        """Sets training mode here and in the transformers model, whose own flag no child shares."""
        self.causal_lm.training = mode
        return super().train(mode)

    def forward(self, *args: Any, targets: Tensor | None = None, **inputs: Any) -> Any:
        """The transformers model's own output without `targets`, else `LossSums` as a plain tuple.

        targets: (B, T) int64, each position's next token. inputs: with targets, those of `Batch.model_arguments`.
        """
        return self.causal_lm(*args, **inputs) if targets is None else self._loss_sums(targets, **inputs)

    def _loss_sums(
        self,
        targets: Tensor,
        simulation: Simulation | None,
        trace: Trace | None,
        counted: Tensor,
        partial: Tensor,
        decoded: Tensor,
        **inputs: Any,
    ) -> tuple[Tensor, ...]:
        teacher = None
        if self.distillation.weight and simulation is not None:
            with torch.no_grad(), without_dropout(self.causal_lm):
                teacher = self._hidden_states(inputs, None, None)
        if self.look_ahead is not None:
            trace = trace or Trace()
            trace.measured_steps = self.look_ahead.measured_steps
            trace.look_ahead_divergences.clear()
        hidden, routers = self._hidden_states_and_router_loss(inputs, simulation, trace)
        head = self.causal_lm.get_output_embeddings()
        assert head is not None
        sums = LossSums(*head(hidden, targets, counted=counted, partial=partial, decoded=decoded, teacher=teacher))
        if routers is not None:  # a mean over tokens, like the losses once they are divided by all tokens
            sums = sums._replace(objective=sums.objective + routers * sums.tokens)
        if self.look_ahead is not None and trace is not None:  # likewise
            found = mean_divergence(self.causal_lm, trace)
            objective = sums.objective + self.look_ahead.weight * found * sums.tokens
            sums = sums._replace(objective=objective, look_ahead=found.detach() * sums.tokens)
        return tuple(sums)

    def _hidden_states_and_router_loss(
        self, inputs: dict[str, Any], simulation: Simulation | None, trace: Trace | None
    ) -> tuple[Tensor, Tensor | None]:
        """Last hidden states (B, T, E), and in training the routers' weighted load-balancing loss, None without one."""
        weight = router_loss_weight(self.config)
        if not weight or not self.training:
            return self._hidden_states(inputs, simulation, trace), None
        outputs = self.causal_lm.base_model(**inputs, simulation=simulation, trace=trace, output_router_logits=True)
        loss = router_loss(self.causal_lm, outputs.router_logits, inputs.get("attention_mask"))
        return outputs.last_hidden_state, weight * loss

    def _hidden_states(self, inputs: dict[str, Any], simulation: Simulation | None, trace: Trace | None) -> Tensor:
        """Last hidden states (B, T, E), before the output layer."""
        return self.causal_lm.base_model(**inputs, simulation=simulation, trace=trace).last_hidden_state


def validate_output_layer(model: PreTrainedModel) -> None:
    """Raises `SettingsError` unless the logits are what one linear layer, with a softcap or without, makes of the last
    hidden states."""
    decoder, layer = model.config.get_text_config(decoder=True), model.get_output_embeddings()
    changed = [name for name in POSTPROCESSED if getattr(decoder, name, None) not in (None, 1, 1.0)]
    reason = None
    if changed:
        reason = f"config.{changed[0]} changes its logits"
    elif type(layer) is not nn.Linear:
        reason = "its output layer is not linear"
    elif model.base_model is model:
        reason = "transformers names no decoder within it"
    elif not _weights(model) <= _weights(model.base_model) | _weights(layer):
        reason = "it has weights of its own beside its decoder and its output layer"
    if reason:
        raise SettingsError(f"training: losses of {type(model).__name__} cannot be computed here: {reason}")


def _weights(module: nn.Module) -> set[Tensor]:
    """The parameters and buffers of a module."""
    return {*module.parameters(), *module.buffers()}


class LossHead(nn.Linear):
    """An output layer that returns logits, or, given targets, the sums of their losses.

    The loss is computed inside the layer's own forward pass because ZeRO 3 gathers its weight there and only there.

    layer: the output layer whose weight and bias this one takes over. softcap: bound of the losses' logits (Gemma 2);
    without targets the model applies it itself.
    """

    def __init__(
        self, layer: nn.Linear, kind: LossKind, distillation: DistillationConfig, softcap: float | None = None
    ):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.training, self.kind, self.distillation, self.softcap = layer.training, kind, distillation, softcap

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        counted: Tensor | None = None,
        partial: Tensor | None = None,
        decoded: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> Any:
        """Logits (B, T, V) of `hidden` (B, T, E) without targets, else `LossSums` as a plain tuple.

        Args:
            targets: (B, T) int64.
            counted: (N,) int64, the positions in the flattened (B, T) whose losses count. Their indices and not a mask:
                the host would have to wait for the device to learn how many a mask has.
            partial: (B, T) bool, which positions predict from the small cache.
            decoded: (B, T) bool, which positions come after the prompt.
            teacher: (B, T, E), the hidden states of the full-attention pass; None without distillation.
        """
        if targets is None:
            return super().forward(hidden)
        assert counted is not None and partial is not None and decoded is not None
        hidden, targets, partial, decoded = (
            part.flatten(0, 1).index_select(0, counted) for part in (hidden, targets, partial, decoded)
        )
        teacher_rows = None
        if teacher is not None:
            teacher_rows = decoded.nonzero().squeeze(1)
            teacher = teacher.flatten(0, 1).index_select(0, counted[teacher_rows])
        objective, losses, divergences = self._losses(hidden, targets, teacher, teacher_rows)
        return tuple(_sums(objective, losses.detach(), partial, divergences.detach()))

    def _losses(
        self, hidden: Tensor, targets: Tensor, teacher: Tensor | None, teacher_rows: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The objective, each loss (N,) and each divergence (M,)."""
        if self.kind == "chunked":
            known = (targets, teacher, teacher_rows, self.distillation, self.softcap)
            return ChunkedLoss.apply(hidden, self.weight, self.bias, *known)
        logits = capped(_at_least_float(super().forward(hidden)), self.softcap)
        losses, divergences = F.cross_entropy(logits, targets, reduction="none"), logits.new_zeros(0)
        if teacher is not None:
            assert teacher_rows is not None
            teacher_logits = capped(_at_least_float(super().forward(teacher)), self.softcap).detach()
            divergences = divergence(logits[teacher_rows], teacher_logits, self.distillation.temperature)
        return losses.sum() + self.distillation.weight * divergences.sum(), losses, divergences


def _sums(objective: Tensor, losses: Tensor, partial: Tensor, divergences: Tensor) -> LossSums:
    losses, divergences = losses.float(), divergences.float()
    tokens, divergence_tokens = (values.new_full((), len(values)) for values in (losses, divergences))
    parts = losses.where(partial, 0.0).sum(), partial.sum().float()
    return LossSums(objective, losses.sum(), tokens, *parts, divergences.sum(), divergence_tokens, tokens * 0.0)


def _at_least_float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
