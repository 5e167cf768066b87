"""RefreshKV: decode from a small KV cache that a full attention step refreshes now and then, and train for it."""

from refreshkv.attention.enable import enable
from refreshkv.cache.refresh import RefreshCache
from refreshkv.config import NEVER, RefreshConfig, Simulation
from refreshkv.generation.compilation import tuned_compilation
from refreshkv.generation.decode_ahead import decode_ahead

__all__ = ["NEVER", "RefreshCache", "RefreshConfig", "Simulation", "decode_ahead", "enable", "tuned_compilation"]
