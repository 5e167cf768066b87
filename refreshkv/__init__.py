"""RefreshKV: decode from a small KV cache that a full attention step refreshes now and then, and train for it.

A public name is imported when it is first used, so that `refreshkv --help` does not wait for torch and transformers.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refreshkv.attention.enable import enable
    from refreshkv.attention.look_ahead import add_look_ahead, remove_look_ahead
    from refreshkv.attention.look_ahead_config import LookAheadConfig
    from refreshkv.attention.look_ahead_file import load_look_ahead, save_look_ahead
    from refreshkv.cache.refresh import RefreshCache
    from refreshkv.config import NEVER, RefreshConfig, Simulation, Trace
    from refreshkv.generation.compilation import tuned_compilation
    from refreshkv.generation.decode_ahead import decode_ahead
    from refreshkv.generation.generate import generate
    from refreshkv.generation.lossless import DraftCounts, decode_lossless
    from refreshkv.settings import SettingsError
    from refreshkv.simulation.distillation import DistillationConfig
    from refreshkv.simulation.settings import SimulationConfig
    from refreshkv.simulation.simulate import simulate

try:
    __version__ = version("refreshkv")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "NEVER",
    "DistillationConfig",
    "DraftCounts",
    "LookAheadConfig",
    "RefreshCache",
    "RefreshConfig",
    "SettingsError",
    "Simulation",
    "SimulationConfig",
    "Trace",
    "__version__",
    "add_look_ahead",
    "decode_ahead",
    "decode_lossless",
    "enable",
    "generate",
    "load_look_ahead",
    "remove_look_ahead",
    "save_look_ahead",
    "simulate",
    "tuned_compilation",
]

_MODULES = {
    "DistillationConfig": "refreshkv.simulation.distillation",
    "DraftCounts": "refreshkv.generation.lossless",
    "LookAheadConfig": "refreshkv.attention.look_ahead_config",
    "NEVER": "refreshkv.config",
    "RefreshCache": "refreshkv.cache.refresh",
    "RefreshConfig": "refreshkv.config",
    "SettingsError": "refreshkv.settings",
    "Simulation": "refreshkv.config",
    "SimulationConfig": "refreshkv.simulation.settings",
    "Trace": "refreshkv.config",
    "add_look_ahead": "refreshkv.attention.look_ahead",
    "decode_ahead": "refreshkv.generation.decode_ahead",
    "decode_lossless": "refreshkv.generation.lossless",
    "enable": "refreshkv.attention.enable",
    "generate": "refreshkv.generation.generate",
    "load_look_ahead": "refreshkv.attention.look_ahead_file",
    "remove_look_ahead": "refreshkv.attention.look_ahead",
    "save_look_ahead": "refreshkv.attention.look_ahead_file",
    "simulate": "refreshkv.simulation.simulate",
    "tuned_compilation": "refreshkv.generation.compilation",
}


def __getattr__(name: str) -> Any:
    """Imports a public name from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module 'refreshkv' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_MODULES[name]), name)
    return value
