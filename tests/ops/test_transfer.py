"""Kernels that move tokens within a cache's buffers against plain PyTorch."""

import pytest
import torch

from refreshkv.ops import naive

pytest.importorskip("triton")

from refreshkv.ops.step import transfer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("size", "dtype"), [(72, torch.float32), (12, torch.uint8), (1, torch.int64)])
@pytest.mark.parametrize("largest", [8192, 64])
def test_tokens_move_at_once(size, dtype, largest, monkeypatch):
    """A tail that shifts over itself, tokens that change places, and a token that comes twice."""
    monkeypatch.setattr(transfer, "LARGEST_MOVE", largest)
    buffer = torch.randint(0, 200, (2, 3, 40, size), generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    source = torch.tensor([[*range(20, 38), 3, 0, 0], [*range(10, 28), 30, 31, 31]], device=DEVICE)
    target = torch.tensor([[*range(22, 40), 0, 3, 3], [*range(7, 25), 31, 30, 30]], device=DEVICE)
    expected = buffer.clone()
    naive.move_tokens(expected, source, target)
    assert torch.equal(expected[0, :, 22:40], buffer[0, :, 20:38]) and torch.equal(expected[1, :, 30], buffer[1, :, 31])
    transfer.move_tokens(buffer, source, target)
    assert torch.equal(buffer, expected)
