"""Notices logits that are not numbers while a text is generated: the likeliest of them would be any token."""

import torch
from torch import Tensor
from transformers import LogitsProcessor

from refreshkv.settings import SettingsError


class FiniteLogits(LogitsProcessor):
    """A logits processor that changes nothing, and refuses a model that computes nan.

    The first logits are read at once, for the host waits for the first token anyway; the others' flag stays on the
    device until `validate`.

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
