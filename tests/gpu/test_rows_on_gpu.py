"""On a GPU: the kernels at awkward sizes and in half precision against float64, and inside a whole model."""

import pytest
import torch
from torch.nn.attention import SDPBackend

from refreshkv import NEVER, RefreshConfig, Simulation, enable
from refreshkv.attention import dense
from refreshkv.attention import function as attention
from refreshkv.ops import naive, tiles
from refreshkv.ops.choice import CHOICE
from refreshkv.ops.state import SoftmaxTerms
from tests.helpers.models import decode_logits, random_ids, tiny_model
from tests.ops.test_row_kernels import plan_of

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from refreshkv.ops.naive.rows import selections as naive_selections
from refreshkv.ops.rows import after_prompt, block_steps, cudnn, key_lists, partial_steps, whole_sequence
from refreshkv.ops.selection import ranking

# T, P, S, K, query heads per group, head size
SIZES = [
    (63, 20, 1, 1, 1, 64),
    (63, 62, 7, 63, 4, 64),
    (63, 20, 2, 1000, 7, 128),
    (1023, 511, 2, 63, 4, 128),
    (1023, 100, 7, 1000, 7, 128),
    (1023, 512, 50, 63, 1, 96),
    (1023, 973, NEVER, 200, 4, 128),
    (1025, 300, 10, 100, 2, 256),
    (4097, 2048, 7, 1000, 4, 128),
    (4097, 1000, 50, 5000, 4, 128),
]


def exact_rows(query, key, value, plan, scaling, selected):
    """The naive form in float64 with a selection made elsewhere."""
    visible = naive.visible_keys(plan, selected, columns=key.shape[2])
    return naive.grouped_attention(query[:, :, plan.prompt_length :], key, value, visible, scaling).transpose(1, 2)


def found_and_exact(inputs, plan, options, scaling, upstream):
    """Output and gradients by the kernels, and of the naive form in float64 with the same selection."""
    made, select_all = [], ranking.select_all

    def recorded(*arguments, **keywords):
        made.append(select_all(*arguments, **keywords))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "select_all", recorded)
        output = after_prompt.refresh_rows(*inputs, plan, options, scaling)
    selected = made[0].long()  # its own: another way to the scores may order ties otherwise
    gradients = torch.autograd.grad(output, inputs, upstream)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = exact_rows(*wide, plan, scaling, selected)
    return (output, *gradients), (expected, *torch.autograd.grad(expected, wide, upstream.double()))


def uniform_case(size, dtype):
    """Random inputs without padding, their plan and the selection's options."""
    length, prompt, stride, budget, groups, head_dim = size
    torch.manual_seed(length + stride)
    shapes = (2 * groups, 2, 2)
    inputs = [torch.randn(2, length, heads, head_dim, device="cuda", dtype=dtype).transpose(1, 2) for heads in shapes]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    return inputs, *plan_of(inputs[0], prompt, RefreshConfig(budget=budget, stride=stride))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_kernels_equal_float64(size, dtype):
    length, prompt, stride, budget, groups, head_dim = size
    torch.manual_seed(length + stride)
    shapes = (2 * groups, 2, 2)
    query, key, value = (torch.randn(2, length, heads, head_dim, device="cuda", dtype=dtype) for heads in shapes)
    inputs = [tensor.transpose(1, 2).requires_grad_() for tensor in (query, key, value)]
    padding = torch.tensor([0, prompt // 3], device="cuda")
    config = RefreshConfig(budget=budget, stride=stride)
    plan, options = plan_of(inputs[0], prompt, config, padding)
    upstream = torch.randn(2, length - prompt, 2 * groups, head_dim, device="cuda", dtype=dtype)
    results = found_and_exact(inputs, plan, options, head_dim**-0.5, upstream)
    for found, exact in zip(*results, strict=True):
        error = (found.double() - exact).norm() / exact.norm()
        assert error < (1e-4 if dtype == torch.float32 else 1e-2)


SELECTING = {
    "never": (1023, 511, NEVER, 100, 4, 128, {"select_stride": 5}),
    "every second, three query heads": (1025, 300, NEVER, 150, 3, 64, {"select_stride": 2, "score_bits": 4}),
    "ahead, between full steps": (
        1023, 512, 10, 63, 4, 128, {"select_stride": 3, "score_bits": 8, "pool_ahead": True, "pool_kernel": 10},
    ),
    "similarity": (1023, 100, 7, 1000, 7, 128, {"select_stride": 2, "threshold": 0.05, "observation_window": 3}),
    "long segments": (4097, 2048, NEVER, 1000, 4, 128, {"select_stride": 40, "score_bits": 4, "sink_tokens": 2}),
    "lists in several chunks": (4097, 1000, NEVER, 500, 1, 96, {"select_stride": 3}),
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.get_device_capability()[0] != tiles.HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("sinks", [False, True])
def test_four_programs_share_the_registers_of_a_multiprocessor(monkeypatch, sinks):
    """The forward kernel of partial steps takes 27 to 36 % longer where only two do, 2 % where three do."""
    kernels, run = [], partial_steps._forward.run
    monkeypatch.setattr(partial_steps._forward, "run", lambda *args, **kwargs: kernels.append(run(*args, **kwargs)))
    query, key, value = (
        torch.randn(1, 1000, heads, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for heads in (8, 2, 2)
    )
    plan, options = plan_of(query, 500, RefreshConfig(budget=64, stride=50))
    terms = SoftmaxTerms(query.new_zeros(8) if sinks else None, 50.0 if sinks else None)
    after_prompt.refresh_rows(query, key, value, plan, options, 128**-0.5, terms)
    threads = 32 * kernels[0].metadata.num_warps
    assert 4 * threads * kernels[0].n_regs <= 65536


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SELECTING)
def test_selecting_steps_equal_float64(monkeypatch, name, dtype):
    """Positions that gather their keys together, and segments alone."""
    length, prompt, stride, budget, groups, head_dim, settings = SELECTING[name]
    monkeypatch.setattr(key_lists, "MAX_MASKS", 2**20)
    torch.manual_seed(length)
    shapes = (2 * groups, 2, 2)
    inputs = [torch.randn(2, length, heads, head_dim, device="cuda", dtype=dtype).transpose(1, 2) for heads in shapes]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    padding = torch.tensor([0, prompt // 3], device="cuda")
    config = RefreshConfig(budget=budget, stride=stride, **settings)
    plan, options = plan_of(inputs[0], prompt, config, padding)
    upstream = torch.randn(2, length - prompt, 2 * groups, head_dim, device="cuda", dtype=dtype)
    for fewest in (1, 1000):
        monkeypatch.setattr(block_steps, "FEWEST_SEGMENTS", fewest)
        results = found_and_exact(inputs, plan, options, head_dim**-0.5, upstream)
        for found, exact in zip(*results, strict=True):
            assert (found.double() - exact).norm() / exact.norm() < (1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("bits", "ahead"), [(16, False), (8, True), (4, False), (4, True)])
def test_choices_of_selecting_steps_are_the_naive_ones(bits, ahead):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(1)
    query, key = torch.randn(1, 8, 2049, 64, device="cuda"), torch.randn(1, 2, 2049, 64, device="cuda")
    config = RefreshConfig(budget=300, stride=NEVER, select_stride=97, score_bits=bits, pool_ahead=ahead, sink_tokens=4)
    plan, options = plan_of(query, 900, config, torch.tensor([5], device="cuda"))
    wanted = naive_selections(query, key, plan, options, 0.125)
    found = ranking.select_all(query, key, plan, options, 0.125).long()
    assert torch.equal(found.sort(-1).values, wanted.sort(-1).values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "size",
    [(1023, 511, 2, 63, 4, 128), (1023, 1002, 7, 300, 7, 64), (4097, 2048, 7, 1000, 4, 128), (999, 60, 50, 63, 1, 96)],
)
def test_full_steps_by_cudnn_equal_float64(size, dtype):
    """Rectangles and squares, as of shapes that come again."""
    length, prompt, stride, _, groups, head_dim = size
    inputs, plan, options = uniform_case(size, dtype)
    assert plan.uniform and CHOICE.takes_full_steps_by_cudnn(*inputs, plan)
    upstream = torch.randn(2, length - prompt, 2 * groups, head_dim, device="cuda", dtype=dtype)
    results = found_and_exact(inputs, plan, options, 0.1, upstream)
    for found, exact in zip(*results, strict=True):
        assert (found.double() - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize("prompt", [512, 576, 600])
def test_queries_whose_scores_are_all_low(prompt):
    """About -120, as in some heads of trained models: keys that a kernel takes beyond the last must not count."""
    torch.manual_seed(prompt)
    shapes = [(2, 1000, heads, 64) for heads in (8, 2, 2)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for shape in shapes]
    inputs[0][..., 0], inputs[1][..., 0] = 4.0, -30.0
    inputs = [tensor.requires_grad_() for tensor in inputs]
    config = RefreshConfig(budget=100, stride=5)
    plan, options = plan_of(inputs[0], prompt, config)
    assert CHOICE.takes_full_steps_by_cudnn(*inputs, plan)
    upstream = torch.randn(2, 1000 - prompt, 8, 64, device="cuda", dtype=torch.bfloat16)
    (_, *gradients), (_, *wanted) = found_and_exact(inputs, plan, options, 1.0, upstream)
    for found, exact in zip(gradients, wanted, strict=True):
        assert found.isfinite().all()
        found, exact = found[..., 1:].double(), exact[..., 1:]  # the first is a small difference of large numbers
        assert (found - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize("late", [256, 700, 999, 1000])
def test_blocks_of_prompts_equal_float64(late):
    query, key, value = (
        torch.randn(2, 1000, heads, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for heads in (8, 2, 2)
    )
    with torch.no_grad():
        assert CHOICE.takes_prompt_block(query[:, :, -late:], key, value)
        found = cudnn.prompt_block(query[:, :, -late:], key, value, 0.1)
    causal = torch.ones(1000, 1000, dtype=torch.bool, device="cuda").tril()[None, None]
    exact = naive.grouped_attention(query.double(), key.double(), value.double(), causal, 0.1)[:, :, -late:]
    assert (found.double() - exact).norm() / exact.norm() < 1e-2


def test_prompts_of_any_length_by_cudnn(monkeypatch):
    """Computed up to a multiple of 128 rows; one full step among them. In one layer: those behind another would choose
    otherwise where its rounding differs."""
    config = RefreshConfig(budget=60, stride=20)
    model = tiny_model(layers=1, dtype=torch.bfloat16, hidden_size=128, head_dim=64)
    model, ids = enable(model, config).cuda().train(), random_ids(2, 300).cuda()

    def gradients(prompt):
        model.zero_grad()
        model(ids, labels=ids, refresh=Simulation(prompt, config), use_cache=False).loss.backward()
        return torch.cat([parameter.grad.float().flatten() for parameter in model.parameters()])

    # 128 and 256 are computed as they are: what comes back to them is cut out of the gradient of whole rows
    prompts = (100, 128, 129, 256, 140, 270, 128)
    found = [gradients(prompt) for prompt in prompts]
    monkeypatch.setattr(attention, "computed_length", lambda query, prompt: prompt)
    for ours, wanted in zip(found, [gradients(prompt) for prompt in prompts], strict=True):
        assert (ours - wanted).norm() / wanted.norm() < 1e-2
    monkeypatch.setattr(dense, "FASTEST_FIRST", [SDPBackend.MATH])  # other kernels, which round otherwise
    for ours, wanted in zip(found, [gradients(prompt) for prompt in prompts], strict=True):
        assert (ours - wanted).norm() / wanted.norm() < 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "size", [(2048, 2016, NEVER, 300, 4, 128), (4096, 4046, 7, 500, 4, 128), (1000, 999, 5, 60, 7, 64)]
)
def test_short_tails_equal_float64(size, dtype):
    """One dense attention by cuDNN over the whole row, told that the partial rows' log-sum-exp is infinite."""
    length, prompt, _, _, groups, head_dim = size
    inputs, plan, options = uniform_case(size, dtype)
    assert CHOICE.takes_whole_sequence(*inputs, plan)
    upstream = torch.randn(2, length, 2 * groups, head_dim, device="cuda", dtype=dtype)
    output = whole_sequence.whole_sequence(*inputs, plan, options, 0.1)
    gradients = torch.autograd.grad(output, inputs, upstream)
    with torch.no_grad():
        selected = ranking.select(*inputs[:2], plan.steps, options, 0.1).long()
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    early = torch.ones(prompt, prompt, dtype=torch.bool, device="cuda").tril()[None, None]
    expected = naive.grouped_attention(*(tensor[:, :, :prompt] for tensor in wide), early, 0.1).transpose(1, 2)
    expected = torch.cat([expected, exact_rows(*wide, plan, 0.1, selected)], dim=1)
    wanted = torch.autograd.grad(expected, wide, upstream.double())
    for found, exact in zip((output, *gradients), (expected, *wanted), strict=True):
        assert (found.double() - exact).norm() / exact.norm() < 1e-2
    for found, exact in (
        (output[:, prompt:], expected[:, prompt:]),
        (gradients[0][:, :, prompt:], wanted[0][:, :, prompt:]),
    ):
        assert (found.double() - exact).norm() / exact.norm() < 1e-2


def test_selection_is_the_naive_one():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    query, key = torch.randn(1, 8, 4097, 64, device="cuda"), torch.randn(1, 2, 4097, 64, device="cuda")
    config = RefreshConfig(budget=700, stride=97, observation_window=3, recent_window=20, sink_tokens=4)
    padding = torch.tensor([5], device="cuda")
    plan, options = plan_of(query, 2000, config, padding)
    wanted = naive.select(query, key, plan.steps, options, 0.125)
    found = ranking.select(query, key, plan.steps, options, 0.125).long()
    assert torch.equal(found.sort(-1).values, wanted.sort(-1).values)


@pytest.mark.parametrize(
    "settings", [{}, {"threshold": 0.3}, {"select_stride": 2, "score_bits": 4}, {"select_stride": 5, "threshold": 0.3}]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_with_kernels_equals_one_without(monkeypatch, settings, checkpointing):
    config = RefreshConfig(budget=20, stride=6, observation_window=2, recent_window=4, **settings)
    model = enable(tiny_model(dtype=torch.float32, hidden_size=64, head_dim=16), config).cuda().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = random_ids(2, 150).cuda()

    def step():
        model.zero_grad()
        loss = model(ids, labels=ids, refresh=Simulation(60, config), use_cache=False).loss
        loss.backward()
        return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]

    loss, gradients = step()
    monkeypatch.setitem(vars(CHOICE), "naive_only", True)
    expected, wanted = step()
    assert loss == pytest.approx(expected, abs=1e-5)
    for found, exact in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("threshold", [None, 0.1])
def test_decoding_equals_the_kernels(threshold):
    config = RefreshConfig(budget=12, stride=5, threshold=threshold)
    model = enable(tiny_model(dtype=torch.float32, head_dim=16), config).cuda()
    ids = random_ids(2, 90).cuda()
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        simulation = Simulation(30, config)
        parallel = model(ids, attention_mask=mask, position_ids=position_ids, refresh=simulation).logits
    sequential, _ = decode_logits(model, ids, 30, config, mask)
    torch.testing.assert_close(parallel[mask.bool()], sequential[mask.bool()], rtol=0, atol=1e-4)
