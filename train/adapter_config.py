"""The settings of adapters (LoRA): which small weights are trained beside the model's own."""

from dataclasses import dataclass, field

from refreshkv.ranges import COUNT, Range, validate_numbers
from refreshkv.settings import SettingsError


@dataclass
class AdapterConfig:
    """Two low-rank matrices beside each linear layer (LoRA, by the package peft); the model's own weights stay."""

    rank: int = 16
    """Rank of the two matrices of a layer."""
    alpha: float = 32.0
    """What the adapters compute is multiplied by alpha / rank."""
    targets: list[str] | None = None
    """Linear layers that get adapters, by the last part of their names, such as q_proj; null for all of them except the
    output layer."""
    dropout: float = 0.0
    """Share of a layer's inputs that its adapter does not see in a step."""
    also_train: list[str] = field(default_factory=list)
    """Modules whose own weights are trained whole, by the end of their names: embed_tokens, and norm for all norms
    whose names end so."""

    def __post_init__(self) -> None:
        name = "training.adapter."
        validate_numbers(self, {"rank": COUNT, "alpha": Range(1e-6, 1e6), "dropout": Range(0, 1, below=True)}, name)
        if self.targets is not None and not self.targets:
            raise SettingsError(
                f"{name}targets is empty: name layers such as [q_proj, v_proj], or write null for all linear layers"
            )
        for setting in ("targets", "also_train"):
            if any(not part for part in getattr(self, setting) or []):
                raise SettingsError(f"{name}{setting} has an empty name: name layers by the last part of their names")
