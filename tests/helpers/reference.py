"""Algorithm 1 of the paper and the selecting steps, taken literally: one row, one head group, a Python queue.

For tests only.
"""

from collections import deque

import torch


def sequential_attention(query, key, value, prompt_length, config, scaling):
    """One batch row without padding: query (H, T, D), key and value (Hkv, T, D) -> output (H, T, D), full positions,
    positions of selecting steps."""
    heads, length, _ = query.shape
    kv_heads = key.shape[0]
    groups = heads // kv_heads
    budget = int(config.budgets(torch.tensor([prompt_length]))[0])
    output = torch.zeros_like(query)
    for head in range(heads):
        for position in range(prompt_length):
            seen = list(range(position + 1))
            output[head, position] = _attend(query, key, value, head, groups, position, seen, scaling)
    end = prompt_length - 1
    full, selecting = [end], []
    queues = [_queue(query, key, kv, groups, end, budget, config, scaling) for kv in range(kv_heads)]
    rounded = _score_keys(key, config.score_bits)
    for position in range(prompt_length, length):
        step = position - end
        is_full = step % config.stride == 0
        if is_full and config.threshold is not None:
            now, then = (query[:, p].float().mean(0) for p in (position, full[-1]))
            is_full = bool(torch.dot(now, then) / (now.norm() * then.norm()) <= config.threshold)
        is_selecting = not is_full and config.select_stride is not None and step % config.select_stride == 0
        if is_selecting:  # chooses first, and the token itself is among the chosen
            selecting.append(position)
            queues = [
                _queue(query, rounded, kv, groups, position, budget, config, scaling, own_first=True)
                for kv in range(kv_heads)
            ]
        for head in range(heads):
            seen = [*queues[head // groups], position]
            if is_full:
                seen = list(range(position + 1))
            elif is_selecting:
                seen = list(queues[head // groups])
            output[head, position] = _attend(query, key, value, head, groups, position, seen, scaling)
        if is_full:
            full.append(position)
            queues = [_queue(query, key, kv, groups, position, budget, config, scaling) for kv in range(kv_heads)]
        elif not is_selecting:
            for queue in queues:
                queue.append(position)
                if len(queue) > budget:
                    queue.popleft()
    return output, full, selecting


def _attend(query, key, value, head, groups, position, seen, scaling):
    logits = key[head // groups, seen] @ query[head, position] * scaling
    return logits.softmax(-1) @ value[head // groups, seen]


def _score_keys(key, bits):
    """The keys (Hkv, T, D) rounded to `bits`, one vector at a time."""
    if bits == 16:
        return key
    top, rounded = 2 ** (bits - 1) - 1, torch.zeros_like(key)
    for head in range(key.shape[0]):
        for position in range(key.shape[1]):
            vector = key[head, position].detach().float()
            scale = vector.abs().max() / top
            if scale > 0:
                rounded[head, position] = (vector / scale).round().clamp(-top, top) * scale
    return rounded


def _queue(query, key, kv, groups, anchor, budget, config, scaling, own_first=False):
    """Selected positions from the lowest to the highest score."""
    total = torch.zeros(anchor + 1, dtype=torch.float64)
    observers = [p for p in range(anchor - config.observation_window + 1, anchor + 1) if p >= 0]
    for observer in observers:
        best = torch.zeros(anchor + 1, dtype=torch.float64)
        for head in range(kv * groups, (kv + 1) * groups):
            probabilities = (key[kv, : observer + 1] @ query[head, observer] * scaling).softmax(-1).double()
            best[: observer + 1] = torch.maximum(best[: observer + 1], probabilities)
        total += best
    scores = (total / len(observers)).float().tolist()
    width = config.pool_kernel or config.select_stride or config.stride
    begins = [j - width + 1 if config.pool_ahead else j - width // 2 for j in range(anchor + 1)]
    pooled = [max(scores[max(0, begin) : begin + width]) for begin in begins]
    first = {j for j in range(anchor + 1) if j > anchor - config.recent_window or j < config.sink_tokens}
    order = sorted(range(anchor + 1), key=lambda j: (not (own_first and j == anchor), j not in first, -pooled[j], j))
    return deque(reversed(order[:budget]))
