"""decode_lossless: the tokens of full attention, drafted from the small cache (docs/specification.md, section 11).

    model.generate(..., past_key_values=RefreshCache(...), custom_generate=decode_lossless)

A round drafts some tokens with decoding steps from the small cache. Then it forgets what these steps wrote, and
computes the drafts again as one block with full attention. Drafts are accepted while they are what full attention says;
the first other one is replaced, and the small cache is selected anew. Keys and values that stay are full attention's.

Batch rows accept different numbers of drafts, and a cache has one length. So the cache advances by the number that the
slowest row needs. Rows that are ahead lose nothing: the next round begins with the tokens that they know already.

Shapes: `B` batch rows, `T` tokens so far, `d` drafts of a round, `V` vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from refreshkv.cache.refresh import RefreshCache
from refreshkv.generation.decode_ahead import refuse_other_modes
from refreshkv.settings import SettingsError

FIRST_DRAFT, MOST_DRAFT = 6, 24
"""Tokens that the first round drafts, and the most of any round, unless `draft_length` says."""


@dataclass
class DraftCounts:
    """What lossless decoding drafted and accepted, over all batch rows: `generate(..., drafts=DraftCounts())`."""

    judged: int = 0
    """Drafts that full attention judged: those up to and including each row's first wrong one of a round."""
    accepted: int = 0
    """Drafts that were what full attention says, or were accepted in sampling."""
    rounds: int = 0
    """Blocks with full attention after the prompt."""
    steps: int = 0
    """Steps from the small cache."""
    tokens: int = 0
    """Columns of new tokens."""

    @property
    def acceptance(self) -> float:
        """Share of the judged drafts that were accepted; 1.0 if none was judged."""
        return self.accepted / self.judged if self.judged else 1.0

    @property
    def tokens_per_round(self) -> float:
        """Tokens by which the whole batch advances in a round."""
        return self.tokens / self.rounds if self.rounds else 0.0


def decode_lossless(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    synced_gpus: bool = False,
    draft_length: int | None = None,
    drafts: DraftCounts | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Greedy search or sampling, given as `custom_generate` to `generate()`, which calls it.

    Greedy output is token for token that of full attention, as far as one token's logits do not depend on how many are
    computed at a time; samples are distributed as full attention's (speculative sampling). Logits processors are called
    for each draft, then for each token of a block, and must depend on their arguments alone. Wants
    `past_key_values=RefreshCache(...)`, best with `RefreshConfig.recommended(...)`.

    Args:
        draft_length: drafts of each round. None: as many as about half of the rows accept, by the rounds before.
        drafts: receives the counts.

    Returns (B, P + new), or the output that `return_dict_in_generate` asks for, without scores. Raises `SettingsError`
    for other caches, and for outputs that are not recorded.
    """
    refuse_other_modes(model, generation_config, synced_gpus, name="decode_lossless")
    cache = _validated_cache(model_kwargs.get("past_key_values"), generation_config, streamer)
    if draft_length is not None and (isinstance(draft_length, bool) or draft_length < 1):
        raise SettingsError(f"draft_length must be a whole number >= 1 or None, got {draft_length!r}")
    passes = _Passes(model, cache, generation_config, model_kwargs)
    rules = Rules(logits_processor, stopping_criteria, generation_config)
    counts = DraftCounts() if drafts is None else drafts
    texts = _Texts(input_ids, rules, passes.prompt(input_ids))
    length = draft_length or FIRST_DRAFT
    while not texts.all_ended:
        count = min(length, cache.capacity - texts.cached - 1, texts.room)
        accepted = _round(passes, texts, rules, counts, max(0, count))
        if draft_length is None and count == length:
            length = min(length + 2, MOST_DRAFT) if accepted else max(1, length - 1)
    ids = texts.finished()
    counts.tokens += ids.shape[1] - input_ids.shape[1]
    cache.tokens = ids[:, : texts.cached]
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(
            sequences=ids,  # pyright: ignore[reportArgumentType]  # declared as torch.LongTensor
            past_key_values=cache,
        )
    return ids


def _validated_cache(cache: Any, config: GenerationConfig, streamer: BaseStreamer | None) -> RefreshCache:
    if not isinstance(cache, RefreshCache):
        raise SettingsError(
            "decode_lossless drafts from a small cache: pass past_key_values=RefreshCache(config=model.config, ...)"
        )
    if cache.config.rectify:
        raise SettingsError("decode_lossless computes all drafts again by itself: set rectify=False")
    cache.validate_droppable()
    recorded = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    asked = [name for name in recorded if config.return_dict_in_generate and getattr(config, name)]
    if asked or streamer is not None:
        raise SettingsError(f"decode_lossless does not support {asked[0] if asked else 'streamer'}: leave it out")
    return cache


class _Passes:
    """Calls the model: for the prompt, for one drafted token, for a block of drafts."""

    # PreTrainedModel does not declare the methods that generate() calls.
    def __init__(self, model: Any, cache: RefreshCache, config: GenerationConfig, model_kwargs: dict[str, Any]):
        self.model, self.cache, self.config, self.kwargs = model, cache, config, model_kwargs
        compiles = model._valid_auto_compile_criteria(model_kwargs, config)
        self.step_call = model.get_compiled_call(config.compile_config) if compiles else model.__call__
        self.mask: Tensor | None = model_kwargs.get("attention_mask")
        if self.mask is not None and bool(self.mask.all()):
            self.mask = None

    def prompt(self, input_ids: Tensor) -> Tensor:
        """The logits (B, V) of the prompt's last token."""
        if self.cache.exact_length < self.cache.length:
            raise SettingsError(
                "the RefreshCache holds tokens that were decoded from the small cache, so what follows would not be "
                "full attention's: call reset() first"
            )
        self.cache.continue_prompt()
        logits = self.model._prefill(input_ids, self.config, self.kwargs).logits[:, -1]
        if self.cache.length != input_ids.shape[1]:
            raise SettingsError("decode_lossless takes all tokens as input_ids: leave out inputs_embeds")
        columns = input_ids.shape[1] if self.mask is None else self.mask.sum(dim=-1, keepdim=True)
        self.offset = columns - input_ids.shape[1]
        """A token's position less its column: a number, or (B, 1)."""
        return logits.float()

    def step(self, tokens: Tensor, column: int) -> Tensor:
        """The logits (B, V) of a drafted token (B,) at `column`, from the small cache."""
        # the cache's layers know the padding, and a compiled step takes no mask
        positions = self._positions(tokens[:, None], column)
        call = {"input_ids": tokens[:, None], "position_ids": positions}
        output = self.step_call(**call, past_key_values=self.cache, use_cache=True, return_dict=True)
        return output.logits[:, -1].to(copy=True, dtype=torch.float32)

    def block(self, tokens: Tensor, column: int) -> Tensor:
        """The logits (B, n, V) of tokens (B, n) from `column` on, with full attention."""
        inputs: dict[str, Any] = {"input_ids": tokens, "position_ids": self._positions(tokens, column)}
        if self.mask is not None:
            new = self.mask.new_ones(len(tokens), column + tokens.shape[1] - self.mask.shape[1])
            inputs["attention_mask"] = torch.cat([self.mask, new], dim=1)
        output = self.model(**inputs, past_key_values=self.cache, use_cache=True, return_dict=True)
        return output.logits.float()

    def _positions(self, tokens: Tensor, column: int) -> Tensor:
        columns = torch.arange(column, column + tokens.shape[1], device=tokens.device)
        return (columns + self.offset).expand(len(tokens), -1).contiguous()


class Rules:
    """How tokens are chosen from logits, and when texts end."""

    def __init__(self, process: LogitsProcessorList, is_done: StoppingCriteriaList, config: GenerationConfig):
        self.process, self.is_done, self.samples = process, is_done, bool(config.do_sample)
        self.max_length = min((rule.max_length for rule in is_done if hasattr(rule, "max_length")), default=None)
        padding = getattr(config, "_pad_token_tensor", None)
        self.padding: Tensor | None = padding

    def distribution(self, ids: Tensor, logits: Tensor) -> Tensor:
        """What the next token after ids (B, T) is chosen from: the processed logits (B, V), or with sampling their
        probabilities."""
        scores = self.process(ids, logits)
        return scores.softmax(dim=-1) if self.samples else scores

    def choose(self, distribution: Tensor) -> Tensor:
        """A token (B,) of a distribution (B, V): the likeliest, or a draw."""
        if not self.samples:
            return distribution.argmax(dim=-1)
        return torch.multinomial(distribution, 1).squeeze(1)

    def judge(self, draft: Tensor, drafted: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Whether drafts (B,) are accepted, (B,) bool, and the tokens (B,) that then stand there: the drafts, or what
        replaces them.

        drafted, wanted (B, V): the distributions of the small cache and of full attention. In sampling a draft x is
        accepted with probability min(1, wanted(x) / drafted(x)), else drawn anew from max(0, wanted - drafted): the
        token is then distributed as `wanted` (Leviathan et al., 2023, arXiv 2211.17192).
        """
        if not self.samples:
            right = wanted.argmax(dim=-1)
            return right == draft, right
        index = draft[:, None]
        share = (wanted.gather(1, index) / drafted.gather(1, index)).squeeze(1)
        accepted = torch.rand_like(share) < share
        rest = (wanted - drafted).clamp(min=0)
        rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, wanted)  # equal up to rounding
        return accepted, torch.where(accepted, draft, torch.multinomial(rest, 1).squeeze(1))


class _Texts:
    """The texts so far, which rows may know to different lengths.

    ids (B, T); known (B,): how many columns of each row are final; cached: columns that the cache holds; ended (B,):
    the column count at which each row ended, or a large number.
    """

    def __init__(self, input_ids: Tensor, rules: Rules, logits: Tensor):
        self.rules, self.cached = rules, input_ids.shape[1]
        rows, device = len(input_ids), input_ids.device
        self.ids, self.start = input_ids, input_ids.shape[1]
        self.known = torch.full((rows,), self.start, device=device)
        self.ended = torch.full((rows,), 2**31 - 1, device=device)
        everyone = torch.ones(rows, dtype=torch.bool, device=device)
        token = rules.choose(rules.distribution(input_ids, logits))
        self.write(self.start, token, everyone)

    @property
    def all_ended(self) -> bool:
        return bool((self.ended <= self.known).all())

    @property
    def room(self) -> int:
        """Drafts that may still be of use before the longest text allowed."""
        return 2**31 - 1 if self.rules.max_length is None else max(0, self.rules.max_length - self.cached - 2)

    def draft(self, column: int, tokens: Tensor) -> Tensor:
        """Puts drafts (B,) at `column` of the rows that do not know that column yet. Returns the tokens there."""
        self._extend(column)
        self.ids[:, column] = torch.where(self.known > column, self.ids[:, column], tokens)
        return self.ids[:, column]

    def write(self, column: int, tokens: Tensor, where: Tensor) -> None:
        """Makes tokens (B,) final at `column` of the rows in `where` (B,) bool; ended rows get padding from then on."""
        self._extend(column)
        has_ended = self.ended <= column
        if self.rules.padding is not None:
            tokens = torch.where(has_ended, self.rules.padding.to(tokens.device), tokens)
        self.ids[:, column] = torch.where(where, tokens, self.ids[:, column])
        self.known = torch.where(where, column + 1, self.known)
        done = self.rules.is_done(self.ids[:, : column + 1], None) & where & ~has_ended
        self.ended = torch.where(done, column + 1, self.ended)

    def _extend(self, column: int) -> None:
        if column >= self.ids.shape[1]:
            self.ids = torch.cat([self.ids, self.ids.new_zeros(len(self.ids), 1)], dim=1)

    def finished(self) -> Tensor:
        """The texts up to the end of the longest one."""
        return self.ids[:, : int(self.ended.max())]


def _round(passes: _Passes, texts: _Texts, rules: Rules, counts: DraftCounts, count: int) -> bool:
    """Drafts `count` tokens, computes them again, and keeps what is right. Returns whether at least half of the rows
    that drafted accepted all their drafts."""
    start = texts.cached  # the token at this column is known in all rows, and not in the cache
    known_before = texts.known
    drafted = _draft(passes, texts, rules, start, count)
    passes.cache.verify()
    block = texts.ids[:, start : start + count + 1].clone()
    logits = passes.block(block, start)
    follows = texts.ended > texts.known  # rows whose next column is still wanted
    for offset in range(count + 1):
        column = start + offset + 1
        open_rows = follows & (texts.known == column)  # neither known before nor behind a wrong draft
        if bool(open_rows.any()):
            wanted = rules.distribution(texts.ids[:, :column], logits[:, offset])
            if offset < count:
                accepted, tokens = rules.judge(texts.ids[:, column], drafted[offset], wanted)
                counts.judged += int(open_rows.sum())
                counts.accepted += int((open_rows & accepted).sum())
                follows = follows & (accepted | ~open_rows)
            else:
                tokens = rules.choose(wanted)
            texts.write(column, tokens, open_rows)
            follows = follows & (texts.ended > texts.known)
    _pad_ended(texts, start + count + 1)
    counts.rounds, counts.steps = counts.rounds + 1, counts.steps + count
    texts.cached = _keep(passes.cache, texts, block, start)
    drafting = known_before <= start + count
    whole = texts.known > start + count
    return 2 * int((drafting & whole).sum()) >= int(drafting.sum())


def _draft(passes: _Passes, texts: _Texts, rules: Rules, start: int, count: int) -> list[Tensor]:
    """Drafts `count` tokens behind column `start`; returns the distributions (B, V) that they were chosen from."""
    drafted = []
    passes.cache.begin_drafts()
    for column in range(start, start + count):
        logits = passes.step(texts.ids[:, column], column)
        drafted.append(rules.distribution(texts.ids[:, : column + 1], logits))
        texts.draft(column + 1, rules.choose(drafted[-1]))
    return drafted


def _pad_ended(texts: _Texts, last: int) -> None:
    """Ended rows know all columns up to `last`: padding."""
    for column in range(int(texts.known.min()), last + 1):
        behind = (texts.ended <= texts.known) & (texts.known == column)
        if bool(behind.any()):
            texts.write(column, texts.ids[:, column] if column < texts.ids.shape[1] else texts.ids[:, -1], behind)


def _keep(cache: RefreshCache, texts: _Texts, block: Tensor, start: int) -> int:
    """Keeps the block's tokens that stay in every row, at most all known columns but one; returns how many columns the
    cache then holds."""
    least = int(texts.known.min()) - 1 - start
    stays = (texts.ids[:, start : start + block.shape[1]] == block).all(dim=0)
    right = int(stays.int().cumprod(dim=0).sum())
    count = max(1, min(least, right))
    cache.accept(count)
    return start + count
