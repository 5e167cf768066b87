"""Algorithm 1 of the paper taken literally: one row, one head group, a Python queue. For tests only."""

from collections import deque

import torch


def sequential_attention(query, key, value, prompt_length, config, scaling):
    """One batch row without padding: query (H, T, D), key and value (Hkv, T, D) -> output (H, T, D), full positions."""
    heads, length, _ = query.shape
    groups = heads // key.shape[0]
    budget = int(config.budgets(torch.tensor([prompt_length]))[0])
    output = torch.zeros_like(query)
    for head in range(heads):
        for position in range(prompt_length):
            seen = list(range(position + 1))
            output[head, position] = _attend(query, key, value, head, groups, position, seen, scaling)
    anchor = prompt_length - 1
    full = [anchor]
    queues = [_queue(query, key, kv, groups, anchor, budget, config, scaling) for kv in range(key.shape[0])]
    for position in range(prompt_length, length):
        step = position - anchor if config.threshold is None else position - (prompt_length - 1)
        is_full = step % config.stride == 0
        if is_full and config.threshold is not None:
            now, then = (query[:, p].float().mean(0) for p in (position, anchor))
            is_full = bool(torch.dot(now, then) / (now.norm() * then.norm()) <= config.threshold)
        for head in range(heads):
            seen = list(range(position + 1)) if is_full else [*queues[head // groups], position]
            output[head, position] = _attend(query, key, value, head, groups, position, seen, scaling)
        if is_full:
            anchor = position
            full.append(position)
            queues = [_queue(query, key, kv, groups, anchor, budget, config, scaling) for kv in range(key.shape[0])]
        else:
            for queue in queues:
                queue.append(position)
                if len(queue) > budget:
                    queue.popleft()
    return output, full


def _attend(query, key, value, head, groups, position, seen, scaling):
    logits = key[head // groups, seen] @ query[head, position] * scaling
    return logits.softmax(-1) @ value[head // groups, seen]


def _queue(query, key, kv, groups, anchor, budget, config, scaling):
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
    half = config.pool_kernel // 2
    pooled = [max(scores[max(0, j - half) : j + half + 1]) for j in range(anchor + 1)]
    first = {j for j in range(anchor + 1) if j > anchor - config.recent_window or j < config.sink_tokens}
    order = sorted(range(anchor + 1), key=lambda j: (j not in first, -pooled[j], j))
    return deque(reversed(order[:budget]))
