"""Score keys: what is stored is the specification's, bit for bit, by the kernel as by plain PyTorch."""

import pytest
import torch

from refreshkv import RefreshConfig
from refreshkv.cache.layer import RefreshLayer
from refreshkv.ops.naive import score_keys as naive

pytest.importorskip("triton")

from refreshkv.ops.selection.score_keys import quantized, write_score_keys

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def keys_of(tokens, head_dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    # as a model lays them out: (B, T, Hkv, D) in memory
    keys = torch.randn(2, tokens, 3, head_dim, generator=generator).transpose(1, 2)
    keys[0, 0, 0] = 0
    keys[0, 1, 1, :] = 3.5  # halves between two codes
    keys[1, 0, -1, 0] = 1e4
    return keys.to(DEVICE, dtype)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_the_specifications(bits):
    key = keys_of(5, 16).cpu()  # a GPU multiplies by the reciprocal of a number
    codes, scale = naive.quantize(key, bits)
    top = 2 ** (bits - 1) - 1
    expected = torch.zeros_like(key)
    for place in torch.cartesian_prod(*map(torch.arange, key.shape[:3])).tolist():
        vector = key[tuple(place)]
        step = vector.abs().max() / top
        if step > 0:
            expected[tuple(place)] = torch.clamp(torch.round(vector / step), -top, top) * step
    assert torch.equal(naive.dequantize(codes, scale), expected)
    assert codes.shape[-1] == (16 if bits == 8 else 8)


def test_every_code_survives_packing():
    codes = torch.arange(-7, 8, dtype=torch.int8)
    codes = torch.cartesian_prod(codes, codes)
    assert torch.equal(naive.unpack(naive.pack(codes)), codes)


@pytest.mark.parametrize("dtype", [torch.float32] + ([torch.float16, torch.bfloat16] if DEVICE == "cuda" else []))
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 16), (70, 64), (65, 24), (3, 128)])
def test_kernel_stores_the_same_bits(tokens, head_dim, bits, dtype):
    key = keys_of(max(tokens, 2), head_dim, dtype)[:, :, :tokens]
    room = torch.zeros(2, 3, tokens + 9, head_dim, device=DEVICE)
    found, expected = (naive.empty_score_keys(room, bits) for _ in range(2))
    write_score_keys(key, *found, first=5)
    naive.write_score_keys(key, *expected, first=torch.tensor(5, device=DEVICE))
    again = naive.empty_score_keys(room, bits)
    write_score_keys(key, *again, first=torch.tensor(5, device=DEVICE))
    for ours, theirs, same in zip(found, expected, again, strict=True):
        assert torch.equal(ours, theirs) and torch.equal(same, theirs)
    codes, scale = naive.quantize(key, bits)
    assert torch.equal(expected[0][:, :, 5 : 5 + tokens], codes)
    assert torch.equal(expected[1][:, :, 5 : 5 + tokens], scale)
    assert not expected[1][:, :, :5].any() and not expected[1][:, :, 5 + tokens :].any()


def test_odd_heads_are_refused():
    layer = RefreshLayer(8, RefreshConfig(select_stride=2))
    with pytest.raises(ValueError, match="select_stride needs an even head size, and the model's is 15"):
        layer.update(*torch.zeros(2, 1, 1, 4, 15))


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.bfloat16), (8, torch.float32)])
def test_codes_of_known_tokens_are_those_of_a_cache(bits, dtype):
    """As numbers in the keys' dtype, which holds them exactly."""
    key = keys_of(7, 24, dtype)
    codes, scales = quantized(key, bits)
    assert codes.dtype == dtype
    assert torch.equal(codes.float() * scales.unsqueeze(-1), naive.dequantize(*naive.quantize(key, bits)))
    with pytest.raises(ValueError, match="even head size"):
        quantized(key[..., :23].contiguous(), bits)
