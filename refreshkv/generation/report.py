"""Reports the generation of one text: a streamer that times tokens, and a table of times, budget and full steps."""

import time
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from refreshkv.cache.refresh import RefreshCache
from refreshkv.tables import column_table


class TimedStreamer(TextStreamer):
    """Prints the text token by token, and records when the prompt and each token arrive."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **settings: Any):
        super().__init__(tokenizer, **settings)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt in the first call, one token in each later one."""
        self.times.append(time.perf_counter())
        super().put(value)

    @property
    def new_tokens(self) -> int:
        """Number of tokens after the prompt."""
        return len(self.times) - 1

    @property
    def prompt_seconds(self) -> float:
        """Seconds from the prompt to the first token."""
        return self.times[1] - self.times[0]

    @property
    def token_seconds(self) -> float | None:
        """Mean seconds of the tokens after the first; None if there are none."""
        return (self.times[-1] - self.times[1]) / (self.new_tokens - 1) if self.new_tokens > 1 else None


def generation_table(
    prompt_tokens: int,
    streamer: TimedStreamer,
    cache: RefreshCache | None,
    reuse: str | None = None,
    decoding: str | None = None,
) -> str:
    """The table that `refreshkv generate` prints below the text.

    cache: the cache that decoded; None for full attention. reuse: the reused part of the prompt, if a prompt store was
    used.
    decoding: the settings under which tokens were chosen.
    """
    lines = [
        ("prompt tokens", str(prompt_tokens)),
        ("new tokens", str(streamer.new_tokens)),
        ("seconds for the prompt", f"{streamer.prompt_seconds:.2f}"),
    ]
    if decoding is not None:
        lines.append(("decoding", decoding))
    if reuse is not None:
        lines.append(("prefix store", reuse))
    if streamer.token_seconds is not None:
        lines.append(("seconds per token", f"{streamer.token_seconds:.4f}"))
        lines.append(("tokens/s", f"{1 / streamer.token_seconds:.1f}"))
    lines += [("attention", "full")] if cache is None else _cache_lines(prompt_tokens, cache)
    return column_table(lines, text_columns=2)


def _cache_lines(prompt_tokens: int, cache: RefreshCache) -> list[tuple[str, str]]:
    """The budget, and the full and selecting steps after the prompt; neighbouring layers with equal numbers share a
    line."""
    budget, length = cache.config.largest_budget(prompt_tokens), int(cache.get_seq_length())
    steps = length - prompt_tokens
    beyond = " (the context never grew beyond it: full attention)" if budget >= length else ""
    lines = [("K, tokens in the small cache", f"{budget}{beyond}")]
    flags = (cache.full_steps, cache.selecting_steps)
    full_steps, selecting_steps = (own[:, 0, prompt_tokens:].sum(-1).tolist() for own in flags)
    layers = zip(full_steps, selecting_steps, cache.is_sliding, strict=True)
    counts = [None if sliding else (full, selecting) for full, selecting, sliding in layers]
    for count, group in groupby(enumerate(counts), key=lambda entry: entry[1]):
        layers = [layer for layer, _ in group]
        name = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
        if count is None:
            lines.append((name, "sliding window"))
        else:
            full, selecting = count
            stride = f"effective stride {steps / full:.1f}" if full else "never refreshed"
            also = f", {selecting} selecting steps" if selecting else ""
            lines.append((name, f"{full} full steps of {steps}, {stride}{also}"))
    return lines
