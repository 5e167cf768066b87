"""Training attention: the refresh pattern by kernels against full attention, forward and backward, on one GPU.

    python benchmarks/attention.py [--cases 16384:8192:10:2048,...] [--flex] [--output DIR]
    python benchmarks/attention.py --model DIR_OR_HUB_ID --data ROWS --cases 4096:2048:10:512
    python benchmarks/attention.py --heads 9:3:64 --rows 4 --drawn --cases 8192:4096:10:1024,8192:4096:never:1024:2:4

A case is T:P:S:K, then perhaps the select stride and the bits of the score keys; S may be "never". Prints milliseconds
(medians of CUDA events), ratios to cuDNN's full attention of the same T in the same run, and peak memory beyond inputs,
outputs and gradients; with --output also a JSON file and a plot.

Inputs are random, whose selections share nothing but by chance. With --model they are those of a trained model on a
prepared row, the heads of several layers side by side, and each case is timed on both; "shared" is the part of a
selection that the one before had as well.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface

import measuring
from output import pyplot, save
from refreshkv import NEVER, RefreshConfig, Simulation
from refreshkv.attention.function import refresh_attention
from refreshkv.attention.model_call import ModelCalls
from refreshkv.layers import FULL, LayerKind
from refreshkv.ops.rows import after_prompt, block_steps, full_steps, full_steps_cudnn, partial_steps
from refreshkv.ops.rows.key_lists import KeyLists, key_lists
from refreshkv.ops.rows.segments import segments_of
from refreshkv.ops.selection import ranking
from refreshkv.ops.state import AttentionInputs
from refreshkv.settings import settings_from_dict
from refreshkv.tables import column_table
from refreshkv.train.flops import visible_keys

CASES = ",".join(
    (
        "16384:8192:10:2048",
        "32768:16384:10:2048",
        "65536:32768:10:2048",
        "32768:16384:50:2048",
        "131072:65536:50:2048",
        "8192:8142:50:2048",
        "8192:4096:10:1024",
        "16384:8192:never:2048:5",
        "32768:16384:never:2048:5",
    )
)
HEAD_START = 2 * 10**7  # cycles, about 11 ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", default=CASES, help="T:P:S:K[:SELECT_STRIDE[:SCORE_BITS]], ... (default: %(default)s)"
    )
    parser.add_argument("--heads", default="32:8:128", help="query heads, key/value heads, head size (%(default)s)")
    parser.add_argument("--rows", type=int, default=1, help="batch rows of random inputs")
    parser.add_argument("--no-flash", action="store_true", help="leave torch's flash attention out")
    parser.add_argument("--repeat", type=int, default=5, help="timed runs of each, after one to warm up")
    parser.add_argument("--flex", action="store_true", help="time flex_attention as well, in rows up to 16K")
    parser.add_argument("--drawn", action="store_true", help="full steps as where each step draws its prompt length")
    parser.add_argument("--model", help="folder or hub id of a trained model whose inputs are timed as well")
    parser.add_argument("--data", help="folder of prepared rows for it")
    parser.add_argument("--output", type=Path, help="folder for attention.json and attention.png")
    args = parser.parse_args()
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data belong together")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {ceiling(args.repeat):.0f} TFLOP/s in a product")
    results, dense = [], {}
    for case in args.cases.split(","):
        simulation, length = simulation_of(case, recurring=not args.drawn)
        heads = [int(number) for number in args.heads.split(":")]
        kinds = {"random": draw(args.rows, length, *heads)}
        if args.model is not None:
            kinds = trained(args.model, args.data, length, kv_heads=heads[1])
        for kind, inputs in kinds.items():
            if (length, kind) not in dense:
                dense[length, kind] = time_dense(inputs, args.repeat, not args.no_flash)
            result = time_case(inputs, simulation, dense[length, kind], args.repeat, args.flex)
            results.append({"inputs": kind, "case": case, **result})
            print(json.dumps(results[-1]), flush=True)
    print(table(results))
    if args.output:
        save(args.output, "attention.json", results)
        plot(results, args.output / "attention.png")


def simulation_of(case: str, recurring: bool) -> tuple[Simulation, int]:
    """The simulation that a case names, and T."""
    length, prompt, stride, budget, *selecting = case.split(":")
    steps = NEVER if stride == "never" else int(stride)
    if int(prompt) == int(length) - steps:
        steps = NEVER  # P = T - S is the paper's recipe: one segment, never refreshed
    names = zip(("select_stride", "score_bits"), map(int, selecting), strict=False)
    config = settings_from_dict(RefreshConfig, {"budget": int(budget), "stride": steps, **dict(names)})
    return Simulation(int(prompt), config, recurring=recurring), int(length)


Inputs = tuple[Tensor, Tensor, Tensor]
"""Query (B, H, T, D), key and value (B, Hkv, T, D), laid out as in a model: tokens before heads in memory."""


def draw(rows: int, length: int, heads: int, kv_heads: int, head_dim: int) -> Inputs:
    """Random ones."""
    shapes = [(rows, number, length, head_dim) for number in (heads, kv_heads, kv_heads)]
    query, key, value = (as_inputs(torch.randn(shape, device="cuda", dtype=torch.bfloat16)) for shape in shapes)
    return query, key, value


def as_inputs(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


def trained(model_name: str, data: str, length: int, kv_heads: int) -> dict[str, Inputs]:
    """Inputs of a trained model's attention on a row of the test split, and random ones of the same shape."""
    from transformers import AutoModelForCausalLM

    from refreshkv.data.rows import load_rows

    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.bfloat16)
    model.cuda().eval()  # pyright: ignore[reportCallIssue]  # transformers' wrapper of it hides `self`
    row = load_rows(data).test[0]["input_ids"].long().flatten()
    if len(row) < length or model.config.max_position_embeddings < length:
        raise SystemExit(f"error: --cases: {length} tokens are more than a row of {data} or the model's positions")
    seen: list[Inputs] = []

    def attention(module, query: Tensor, key: Tensor, value: Tensor, mask, scaling: float, **kwargs):
        seen.append((query, key, value))
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2), None

    AttentionInterface.register("seen", attention)
    AttentionMaskInterface.register("seen", lambda *args, **kwargs: None)
    model.set_attn_implementation("seen")
    with torch.no_grad():
        model(row[None, :length].cuda(), use_cache=False)
    groups = seen[0][0].shape[1] // seen[0][1].shape[1]
    stacked = [torch.cat([layer[i] for layer in seen[len(seen) // 2 :]], dim=1) for i in range(3)]
    kv_heads = min(kv_heads, stacked[1].shape[1])
    query, key, value = (
        as_inputs(tensor[:, : kv_heads * (groups if i == 0 else 1)]) for i, tensor in enumerate(stacked)
    )
    alike_query, alike_key, alike_value = (
        as_inputs(torch.randn_like(tensor.detach())) for tensor in (query, key, value)
    )
    return {"random": (alike_query, alike_key, alike_value), "model": (query, key, value)}


def milliseconds(work: Callable[[], object], repeat: int) -> float:
    """Median of CUDA events around `work`; in a model the host is ahead as well."""
    return measuring.milliseconds(work, repeat, HEAD_START)


def full_attention(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def time_dense(inputs: Inputs, repeat: int, flash: bool) -> dict[str, float]:
    query, key, value = inputs
    upstream = torch.randn_like(query)
    times = {}
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION} | ({"flash": SDPBackend.FLASH_ATTENTION} if flash else {})
    for name, backend in backends.items():

        def both(backend: SDPBackend = backend) -> object:
            return torch.autograd.grad(full_attention(query, key, value, backend), (query, key, value), upstream)

        times[f"{name} forward"] = milliseconds(lambda b=backend: full_attention(query, key, value, b), repeat)
        times[name] = milliseconds(both, repeat)
    return times


def layer_attention(query: Tensor, key: Tensor, value: Tensor, simulation: Simulation) -> Tensor:
    """A layer's whole attention, as a model calls it: (1, T, H, D)."""
    module: Any = torch.nn.Module()  # with all that is read of an attention module
    module.head_dim, module.layer_idx, module.is_causal = query.shape[-1], 0, True
    module.config, module.refreshkv_calls = SimpleNamespace(), ModelCalls([LayerKind(FULL)], "sdpa")
    module.num_key_value_groups = query.shape[1] // key.shape[1]
    return refresh_attention(module, query, key, value, None, simulation=simulation)[0]


def time_case(
    inputs: Inputs, simulation: Simulation, dense: dict[str, float], repeat: int, flex: bool
) -> dict[str, object]:
    query, key, value = inputs
    upstream = torch.randn_like(query.transpose(1, 2))

    def both() -> object:
        return torch.autograd.grad(layer_attention(query, key, value, simulation), (query, key, value), upstream)

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    torch.cuda.synchronize()
    wanted = (2 * query.numel() + 2 * key.numel()) * 2  # output, gradients of query, key, value
    memory = torch.cuda.max_memory_allocated() - before - wanted
    with torch.no_grad():
        forward = milliseconds(lambda: layer_attention(query, key, value, simulation), repeat)
    total = milliseconds(both, repeat)
    result = {
        **{name: round(ms, 2) for name, ms in dense.items()},
        "forward": round(forward, 2),
        "refresh": round(total, 2),
        "ratio": round(total / dense["cudnn"], 3),
        "memory GB": round(memory / 1e9, 2),
        "TFLOP": round(executed := operations(query, simulation) / 1e12, 2),
        "TFLOP/s": round(executed / total * 1e3),
        "shared": shared(query, key, simulation),
        **{name: round(ms, 2) for name, ms in parts(inputs, simulation, upstream, repeat).items()},
    }
    if flex and query.shape[2] <= 16384:
        for name, compiled in (("flex", False), ("flex, mask compiled", True)):
            try:
                flex_total = time_flex(inputs, simulation, repeat, compiled)
            except torch.OutOfMemoryError:
                continue
            result |= {name: round(flex_total, 2), f"{name} / refresh": round(flex_total / total, 2)}
    return result


def shared(query: Tensor, key: Tensor, simulation: Simulation) -> float | None:
    """Mean part of a selection that the selection before it of the same kind had; None for a single one."""
    config = simulation.config
    plan = config.plan(query, simulation.prompt_length)
    first = plan.full_positions.shape[1] if plan.selecting else 0
    scaling = query.shape[-1] ** -0.5
    chosen = ranking.select_all(query.detach(), key.detach(), plan, config.selection_options(), scaling).long()
    if chosen.shape[2] <= first + 1:
        return None
    parts = []
    for step in range(first + 1, chosen.shape[2]):
        member = torch.zeros(*chosen.shape[:2], key.shape[2] + 1, dtype=torch.bool, device=key.device)
        member.scatter_(2, chosen[:, :, step - 1], True)
        parts.append(member.gather(2, chosen[:, :, step]).float().mean())
    return round(float(torch.stack(parts).mean()), 3)


def operations(query: Tensor, simulation: Simulation) -> float:
    """Operations executed for one forward and backward pass: two products a visible key forward, five backward, and one
    more for each selection."""
    rows, heads, length, head_dim = query.shape
    plan = simulation.config.plan(query, simulation.prompt_length)
    positions = plan.full_positions[0] if plan.selecting_positions is None else plan.selecting_positions[0]
    scored = float((positions + 1).sum())
    return 2 * rows * head_dim * heads * (7 * float(visible_keys(simulation, length).sum()) + scored)


def ceiling(repeat: int) -> float:
    """TFLOP/s of a large bfloat16 matrix product."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / milliseconds(lambda: left @ right, repeat) / 1e9


def parts(inputs: Inputs, simulation: Simulation, upstream: Tensor, repeat: int) -> dict[str, float]:
    """Milliseconds of each part: where the time goes."""
    query, key, value = inputs
    prompt, config = simulation.prompt_length, simulation.config
    plan, options, scaling = config.plan(query, prompt), config.selection_options(), query.shape[-1] ** -0.5
    early = [tensor[:, :, :prompt].detach().requires_grad_() for tensor in (query, key, value)]
    early_upstream = torch.randn_like(early[0])

    def prompt_both() -> object:
        return torch.autograd.grad(full_attention(*early, backend=SDPBackend.CUDNN_ATTENTION), early, early_upstream)

    query, key, value = (tensor.detach() for tensor in (query, key, value))
    upstream = upstream[:, prompt:]
    output = torch.empty_like(upstream).contiguous()
    grad = torch.zeros_like(query[:, :, prompt:])
    query = query[:, :, prompt - config.observation_window :]
    rows = AttentionInputs(query, key, value, scaling)
    key_grad, value_grad = (torch.zeros_like(key, dtype=torch.float32) for _ in range(2))
    gradients = (grad, key_grad, value_grad)
    work = {"prompt": prompt_both}
    known, dense = None, simulation.recurring
    if plan.full_positions.shape[1] > 1:

        def full_forward() -> Tensor:
            return (full_steps_cudnn if dense else full_steps).forward(rows, plan, output)

        lse = full_forward()
        known = lse.unsqueeze(-1)
        work["full"] = full_forward

    def select() -> Tensor:
        return ranking.select_all(query, key, plan, options, scaling, lse=known)

    selected, segments = select(), segments_of(plan, key.shape[2])
    positions = block_steps.block_positions(query, key, plan)

    def lists() -> KeyLists:
        assert positions is not None
        return key_lists(plan, segments, selected, key.shape[2], positions)

    made = lists() if positions else None

    def partial_forward() -> Tensor:
        if positions and made:
            return block_steps.forward(rows, plan, positions, made, output)
        return partial_steps.forward(rows, plan, segments, selected, output)

    def partial_backward() -> None:
        if positions and made:
            return block_steps.backward(rows, plan, positions, made, rows_lse, delta, upstream, gradients)
        return partial_steps.backward(rows, plan, segments, selected, rows_lse, delta, upstream, gradients)

    rows_lse = partial_forward()
    delta = after_prompt.dot_rows(output, upstream)
    if plan.full_positions.shape[1] > 1:

        def full_backward() -> object:
            if dense:
                return full_steps_cudnn.backward(rows, plan, lse, output, upstream, grad)
            return full_steps.backward(rows, plan, lse, delta, upstream, grad)

        work["full back"] = full_backward
    work |= {"select": select, **({"lists": lists} if positions else {})}
    work |= {"partial": partial_forward, "partial back": partial_backward}
    return {name: milliseconds(call, repeat) for name, call in work.items()}


def time_flex(inputs: Inputs, simulation: Simulation, repeat: int, compiled_mask: bool) -> float:
    """flex_attention with the same visibility as a mask, mask building included, as it comes or compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, value = inputs
    prompt, config = simulation.prompt_length, simulation.config
    plan, scaling = config.plan(query, prompt), query.shape[-1] ** -0.5
    selected = ranking.select(query.detach(), key.detach(), plan.steps, config.selection_options(), scaling).long()
    length, stride, checks = query.shape[2], plan.stride, plan.full_positions.shape[1]
    # rank of each position in each check's selection, the width where it is not in it
    heads, kv_heads = query.shape[1], key.shape[1]
    ranks = torch.full((kv_heads, checks, length), selected.shape[-1], dtype=torch.int16, device="cuda")
    order = torch.arange(selected.shape[-1], dtype=torch.int16, device="cuda").expand_as(selected[0])
    ranks.scatter_(2, selected[0], order)
    budget = int(plan.budgets[0])

    def visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        check = torch.clamp(row - (prompt - 1), min=0) // stride
        since = row - (prompt - 1) - check * stride
        rank = ranks[head // (heads // kv_heads), check, column]
        near = (column > row - since) & (column >= row - budget)
        return (column <= row) & ((row < prompt) | (since == 0) | near | (rank < budget - since + 1))

    build, compiled = create_block_mask, torch.compile(flex_attention)
    if compiled_mask:
        build = torch.compile(create_block_mask)

    def both() -> object:
        mask = build(visible, 1, heads, length, length, device="cuda")
        output = compiled(query, key, value, block_mask=mask, enable_gqa=True)
        return torch.autograd.grad(output, (query, key, value), torch.ones_like(output))

    return milliseconds(both, repeat)


def table(results: list[dict[str, object]]) -> str:
    names = list(dict.fromkeys(name for result in results for name in result))
    return column_table([names] + [[str(result.get(name, "")) for name in names] for result in results], text_columns=0)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    several = len({result["inputs"] for result in results}) > 1
    labels = [
        str(result["case"]).replace(":", "\n") + (f"\n{result['inputs']}" if several else "") for result in results
    ]
    figure, axes = pyplot().subplots(figsize=(9, 4.5), layout="constrained")
    bottom = [0.0] * len(results)
    for name in ("prompt", "full", "full back", "select", "lists", "partial", "partial back"):
        heights = [result.get(name, 0.0) / result["cudnn"] for result in results]
        axes.bar(labels, heights, 0.6, bottom=bottom, label=name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.axhline(1.0, color="black", linewidth=1, label="full attention (cuDNN)")
    axes.set_ylabel("time, forward and backward, full attention = 1")
    axes.set_xlabel("tokens of the row, of the prompt, stride, budget, select stride")
    axes.tick_params(axis="x", labelsize=8)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
