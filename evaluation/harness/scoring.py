"""Log-likelihoods of continuations when they are decoded under a strategy, with the context as the prompt.

RefreshKV's strategies need one simulated pass for a batch. Caches that evict have no such pass: each continuation is
decoded token by token.

Shapes: `B` batch rows, `P` columns of the prompts, padded on the left, `T` columns of the pass.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from refreshkv.config import RefreshConfig, Simulation, Trace
from refreshkv.evaluation.caches import Caches
from refreshkv.evaluation.costs import Meter
from refreshkv.evaluation.harness.costs import HarnessCosts, costs_of_pass
from refreshkv.evaluation.perplexity.stepwise import decode_known
from refreshkv.evaluation.strategies import Strategy


class Text(NamedTuple):
    """A context and its continuation, at least one token each."""

    tokens: list[int]
    scored: int
    """How many of the last tokens are the continuation."""
    prompt_length: int
    """Tokens before the first decoding step: the context, or more."""

    @classmethod
    def of(cls, context: list[int], continuation: list[int], most: int, least_prompt: int = 1) -> "Text":
        """Cuts the context on the left so that all but the last token are at most `most`, as the harness does.

        least_prompt: the prompt is the context, or this many tokens if the context has fewer.
        """
        tokens = (context + continuation)[-(most + 1) :]
        scored = min(len(continuation), len(tokens) - 1)
        longest = len(tokens) - 1  # the last token predicts nothing
        return cls(tokens, scored, min(max(len(tokens) - scored, least_prompt), longest))


Answer = tuple[float, bool]
"""Sum of the continuation's log-probabilities in nats, and whether each of its tokens is the most likely one."""

Scored = tuple[list[Answer], HarnessCosts]


@torch.no_grad()
def simulated(model: PreTrainedModel, config: RefreshConfig, texts: list[Text], dtype: torch.dtype | None) -> Scored:
    """Scores a batch with one parallel pass; its logits equal those of decoding the continuations through the cache.

    dtype: of the softmax; None takes the logits'.
    """
    meter, trace = Meter(model), Trace()
    prompt_length = max(text.prompt_length for text in texts)
    ids, mask, lengths = _padded(texts, prompt_length)
    first = min(length - text.scored for text, length in zip(texts, lengths, strict=True))
    logits = model(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0).to(model.device),
        use_cache=False,
        logits_to_keep=ids.shape[1] - first,
        simulation=Simulation(prompt_length, config),
        trace=trace,
    ).logits
    answers = []
    for text, length, own in zip(texts, lengths, logits, strict=True):
        wanted = torch.tensor(text.tokens[-text.scored :], device=own.device)
        own = F.log_softmax(own[length - text.scored - first : length - first], dim=-1, dtype=dtype)
        chosen = own.gather(1, wanted[:, None])
        answers.append((float(chosen.sum()), bool((own.argmax(-1) == wanted).all())))
    return answers, costs_of_pass(trace, prompt_length, lengths, meter.read()[0])


def _padded(texts: list[Text], prompt_length: int) -> tuple[Tensor, Tensor, list[int]]:
    """The tokens but each text's last, so that all prompts end in the same column: ids and mask (B, T) int64.

    Columns behind a text count as tokens: nothing before them depends on them. Also returns where each text ends.
    """
    before = [prompt_length - text.prompt_length for text in texts]
    lengths = [padding + len(text.tokens) - 1 for padding, text in zip(before, texts, strict=True)]
    ids = torch.zeros(len(texts), max(lengths), dtype=torch.int64)
    mask = torch.ones_like(ids)
    for row, (padding, length, text) in enumerate(zip(before, lengths, texts, strict=True)):
        ids[row, padding:length] = torch.tensor(text.tokens[:-1])
        mask[row, :padding] = 0
    return ids, mask, lengths


def decoded(
    model: PreTrainedModel, strategy: Strategy, text: Text, caches: Caches, rounded: Callable[[int], int]
) -> Scored:
    """Scores one text token by token. rounded: the capacity of the cache for a number of tokens."""
    ids = torch.tensor([text.tokens], device=model.device)
    result = decode_known(model, ids, text.prompt_length, strategy, caches, rounded(len(text.tokens)))
    wanted = ids[:, -text.scored :].cpu()
    answer = (-float(result.losses.sum()), bool((result.greedy == wanted).all()))
    seconds = result.prompt_seconds + result.seconds
    costs = HarnessCosts(seconds, steps=text.scored, cache_bytes=result.cache_bytes, cached_sequences=1)
    return [answer], costs
