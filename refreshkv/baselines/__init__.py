"""Other ways to decode, in the same loop and through the same kernels, for comparison: one method, one file.

refreshkv.enable(model, config)
model.generate(..., past_key_values=SnapKVCache(model.config, max_cache_len, budget=0.125))
"""

from refreshkv.baselines.ablation import AblationCache
from refreshkv.baselines.cascading import CascadingCache
from refreshkv.baselines.full import FullCache
from refreshkv.baselines.h2o import H2OCache
from refreshkv.baselines.less import LessCache
from refreshkv.baselines.snapkv import SnapKVCache
from refreshkv.baselines.streaming import StreamingCache

__all__ = ["AblationCache", "CascadingCache", "FullCache", "H2OCache", "LessCache", "SnapKVCache", "StreamingCache"]
