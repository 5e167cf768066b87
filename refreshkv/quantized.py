"""Checkpoints whose weights are quantized, as transformers loads them: what they are, and their bytes.

Of bitsandbytes' and torchao's formats the weights stay in few bits; FP8 and MXFP4 become ordinary weights where no GPU
computes with them. A format whose package is missing is refused by the loader.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

FOUR_BITS = ("nf4", "fp4")
"""bitsandbytes' formats of 4 bits, which dequantize to the weights that they compute with."""


def quantization_method(config: PretrainedConfig) -> str | None:
    """How a configuration's weights are quantized: nf4, fp4, int8 (bitsandbytes), gptq, fp8, ...; None: not at all."""
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return None
    values = found if isinstance(found, dict) else found.to_dict()
    method = values.get("quant_method")
    method = str(getattr(method, "value", method) or "an unknown method")
    if method != "bitsandbytes":
        return method
    return "int8" if values.get("load_in_8bit") else values.get("bnb_4bit_quant_type") or "fp4"


def keep_packed_form(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights anew in evaluation mode.

    On CPUs with AVX512-BF16 it would do so in place, with rounded scales and a product that has no gradient: training
    after an evaluation would go on with them, and a model would be another one after its first pass.
    """
    modules: list[Any] = list(model.modules())  # any: torch annotates every attribute as a tensor or a module
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantized_parts(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a weight consists of: itself, or the numbers, scales and zeros of a quantized one."""
    if hasattr(weight.data, "__tensor_flatten__"):  # torchao's
        inner: Any = weight.data
        for part in inner.__tensor_flatten__()[0]:
            yield from quantized_parts(f"{name}.{part}", getattr(inner, part))
        return
    yield name, weight
    state: Any = getattr(weight, "quant_state", None)  # bitsandbytes' 4 bits
    if state is not None:
        for part, value in state.as_dict(packed=True).items():
            yield f"{name}.{part}", value


def int8_scales(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The scales of bitsandbytes' weights of 8 bits, which the first pass moves from the weight to its module."""
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in modules:
        scales = getattr(getattr(module, "weight", None), "SCB", None)
        if scales is None:
            scales = getattr(getattr(module, "state", None), "SCB", None)
        if isinstance(scales, Tensor):
            yield f"{name}.SCB", scales
