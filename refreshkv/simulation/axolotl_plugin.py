"""The refresh pattern in axolotl: `plugins: [refreshkv.simulation.axolotl_plugin.RefreshPlugin]` in its YAML file.

The section `refreshkv` there holds `simulation`, `refresh` and `distillation`, as our own YAML files do, and `seed`.
"""

from dataclasses import dataclass, field
from typing import Any

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel

from refreshkv.config import RefreshConfig
from refreshkv.settings import SettingsError, settings_from_dict
from refreshkv.simulation.distillation import DistillationConfig
from refreshkv.simulation.padding import LeftPadding
from refreshkv.simulation.settings import SimulationConfig
from refreshkv.simulation.simulate import TrainingSimulation, simulate

PACKING = (
    "sample_packing",
    "eval_sample_packing",
    "pretraining_sample_concatenation",
    "batch_flattening",
    "dpo_padding_free",
)
"""Settings of axolotl that put several sequences into a row."""

COLLATORS = ("data_collator", "eval_data_collator", "bench_data_collator")
"""Attributes of axolotl's trainers that hold a collator: for training, evaluation and its benchmarks."""


@dataclass
class SectionConfig:
    """The section `refreshkv` of axolotl's YAML file."""

    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    """What each step simulates."""
    refresh: RefreshConfig | None = None
    """The selection; None for the one that the model's configuration holds."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """Trains the small cache's predictions towards those of full attention."""
    seed: int | None = None
    """Seed of the draws; None for axolotl's `seed`."""


class RefreshArgs(BaseModel):
    """The section that the plugin adds to axolotl's settings."""

    refreshkv: dict[str, Any] | None = None


class RefreshPlugin(BasePlugin):
    """Simulates the refresh pattern in every training pass of axolotl's trainers that compute the model's own loss."""

    simulation: TrainingSimulation | None = None

    def get_input_args(self) -> str:
        """The name of the class with the plugin's settings."""
        return f"{__name__}.{RefreshArgs.__name__}"

    def pre_model_load(self, cfg: Any) -> None:
        """Refuses settings that cannot be simulated, before anything is loaded."""
        for name in PACKING:
            if value := cfg.get(name):
                raise SettingsError(
                    f"{name}: {str(value).lower()} puts several sequences into a row, which would see each other in "
                    f"the simulation: set {name}: false"
                )
        _section(cfg)

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Begins the simulation, after adapters have been put into the model."""
        section = _section(cfg)
        seed = cfg.get("seed") or 0 if section.seed is None else section.seed
        distillation = section.distillation if section.distillation.weight else None
        self.simulation = simulate(model, section.simulation, seed, section.refresh, distillation)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Gives the trainer the callback that counts its steps, and moves its batches' padding to the left."""
        if self.simulation is None:
            return []
        for name in COLLATORS:
            if (collator := getattr(trainer, name, None)) is not None:
                setattr(trainer, name, LeftPadding(collator))
        return [self.simulation.callback]

    def post_train(self, cfg: Any, model: Any) -> None:
        """Ends the simulation."""
        if self.simulation is not None:
            self.simulation.remove()
            self.simulation = None


def _section(cfg: Any) -> SectionConfig:
    """The settings of the plugin, from axolotl's."""
    return settings_from_dict(SectionConfig, dict(cfg.get("refreshkv") or {}), "refreshkv.")
