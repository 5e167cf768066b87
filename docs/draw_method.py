"""Draws method.svg, who attends to what under RefreshKV, from a small example: python docs/draw_method.py

One head group with two query heads and pseudo-random queries and keys. The rule is written out step by step with a
queue, as a decoder would run it (docs/method.md).
"""

import argparse
from collections import deque
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Outline

PROMPT, STRIDE, BUDGET, LENGTH = 16, 4, 6, 32
POOL_KERNEL, THRESHOLD = 3, 0.6  # the method's default is 7, too wide for so few positions
HEADS, HEAD_SIZE, SEED = 2, 8, 749

UNSEEN, PROMPT_ROW, FULL, SELECTED, LOCAL = range(5)
COLOURS = {UNSEEN: "#eeeeec", PROMPT_ROW: "#b9c3d1", FULL: "#f2a65a", SELECTED: "#12716b", LOCAL: "#74b3e8"}
INK = "#22272e"
WIDTH, HEIGHT, SIDE = 10.5, 6.7, 6.0  # inches: the figure, and the matrix


def example(seed):
    """Queries (T, heads, D) that drift with time and keys (T, D)."""
    random = np.random.default_rng(seed)
    noise = random.normal(size=(LENGTH, HEADS, HEAD_SIZE))
    query = noise.copy()
    for position in range(1, LENGTH):
        query[position] = 0.85 * query[position - 1] + 0.5 * noise[position]
    return query, random.normal(size=(LENGTH, HEAD_SIZE))


def select(query, key, position):
    """The kept positions of a full step, highest score first; ties go to the lower position."""
    logits = query[position] @ key[: position + 1].T / np.sqrt(HEAD_SIZE)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = probabilities.max(axis=0)
    half = POOL_KERNEL // 2
    pooled = [scores[max(0, j - half) : j + half + 1].max() for j in range(position + 1)]
    return sorted(range(position + 1), key=lambda j: (-pooled[j], j))[:BUDGET]


def moved(query, now, then):
    """Whether the mean query has turned away from the one of the last full step."""
    a, b = query[now].mean(axis=0), query[then].mean(axis=0)
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b) <= THRESHOLD


def visibility(query, key):
    """What each query sees: an array (T, T) of the constants above, and {full position: kept positions}."""
    seen = np.full((LENGTH, LENGTH), -1)
    for position in range(LENGTH):
        seen[position, : position + 1] = PROMPT_ROW if position < PROMPT - 1 else UNSEEN
    kept = {}
    for position in range(PROMPT - 1, LENGTH):
        check = (position - PROMPT + 1) % STRIDE == 0
        if not kept or (check and moved(query, position, max(kept))):
            seen[position, : position + 1] = FULL
            kept[position] = select(query, key, position)
            queue = deque(reversed(kept[position]))  # the lowest score leaves first
        else:
            seen[position, [j for j in queue if j <= max(kept)]] = SELECTED
            seen[position, [j for j in queue if j > max(kept)] + [position]] = LOCAL
            queue.append(position)
            if len(queue) > BUDGET:
                queue.popleft()
    return seen, kept


def draw_matrix(axes, seen, kept):
    """The visibility matrix, one square per query and key, with the legend in its empty corner."""
    square = Outline.unit_rectangle().vertices * 0.88 + 0.06
    for kind, colour in COLOURS.items():
        squares = [Outline(square + (column, row), closed=True) for row, column in np.argwhere(seen == kind)]
        axes.add_patch(PathPatch(Outline.make_compound_path(*squares), color=colour, linewidth=0))
    for row, columns in kept.items():
        axes.plot([c + 0.5 for c in columns], [row + 0.5] * BUDGET, "o", color=COLOURS[SELECTED], markersize=5.5)
    ticks = range(0, LENGTH, STRIDE)
    axes.set_xticks([t + 0.5 for t in ticks], ticks)
    axes.set_yticks([t + 0.5 for t in ticks], ticks)
    axes.set(xlim=(0, LENGTH), ylim=(LENGTH, 0), aspect="equal", xlabel="key position", ylabel="query position")

    entries = {
        PROMPT_ROW: f"prompt (P = {PROMPT}): ordinary causal attention",
        FULL: "full step: every position so far",
        SELECTED: "partial step: selected positions",
        LOCAL: "partial step: tokens since the full step",
        UNSEEN: "in the full cache, not read",
    }
    handles = [Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in entries]
    dot = plt.Line2D([], [], marker="o", linestyle="none", color=COLOURS[SELECTED], markersize=6)
    handles.insert(2, dot)
    labels = list(entries.values())
    labels.insert(2, f"kept by a full step: the K = {BUDGET} highest scores")
    style = {"frameon": False, "fontsize": 11.5, "handlelength": 1, "handleheight": 1, "labelspacing": 0.65}
    axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.47, 1.0), borderaxespad=0, **style)


def draw_steps(axes, kept):
    """The strip beside the matrix: which positions are checks, and what came of them."""
    for position in range(PROMPT - 1, LENGTH):
        check = (position - PROMPT + 1) % STRIDE == 0
        full = position in kept
        if check:
            face = COLOURS[FULL] if full else "white"
            axes.plot(0.5, position + 0.5, "o", markersize=9, markeredgecolor=INK, markerfacecolor=face)
            text = "check: full" if full else "check: query has not\nmoved, stays partial"
            text = "prompt ends: full" if position == PROMPT - 1 else text
            axes.text(1.2, position + 0.5, text, va="center", fontsize=11, linespacing=1.1)
        else:
            axes.plot(0.5, position + 0.5, "o", markersize=3, color=INK)
    title = f"S = {STRIDE}: every {STRIDE}th\ndecoding step is a check"
    axes.text(0.1, PROMPT - 1.8, title, va="bottom", fontsize=11, linespacing=1.1)
    axes.set(xlim=(0, 10), ylim=(LENGTH, 0))
    axes.axis("off")


def draw_reads(axes, seen):
    """Keys read by each query, in the colours of the matrix."""
    for row in range(PROMPT - 1, LENGTH):
        left = 0
        for kind in (FULL, SELECTED, LOCAL):
            count = int((seen[row] == kind).sum())
            axes.add_patch(Rectangle((left, row + 0.1), count, 0.8, color=COLOURS[kind], linewidth=0))
            left += count
    axes.plot([BUDGET + 1] * 2, [PROMPT, LENGTH], color=INK, linewidth=1, linestyle=(0, (3, 2)), zorder=0)
    axes.text(BUDGET + 1, PROMPT - 1.8, "K + 1", ha="center", va="bottom", fontsize=11)
    axes.set(xlim=(0, LENGTH), ylim=(LENGTH, 0), yticks=[], xticks=[0, 16, 32], xlabel="keys read")


def panel(figure, left, width):
    """Axes as high as the matrix, so that rows stand in line; in inches."""
    return figure.add_axes((left / WIDTH, 0.6 / HEIGHT, width / WIDTH, SIDE / HEIGHT))


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, default=Path(__file__).with_name("method.svg"))
    out = arguments.parse_args().out
    plt.rcParams.update({"font.size": 11, "text.color": INK, "axes.labelcolor": INK, "svg.hashsalt": "refreshkv"})
    seen, kept = visibility(*example(SEED))
    figure = plt.figure(figsize=(WIDTH, HEIGHT))
    matrix, steps, reads = (panel(figure, left, width) for left, width in ((0.65, SIDE), (6.75, 2.4), (9.2, 1.2)))
    draw_matrix(matrix, seen, kept)
    draw_steps(steps, kept)
    draw_reads(reads, seen)
    for axes in (matrix, reads):
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, colors=INK)
    figure.savefig(out, facecolor="white", metadata={"Date": None}, dpi=110)


if __name__ == "__main__":
    main()
