"""Detects nan logits during generation, where the likeliest token would be an arbitrary one."""

import torch
from torch import Tensor
from transformers import LogitsProcessor

from refreshkv.settings import SettingsError


class FiniteLogits(LogitsProcessor):
    """A logits processor that changes nothing, and raises an error for nan.

    It checks the first logits at once, because the host waits for the first token anyway. For later logits a flag stays
    on the device until `validate` reads it.

    Args:
        setting: names the model's setting in errors.
    """

    def __init__(self, setting: str) -> None:
        self._setting = setting
        self._found: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        found = torch.isnan(scores).any()
        if self._found is None:
            self._found = found
            self.validate()
        self._found = self._found | found
        return scores

    def validate(self) -> None:
        """Raises `SettingsError` if any logit so far was not a number. Waits for the device."""
        if self._found is not None and bool(self._found):
            raise SettingsError(
                f"{self._setting}: its logits are not numbers (nan), so there is no likeliest token; try --dtype "
                "float32, and see whether its weights are sound"
            )
