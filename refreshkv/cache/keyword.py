"""The keyword under which transformers hands on a cache: `cache` since 5.24, `past_key_values` in earlier releases."""

import inspect
from collections.abc import Mapping
from typing import Any

from transformers.masking_utils import create_causal_mask

CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""The installed release's name."""


def given_cache(keywords: Mapping[str, Any]) -> Any:
    """The cache among a call's keywords, under either name; None without one."""
    cache = keywords.get(CACHE_NAME)
    return keywords.get("past_key_values") if cache is None else cache


def as_keyword(cache: Any) -> dict[str, Any]:
    """The cache under the installed release's name, for a call or an output."""
    return {CACHE_NAME: cache}
