"""decode_lossless: the tokens of full attention, drafted from the small cache (docs/specification.md, section 11).

    model.generate(..., past_key_values=RefreshCache(...), custom_generate=decode_lossless)

A round drafts some tokens with decoding steps from the small cache. Then it removes what these steps wrote, and
computes the drafts again as one block with full attention. It accepts drafts as long as full attention agrees, and
replaces the first other one. The remaining keys and values are those of full attention. The next round selects a new
small cache: by its first step if the cache has selecting steps, else at the last accepted token. Batch rows accept
different numbers of drafts (`refreshkv.cache.row_lengths`).

The host waits for the device once in a round. If the cache has selecting steps, the next round's first step is queued
before that, so the device has work meanwhile. If all texts have ended, the cache drops this step as it drops drafts.

Where generate() captures the decoding step, CUDA graphs also hold the block and what accepts it, for each number of
drafts that comes again.

Shapes: `B` batch rows, `T` columns of texts, `d` drafts of a round, `n = d + 1` tokens of its block, `V` vocabulary.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from refreshkv.cache.keyword import CACHE_NAME, as_keyword, given_cache
from refreshkv.cache.refresh import RefreshCache
from refreshkv.cache.row_lengths import RowLengths
from refreshkv.generation.compiled_block import block_inputs, compiled_block
from refreshkv.generation.decode_ahead import refuse_other_modes
from refreshkv.generation.graphs import Graphs
from refreshkv.generation.host_copy import HostCopy
from refreshkv.settings import SettingsError

MOST_DRAFT = 16
"""Most drafts of a round, unless `draft_length` is given."""
DRAFT_COST = 0.45
"""Time of a small-cache step divided by that of a block: sets the number of drafts. Results are right for any value."""
FIRST_ACCEPTANCE, MEMORY = 0.9, 0.9
"""The acceptance that the first round assumes, and the weight of earlier rounds in the running mean."""
MORE_COLUMNS = 512
"""Columns by which the texts' tensor grows, at least."""
BY_LOGITS_ALONE = ("Temperature", "TopK", "TopP", "MinP", "Typical", "Epsilon", "Eta")
"""Processors of transformers, `...LogitsWarper`, that do not look at the tokens so far."""
BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings that the host changes with the length of a text."""


@dataclass
class DraftCounts:
    """Counts of lossless decoding, summed over batch rows: `generate(..., drafts=DraftCounts())`."""

    judged: int = 0
    """Drafts that full attention judged: those up to and including each row's first wrong one of a round."""
    accepted: int = 0
    """Drafts that were accepted: in greedy search those equal to full attention's token."""
    rounds: int = 0
    """Blocks with full attention after the prompt."""
    steps: int = 0
    """Steps from the small cache, without a last one that was queued in vain."""
    tokens: int = 0
    """New tokens of the longest row."""

    @property
    def acceptance(self) -> float:
        """Share of the judged drafts that were accepted; 1.0 if none was judged."""
        return self.accepted / self.judged if self.judged else 1.0

    @property
    def tokens_per_round(self) -> float:
        """New tokens of the longest row in a round."""
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
    compile_blocks: bool = False,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Greedy search or sampling, given as `custom_generate` to `generate()`, which calls it.

    Greedy tokens equal those of full attention, up to rounding that depends on how many tokens are computed at a time;
    samples have full attention's distribution (speculative sampling). Needs a `RefreshCache`, best with
    `RefreshConfig.recommended(select_stride=8)`. Logits processors and stopping criteria see each row by itself and
    must depend on their arguments alone. Afterwards the cache holds full attention's keys and values of the tokens up
    to the end of the shortest row, without the last ones; the next call computes the rest.

    Args:
        draft_length: drafts of each round; None: chosen by the acceptance so far.
        drafts: receives the counts.
        compile_blocks: compile the blocks as well. CUDA graphs must hold them, and their attention must be `sdpa`; not
            for models with attention sinks or a softcap. The first block then takes as long as the first compiled step.

    Returns (B, P + new), or the output that `return_dict_in_generate` asks for, without scores. Raises `SettingsError`
    for other caches, and for outputs that are not recorded.
    """
    refuse_other_modes(model, generation_config, synced_gpus, name="decode_lossless")
    cache = _validated_cache(given_cache(model_kwargs), generation_config, streamer)
    _validate_draft_length(draft_length)
    counts = DraftCounts() if drafts is None else drafts
    passes = _Passes(model, cache, generation_config, model_kwargs)
    rules = Rules(logits_processor, stopping_criteria, generation_config)
    texts = _Texts(input_ids, rules)
    first = rules.distribution(input_ids, texts.known, passes.prompt(input_ids)[:, None])
    texts.note(*texts.add(rules.choose(first), torch.ones_like(texts.known)).tolist())
    lengths, acceptance = RowLengths(cache), FIRST_ACCEPTANCE
    passes.find_graphs(compile_blocks)
    while not all(texts.ended):
        length = best_draft_length(acceptance) if draft_length is None else draft_length
        room = min(cache.capacity - max(lengths.numbers) - 1, texts.room)
        length = max(0, min(length, room))
        # the cache has room for one more draft, whatever is accepted; if the shortest row ends, the last round may
        # leave this step unused
        runs_ahead = lengths.selects_by_step and room - (length + 1) >= 1
        judged, accepted = _round(passes, texts, rules, lengths, length, runs_ahead)
        counts.judged, counts.accepted = counts.judged + judged, counts.accepted + accepted
        counts.rounds, counts.steps = counts.rounds + 1, counts.steps + length
        if judged:
            acceptance = MEMORY * acceptance + (1 - MEMORY) * accepted / judged
    ids = texts.finished()
    counts.tokens += ids.shape[1] - input_ids.shape[1]
    lengths.restore()
    cache.tokens = ids[:, : cache.length]
    sequences: Any = ids  # declared as torch.LongTensor
    as_dict = generation_config.return_dict_in_generate
    return GenerateDecoderOnlyOutput(sequences=sequences, **as_keyword(cache)) if as_dict else ids


def best_draft_length(acceptance: float) -> int:
    """The number of drafts with the most tokens per time, if each is accepted with this probability."""
    share = min(acceptance, 0.999)
    gains = [(1 - share ** (n + 1)) / (1 - share) / (1 + DRAFT_COST * n) for n in range(1, MOST_DRAFT + 1)]
    return 1 + gains.index(max(gains))


def _validate_draft_length(length: int | None) -> None:
    if length is not None and (isinstance(length, bool) or length < 1):
        raise SettingsError(f"draft_length must be a whole number >= 1 or None, got {length!r}")


def _validated_cache(cache: Any, config: GenerationConfig, streamer: BaseStreamer | None) -> RefreshCache:
    if not isinstance(cache, RefreshCache):
        raise SettingsError(
            f"decode_lossless drafts from a small cache: pass {CACHE_NAME}=RefreshCache(config=model.config, ...)"
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
    """Calls the model: for the prompt, for one drafted token of each row, for a block of drafts."""

    # PreTrainedModel does not declare the methods that generate() calls.
    def __init__(self, model: Any, cache: RefreshCache, config: GenerationConfig, model_kwargs: dict[str, Any]):
        self.model, self.cache, self.config, self.kwargs = model, cache, config, model_kwargs
        self.compiles = model._valid_auto_compile_criteria(model_kwargs, config)
        self.step_call = model.get_compiled_call(config.compile_config) if self.compiles else model.__call__
        self.graphs: Graphs | None = None
        """The captured blocks; None where they are not captured."""
        self.size = 0
        """Tokens of the last block, if it is captured."""
        self.compiled_block: Any = None
        """The compiled call of blocks; None: they are not compiled."""
        self.queued: Tensor | None = None
        """The logits of the step that `queue_step` queued, until `first_step`."""

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
        mask = self.kwargs.get("attention_mask")
        tokens = input_ids.shape[1] if mask is None else mask.sum(dim=-1, keepdim=True)
        self.offset = tokens - input_ids.shape[1]
        """A token's position less its column in the text: a number, or (B, 1)."""
        return logits.float()

    def step(self, tokens: Tensor, columns: Tensor) -> Tensor:
        """The logits (B, V) of drafted tokens (B,) in these columns (B,) of their texts, from the small cache."""
        # the cache's layers know the padding, and a compiled step takes no mask
        call = {"input_ids": tokens[:, None].contiguous(), "position_ids": columns[:, None] + self.offset}
        output = self.step_call(**call, **as_keyword(self.cache), use_cache=True, return_dict=True)
        return output.logits[:, -1].to(copy=True, dtype=torch.float32)

    def queue_step(self, texts: "_Texts") -> None:
        """Queues the step of each row's last known token, which is the next round's first one."""
        self.queued = self.step(texts.last(), texts.known - 1)

    def first_step(self, texts: "_Texts") -> Tensor:
        """The logits (B, V) of the step of each row's last known token."""
        if self.queued is None:
            self.queue_step(texts)
        logits, self.queued = self.queued, None
        assert logits is not None
        return logits

    def find_graphs(self, compile_blocks: bool) -> None:
        """Finds the graphs that earlier calls captured for this model and cache. Call this after the prompt.

        compile_blocks: compile the blocks before they are captured.
        """
        if self.compiles and can_capture(self.model, self.cache):
            weights = (*self.model.parameters(), *self.model.buffers())
            addresses = (*(weight.data_ptr() for weight in weights), *self.cache.addresses())
            if self.cache.graphs is None or self.cache.graphs.addresses != addresses:
                self.cache.graphs = Graphs(addresses, self.model.device)
            self.graphs = self.cache.graphs
        if compile_blocks:
            self._validate_compiled_blocks()
            self.compiled_block = compiled_block(self.model)

    def _validate_compiled_blocks(self) -> None:
        attention = self.model.refreshkv_calls.prompt_attention
        if self.graphs is None:
            raise SettingsError(
                "compile_blocks=True compiles the blocks in CUDA graphs, and here are none: leave it out"
            )
        if attention != "sdpa":
            raise SettingsError(
                f"compile_blocks=True computes sdpa, and the prompt's attention is {attention}: leave it out"
            )
        if any(layer.has_terms for layer in self.cache.refresh_layers()):
            raise SettingsError("compile_blocks=True does not follow attention sinks, nor a softcap: leave it out")

    @property
    def kind(self) -> str:
        """Prefix of the graphs' names. Compiled and other blocks have graphs of their own, because `accept` reads
        tensors of the block that it was captured after."""
        return "" if self.compiled_block is None else "compiled "

    def block(self, tokens: Tensor, columns: Tensor, lengths: RowLengths) -> Tensor:
        """The logits (B, n, V) of tokens (B, n) in these columns (B, n) of their texts, with full attention."""
        count = tokens.shape[1]
        if self.graphs is None:
            self.cache.verify()
            return self._block(tokens, columns + self.offset, lengths.padding_now if lengths.is_padded else None)
        self.size = self._captured_size(count, lengths)
        tokens = torch.cat([tokens, tokens[:, -1:].expand(-1, self.size - count)], dim=1)
        positions = columns[:, :1] + torch.arange(self.size, device=tokens.device) + self.offset
        block = partial(self._block_on_device, lengths)
        return self.graphs.run((f"{self.kind}block", self.size), block, tokens, positions)[:, :count]

    def _captured_size(self, count: int, lengths: RowLengths) -> int:
        """The number of tokens of the block that computes `count` tokens: more if only a larger block is captured."""
        assert self.graphs is not None
        most = min(2 * count, self.cache.capacity - max(lengths.numbers))
        sizes = [size for name, size in self.graphs.captured() if name == f"{self.kind}block"]
        return min((size for size in sizes if count <= size <= most), default=count)

    def _block_on_device(self, lengths: RowLengths, tokens: Tensor, positions: Tensor) -> Tensor:
        """The logits of the block, whose columns and padding are on the device: the host does not wait for them."""
        columns = lengths.columns(tokens.shape[1])
        compiled = self.compiled_block if len(columns) > 1 else None
        self.cache.verify(columns, compiled is not None)
        if compiled is None:
            return self._block(tokens, positions, lengths.padding_now)
        return compiled(tokens, positions, lengths.padding_now, columns, self.cache)

    def _block(self, tokens: Tensor, positions: Tensor, padding: Tensor | None) -> Tensor:
        return self.model(**block_inputs(tokens, positions, padding, self.cache)).logits.float()

    def accept(self, counts: Tensor, lengths: RowLengths) -> None:
        """Keeps the first `counts` (B,) tokens of each row of the last block."""
        if self.graphs is None:
            lengths.accept(counts)
        else:
            self.graphs.run((f"{self.kind}accept", self.size), lengths.accept, counts)


def can_capture(model: Any, cache: RefreshCache) -> bool:
    """Whether a CUDA graph can hold a block of drafts: the device decides everything in it."""
    layers, calls = cache.refresh_layers(), model.refreshkv_calls
    is_on_one_gpu = model.device.type == "cuda" and {layer.device for layer in layers} == {model.device}
    selects_by_step = cache.config.select_stride is not None and layers[0].attends_by_kernels
    rotations = str(getattr(model.config.get_text_config(), "rope_parameters", None))
    is_static = getattr(model, "_can_compile_fullgraph", False) and not any(name in rotations for name in BY_LENGTH)
    return is_on_one_gpu and selects_by_step and is_static and not calls.prompt_attention.startswith("flash")


class Rules:
    """How tokens are chosen from logits, and when texts end."""

    def __init__(self, process: LogitsProcessorList, criteria: StoppingCriteriaList, config: GenerationConfig):
        self.process: Any = process  # transformers annotates its tokens as torch.LongTensor
        self.samples = bool(config.do_sample)
        free = tuple(getattr(logits_process, f"{name}LogitsWarper") for name in BY_LOGITS_ALONE)
        self.needs_ids = any(not isinstance(rule, free) for rule in process)
        """Whether a processor may look at the tokens so far."""
        lengths = [rule.max_length for rule in criteria if isinstance(rule, MaxLengthCriteria)]
        self.max_length: int | None = min(lengths, default=None)
        self.end_tokens = [rule.eos_token_id for rule in criteria if isinstance(rule, EosTokenCriteria)]
        self.others = [rule for rule in criteria if not isinstance(rule, (MaxLengthCriteria, EosTokenCriteria))]
        padding: Tensor | None = getattr(config, "_pad_token_tensor", None)
        self.padding = 0 if padding is None else int(padding)
        """The token behind the end of a text."""

    def distribution(self, ids: Tensor, lengths: Tensor, logits: Tensor) -> Tensor:
        """The distribution from which tokens are chosen: processed logits, or with sampling their probabilities.

        logits (B, n, V): of the tokens that follow the first `lengths`, `lengths + 1`, ... columns of ids (B, T).
        """
        if len(self.process) == 0:
            scores = logits
        elif self.needs_ids:
            scores = self._process_each(ids, lengths, logits)
        else:
            flat = logits.flatten(0, 1)
            scores = self.process(ids.new_zeros(len(flat), 1), flat).view_as(logits)
        return scores.softmax(dim=-1) if self.samples else scores

    def _process_each(self, ids: Tensor, lengths: Tensor, logits: Tensor) -> Tensor:
        scores = torch.empty_like(logits)
        for offset in range(logits.shape[1]):
            for rows, length in _groups(lengths + offset):
                scores[rows, offset] = self.process(ids[rows, :length], logits[rows, offset])
        return scores

    def choose(self, distribution: Tensor) -> Tensor:
        """A token of each distribution (B, n, V), the likeliest or a draw: (B, n)."""
        if not self.samples:
            return distribution.argmax(dim=-1)
        return torch.multinomial(distribution.flatten(0, 1), 1).view(distribution.shape[:2])

    def judge(self, drafts: Tensor, drafted: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """How many of the drafts (B, d) are accepted, (B,), and the token (B,) that follows them.

        drafted (B, d, V), wanted (B, d + 1, V): the distributions of the small cache and of full attention. In sampling
        a draft x is accepted with probability min(1, wanted(x) / drafted(x)), else another token is drawn from max(0,
        wanted - drafted). The token then has the distribution `wanted` (Leviathan et al., 2023, arXiv 2211.17192).
        """
        count, row = drafts.shape[1], torch.arange(len(drafts), device=drafts.device)
        if count == 0:
            return torch.zeros_like(row), self.choose(wanted).squeeze(1)
        if not self.samples:
            right = wanted.argmax(dim=-1)
            accepted = (right[:, :count] == drafts).long().cumprod(dim=1).sum(dim=1)
            return accepted, right[row, accepted]
        index = drafts.unsqueeze(-1)
        share = (wanted[:, :count].gather(2, index) / drafted.gather(2, index)).squeeze(-1)
        accepted = (torch.rand_like(share) < share).long().cumprod(dim=1).sum(dim=1)
        padded = torch.cat([drafted, torch.zeros_like(wanted[:, :1])], dim=1)  # after the last draft: all of `wanted`
        here = wanted[row, accepted]
        rest = (here - padded[row, accepted]).clamp(min=0)
        rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, here)  # equal up to rounding
        return accepted, torch.multinomial(rest, 1).squeeze(1)

    def ends(self, ids: Tensor, known: Tensor, tokens: Tensor) -> Tensor:
        """Whether a text ends with each of tokens (B, n), which stand in ids (B, T) from column `known` on: (B, n)."""
        lengths = known[:, None] + torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        found = torch.zeros_like(tokens, dtype=torch.bool)
        if self.max_length is not None:
            found |= lengths >= self.max_length
        for end in self.end_tokens:
            found |= torch.isin(tokens, end.to(tokens.device))
        for rule in self.others:
            for offset in range(tokens.shape[1]):
                for rows, length in _groups(known + offset + 1):
                    found[rows, offset] |= rule(ids[rows, :length], None)
        return found


def _groups(lengths: Tensor) -> list[tuple[list[int], int]]:
    """The batch rows of each length: lengths (B,) -> (rows, length)."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths.tolist()):
        groups.setdefault(length, []).append(row)
    return [(rows, length) for length, rows in groups.items()]


class _Texts:
    """The texts so far. ids (B, T); known (B,): columns of each row that are final; has_ended (B,) bool.

    Columns behind the known ones hold drafts, or anything. The last known token of a row is not in the cache.
    """

    def __init__(self, input_ids: Tensor, rules: Rules):
        self.rules, self.ids = rules, input_ids
        self.known = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
        self.has_ended = torch.zeros_like(self.known, dtype=torch.bool)
        self.numbers, self.ended = [input_ids.shape[1]] * len(input_ids), [False] * len(input_ids)
        """`known` and `has_ended` for the host, once `note` was told what `add` did."""

    @property
    def room(self) -> int:
        """Most drafts that the shortest row can still take."""
        if self.rules.max_length is None:
            return sys.maxsize
        running = (number for number, has_ended in zip(self.numbers, self.ended, strict=True) if not has_ended)
        return self.rules.max_length - min(running) - 1

    def last(self) -> Tensor:
        """The last known token of each row, (B,)."""
        return self.ids.gather(1, self.known[:, None] - 1).squeeze(1)

    def write(self, tokens: Tensor) -> None:
        """Writes tokens (B, n) behind each row's known ones."""
        missing = max(self.numbers) + tokens.shape[1] - self.ids.shape[1]
        if missing > 0:
            more = self.ids.new_zeros(len(self.ids), max(missing, MORE_COLUMNS))
            self.ids = torch.cat([self.ids, more], dim=1)
        columns = self.known[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        self.ids.scatter_(1, columns, tokens)

    def add(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Makes the first `counts` (B,) of tokens (B, n) final, up to where a text ends.

        Returns (2, B): how many were, and which texts have ended. `note` needs both before the next call.
        """
        self.write(tokens)
        number = torch.arange(tokens.shape[1], device=tokens.device)
        ends = self.rules.ends(self.ids, self.known, tokens) & (number < counts[:, None])
        before_end = (ends.long().cumsum(dim=1) - ends.long()) == 0
        final = before_end & (number < counts[:, None]) & ~self.has_ended[:, None]
        added = final.sum(dim=1)
        self.known = self.known + added
        self.has_ended = self.has_ended | (ends & final).any(dim=1)
        return torch.stack([added, self.has_ended.long()])

    def note(self, added: list[int], ended: list[int]) -> None:
        """Notes on the host what `add` returned."""
        self.numbers = [number + more for number, more in zip(self.numbers, added, strict=True)]
        self.ended = [bool(flag) for flag in ended]

    def finished(self) -> Tensor:
        """The texts up to the end of the longest one, with padding behind the others."""
        ids = self.ids[:, : max(self.numbers)]
        column = torch.arange(ids.shape[1], device=ids.device)
        return ids.masked_fill(column >= self.known[:, None], self.rules.padding)


def _round(
    passes: _Passes, texts: _Texts, rules: Rules, lengths: RowLengths, count: int, runs_ahead: bool
) -> tuple[int, int]:
    """Drafts `count` tokens, computes them again, and keeps the accepted ones; returns how many drafts were judged and
    accepted. The host waits for the device once; with `runs_ahead` it queues the next round's first step before."""
    columns = texts.known[:, None] + torch.arange(-1, count, device=texts.known.device)
    drafts, drafted = _draft(passes, texts, rules, columns)
    block = torch.cat([texts.last()[:, None], drafts], dim=1)
    logits = passes.block(block, columns, lengths)
    if rules.needs_ids:
        texts.write(drafts)
    wanted = rules.distribution(texts.ids, texts.known, logits)
    accepted, follows = rules.judge(drafts, drafted, wanted)
    new = torch.cat([drafts, follows[:, None]], dim=1).scatter(1, accepted[:, None], follows[:, None])
    was_running = ~texts.has_ended
    added = texts.add(new, accepted + 1)
    passes.accept(added[0], lengths)
    judged = (accepted + 1).clamp(max=count)
    report = HostCopy(torch.cat([added, torch.stack([judged, accepted]) * was_running]))
    if runs_ahead:
        lengths.begin_steps()
        passes.queue_step(texts)
    counted, ended, *judgement = report.wait()[0].tolist()
    texts.note(counted, ended)
    lengths.note(counted, steps=int(runs_ahead and not all(ended)))
    return sum(judgement[0]), sum(judgement[1])


def _draft(passes: _Passes, texts: _Texts, rules: Rules, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Drafts d tokens of each row. columns (B, d + 1): the column of each row's last known token, then those of its
    drafts. Returns the drafts (B, d) and, in sampling, the distributions (B, d, V) that they were drawn from."""
    drafts, drafted = [texts.ids[:, :0]], []
    for number in range(columns.shape[1] - 1):
        if number == 0:
            logits = passes.first_step(texts)
        else:
            logits = passes.step(drafts[-1].squeeze(1), columns[:, number])
        if rules.needs_ids:
            texts.write(torch.cat(drafts, dim=1))
        distribution = rules.distribution(texts.ids, texts.known + number, logits[:, None])
        if rules.samples:
            drafted.append(distribution)
        drafts.append(rules.choose(distribution))
    return torch.cat(drafts, dim=1), torch.cat(drafted, dim=1) if drafted else torch.empty(0)
