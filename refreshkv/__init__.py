"""RefreshKV: decode from a small KV cache that a full attention step refreshes now and then, and train for it."""

from refreshkv.cache import RefreshCache
from refreshkv.compilation import tuned_compilation
from refreshkv.config import NEVER, RefreshConfig, Simulation
from refreshkv.decoding import decode_ahead
from refreshkv.modeling import enable

__all__ = ["NEVER", "RefreshCache", "RefreshConfig", "Simulation", "decode_ahead", "enable", "tuned_compilation"]
