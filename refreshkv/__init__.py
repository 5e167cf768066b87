"""RefreshKV: decode from a small KV cache that a full attention step refreshes now and then, and train for it."""

from importlib.metadata import PackageNotFoundError, version

from refreshkv.attention.enable import enable
from refreshkv.cache.refresh import RefreshCache
from refreshkv.config import NEVER, RefreshConfig, Simulation, Trace
from refreshkv.generation.compilation import tuned_compilation
from refreshkv.generation.decode_ahead import decode_ahead
from refreshkv.settings import SettingsError

try:
    __version__ = version("refreshkv")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "NEVER",
    "RefreshCache",
    "RefreshConfig",
    "SettingsError",
    "Simulation",
    "Trace",
    "__version__",
    "decode_ahead",
    "enable",
    "tuned_compilation",
]
