"""On a GPU: the launch whose programs wait for each other chooses and attends as a launch for each stage does."""

import pytest
import torch

from refreshkv import NEVER, RefreshConfig
from refreshkv.ops.step import launches
from tests.ops.test_step_kernels import drawn, prompted_layer, seen_of

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from refreshkv.ops.step.selecting import launches as stages
from refreshkv.ops.step.selecting import state as selecting_state

CASES = {
    "short": (700, 64, {}),
    "narrow heads": (3000, 64, {"pool_kernel": 1}),
    "as recommended": (5000, 128, {}),
    "a long row": (33000, 128, {}),
    "windows": (5000, 128, {"sink_tokens": 4, "recent_window": 8, "pool_kernel": 7}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("narrow", [False, True])
def test_one_launch_equals_one_for_each_stage(narrow, name, dtype, monkeypatch):
    """With logits of 32 bits, and of 16."""
    monkeypatch.setattr(selecting_state, "l2_bytes", lambda device: 0 if narrow else 2**40)
    prompt, head_dim, selection = CASES[name]
    settings = {"pool_ahead": True, "pool_kernel": 2, **selection}
    config = RefreshConfig(budget=prompt // 8, stride=NEVER, select_stride=2, score_bits=4, **settings)
    generator = torch.Generator().manual_seed(0)
    block = [drawn(generator, heads, prompt, head_dim, dtype) for heads in (8, 2, 2)]
    padding = torch.tensor([0, 37], device="cuda")
    layers = [prompted_layer(*block, padding, config, prompt + 20) for _ in range(2)]
    assert stages.run_at_once(block[0], 2)
    for step in range(12):
        token = [drawn(generator, heads, 1, head_dim, dtype) for heads in (8, 2, 2)]
        outputs = []
        for layer, together in zip(layers, (True, False), strict=True):
            monkeypatch.setattr(stages, "run_at_once", lambda *_, together=together: together)
            options = (config.step_options(), head_dim**-0.5)
            outputs.append(launches.decode_step(*token, layer.state(), *options, layer.selecting_state()))
        torch.testing.assert_close(*outputs, rtol=0, atol=0, msg=lambda text, step=step: f"{step}: {text}")
        assert seen_of(layers[0]) == seen_of(layers[1]), step
