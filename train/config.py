"""A whole run as dataclasses: one YAML file, its sections the fields of `RunConfig`."""

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import SchedulerType

from refreshkv.attention.look_ahead_config import LookAheadConfig
from refreshkv.config import RefreshConfig
from refreshkv.data.config import DataConfig
from refreshkv.loading import Origin
from refreshkv.ranges import COUNT, COUNT_OR_NONE, SECONDS, SEED, Range, validate_numbers
from refreshkv.settings import SettingsError
from refreshkv.simulation.distillation import DistillationConfig
from refreshkv.simulation.settings import SimulationConfig
from refreshkv.train.adapter_config import AdapterConfig
from refreshkv.train.loss import LossKind

NUMBERS = {
    "steps": COUNT,
    "global_batch": COUNT,
    "micro_batch": COUNT,
    "learning_rate": Range(0, 1000),
    "warmup_steps": COUNT_OR_NONE,
    "weight_decay": Range(0, 1000),
    "betas": Range(0, 1, below=True),
    "max_grad_norm": Range(0, 1e9),
    "seed": SEED,
    "log_every": COUNT,
    "evaluate_every": COUNT_OR_NONE,
    "evaluate_rows": COUNT,
    "evaluate_tokens": COUNT,
    "save_every": COUNT,
    "keep_checkpoints": COUNT,
    "timeout": SECONDS,
}
"""Range of the numbers of `TrainingConfig`."""


@dataclass
class ModelConfig:
    """The model to train: an existing one by `path`, or a new one from `scratch`."""

    path: str | None = None
    """Folder or Hub id of a transformers decoder."""
    revision: str | None = None
    """Branch, tag or commit of `path` on the Hub; null for its main branch."""
    trust_remote_code: bool = False
    """Run Python code that the model or its tokenizer brings along, which may do anything. Without it such a model is
    refused."""
    scratch: dict[str, Any] | None = None
    """A new model with random weights: `model_type` and the fields of its transformers configuration."""
    prompt_attention: Literal["sdpa", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """transformers' attention for prompts and for the rows of plain steps."""
    quantization: Literal["nf4"] | None = None
    """nf4: keep the weights of linear layers, except the output layer's, in 4 bits, for adapters beside them
    (`training.adapter`; needs the package bitsandbytes). null: in the run's precision."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.scratch is None):
            raise SettingsError("set either model.path (an existing model) or model.scratch (a new one)")
        if self.scratch is not None and "model_type" not in self.scratch:
            raise SettingsError("model.scratch needs a model_type, such as llama")
        if self.scratch is not None and self.revision is not None:
            raise SettingsError("model.revision means nothing with model.scratch: leave it out")

    @property
    def origin(self) -> Origin:
        """Which state of `path` is loaded, and whether its code may run."""
        return Origin(self.revision, self.trust_remote_code)


@dataclass
class TrainingConfig:
    """The optimisation and its book-keeping."""

    output: str = "runs/quickstart"
    """Folder of the run: checkpoints, tensorboard curves, the resolved config."""
    deepspeed: str = "zero2"
    """DeepSpeed JSON, a file or a name in configs/deepspeed: ZeRO stage, offload and the like. Settings of this section
    must not be repeated in it."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of the model's computation; the optimizer keeps float32 master weights."""
    steps: int = 100
    """Optimizer steps."""
    global_batch: int = 8
    """Rows per optimizer step, over all ranks."""
    micro_batch: int = 1
    """Rows per rank in one forward pass; the rest of the global batch is accumulated."""
    learning_rate: float = 5e-6
    """Peak learning rate of AdamW."""
    lr_schedule: str = "linear"
    """Learning-rate schedule, by its transformers name: linear, cosine, constant_with_warmup, ..."""
    warmup_steps: int = 20
    """Steps until the peak learning rate."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's betas."""
    loss_on: Literal["all", "answers"] = "all"
    """Tokens whose losses count: all, or only those of the answers in rows of tasks (data.path=tasks)."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    activation_checkpointing: bool | float = False
    """Recompute layers in the backward pass instead of keeping their activations: true for all layers, or a share of
    them such as 0.5, spread evenly. The fewer are recomputed, the faster a step and the more memory it needs."""
    activation_offload: bool = False
    """Keep the inputs of recomputed layers in the CPU's memory until the backward pass (with
    activation_checkpointing)."""
    adapter: AdapterConfig | None = None
    """Train adapters (LoRA) beside the model's weights, which stay as they are; null to train all weights."""
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    """adamw: two float32 moments per parameter. adamw-8bit: the same in blocks of 8 bits, a quarter of the memory (GPUs
    only; needs the package bitsandbytes)."""
    look_ahead: LookAheadConfig | None = None
    """Train look-ahead queries beside the attention, which help to choose the small cache; null for none."""
    loss: LossKind = "chunked"
    """How the loss is computed. chunked: from the logits of some thousand positions at a time. logits: from all logits
    at once, the plain form."""
    kernels: Literal["torch", "liger"] = "torch"
    """Kernels of norms, MLP activations and rotary embeddings. torch: PyTorch's. liger: Liger's, which read and write
    memory less often (GPUs only; needs the package liger-kernel)."""
    seed: int = 0
    """Seed of the weights (model.scratch), the order of rows and the simulations."""
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = field(
        default_factory=lambda: ["tensorboard"]
    )
    """Trackers that get the values of every step, beside metrics.jsonl; each but tensorboard needs its package."""
    log_every: int = 10
    """Steps between two log lines."""
    evaluate_every: int = 0
    """Steps between two evaluations on validation rows; 0 for none."""
    evaluate_rows: int = 16
    """Validation rows of such an evaluation."""
    evaluate_tokens: int = 128
    """Last tokens of each validation row that are scored, decoded from the small cache; those before are the prompt."""
    save_every: int = 100
    """Steps between two checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; older ones are removed."""
    timeout: float = 1800.0
    """Seconds without progress (a micro-batch, a checkpoint, an evaluation) after which a job ends itself."""

    def __post_init__(self) -> None:
        validate_numbers(self, NUMBERS, "training.")
        if self.lr_schedule not in {kind.value for kind in SchedulerType}:
            known = ", ".join(kind.value for kind in SchedulerType)
            raise SettingsError(f"training.lr_schedule must be one of {known}, got {self.lr_schedule!r}")
        if not 0 <= self.activation_checkpointing <= 1:
            raise SettingsError(
                "training.activation_checkpointing must be true, false or a share of the layers from 0 to 1, got "
                f"{self.activation_checkpointing}"
            )
        if self.activation_offload and not self.activation_checkpointing:
            raise SettingsError("training.activation_offload needs training.activation_checkpointing=true")
        if len(self.betas) != 2:
            raise SettingsError(f"training.betas must be two numbers, got {self.betas}")

    @staticmethod
    def plain_values(values: dict[str, Any]) -> dict[str, Any]:
        """The settings `values`, where `schedule` stands for `lr_schedule` as in the release before, with a warning."""
        if "schedule" not in values:
            return values
        if "lr_schedule" in values:
            raise SettingsError("training.schedule is the old name of training.lr_schedule: remove it")
        warnings.warn("training.schedule is now training.lr_schedule; the next release refuses it", stacklevel=2)
        return {"lr_schedule" if key == "schedule" else key: value for key, value in values.items()}


@dataclass
class ParallelConfig:
    """How the ranks of the job share the rows of a step."""

    sequence: int = 1
    """Ranks that share each row, each with an equal part of its tokens (DeepSpeed Ulysses). It must divide the ranks,
    the row length and the attention heads."""

    def __post_init__(self) -> None:
        validate_numbers(self, {"sequence": COUNT}, "parallel.")


@dataclass
class HubConfig:
    """Uploads to the Hugging Face Hub while training goes on. An upload that fails does not stop the training."""

    repo: str | None = None
    """Model repository for evaluations and checkpoints, created if it is missing; None for no uploads."""
    private: bool = True
    """Whether a new repository is private."""
    checkpoints: bool = True
    """Upload evaluations, metrics and checkpoints (each checkpoint in a folder of its own); false leaves checkpoints
    out."""


@dataclass
class RunConfig:
    """Everything a run depends on."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(path="model"))
    data: DataConfig = field(default_factory=DataConfig)
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    """Budget, selection and score keys of the simulated steps. Together with its strides and threshold this is the
    configuration that evaluations use and that the exported model carries."""
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    hub: HubConfig = field(default_factory=HubConfig)


def current_names(values: Any) -> Any:
    """Plain values of a run that an earlier release saved -> the same run in today's names.

    Saved runs must still load, so they change without the warnings and refusals that a user's file gets.
    """
    if not isinstance(values, dict) or not isinstance(values.get("training"), dict):
        return values
    training = dict(values["training"])
    if "schedule" in training:
        training["lr_schedule"] = training.pop("schedule")
    if training.get("loss") == "liger":
        training["loss"] = "chunked"  # the same sums
    return {**values, "training": training}
