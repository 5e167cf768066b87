"""decode_ahead: a loop for `generate()` that queues the next step before it reads the last one's result.

    model.generate(..., past_key_values=RefreshCache(...), custom_generate=decode_ahead)

After each token transformers' own loop waits for the GPU to say whether all sequences have ended. Here this flag is
copied to the host while the next step is already queued, and read one step late. If that step was one too many, it is
taken back: its token, its scores, its random numbers, and its changes of the cache.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.utils.generic import ModelOutput

from refreshkv.cache.keyword import as_keyword, given_cache
from refreshkv.cache.preallocated import PreallocatedCache
from refreshkv.cache.preallocated_layer import validate_room
from refreshkv.generation.host_copy import HostCopy


def decode_ahead(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    stream_to: BaseStreamer | None = None,
    synced_gpus: bool = False,
    run_ahead: bool | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Greedy search or sampling, given as `custom_generate` to `generate()`, which calls it.

    Returns what transformers' own loop returns, with the same tokens, scores and cache, also for a seed: (B, P + new),
    or the output that `return_dict_in_generate` asks for. input_ids (B, P).

    Logits processors and stopping criteria are called as usual, and once more for a step that is taken back; one that
    reads values from the device makes the host wait. A criterion on time is evaluated one step early.

    Args:
        stream_to: a streamer; it gets tokens one step late. Pass it to `generate()` under this name, because
            `generate()` does not pass `streamer=`, `assistant_model=` and `tokenizer=` on to a `custom_generate`: a
            `streamer=` gets the prompt only, and an `assistant_model=` is not used. Pass stop strings as
            `stopping_criteria=[StopStringCriteria(tokenizer, [...])]`.
        run_ahead: whether to queue the next step before it is known whether the text has ended; None: on a GPU only. It
            has no effect if the cache is not croppable (offloaded caches, sliding windows) or a cache of
            transformers: the host then waits for each step, unless only the number of tokens ends the text.

    Raises `ValueError` for beams, encoder-decoder models and parameters that are spread over processes, and
    `RuntimeError` if probabilities to sample from are not numbers.
    """
    refuse_other_modes(model, generation_config, synced_gpus, name="decode_ahead")
    if stream_to is not None:
        streamer = stream_to
        streamer.put(input_ids.cpu())
    forward = _Forward(model, generation_config, model_kwargs)
    sequences = _Sequences(input_ids, logits_processor, stopping_criteria, generation_config)
    is_watched = sequences.may_end_early or sequences.do_sample or streamer is not None
    limit = min(
        (rule.max_length for rule in stopping_criteria if isinstance(rule, MaxLengthCriteria)), default=math.inf
    )

    sequences.add(forward.prompt(input_ids))
    # the host waits for the first token, because compiling the next step may take minutes
    finished = is_watched and sequences.report().deliver(streamer)
    if not finished:
        runs_ahead = is_watched and _can_run_ahead(forward.cache, input_ids, run_ahead)
        undo = _Undo(forward.cache, sequences) if runs_ahead else None
        _decode(forward, sequences, limit, is_watched, undo, streamer)
    if streamer is not None:
        streamer.end()
    return sequences.output(forward.cache)


def _decode(
    forward: "_Forward",
    sequences: "_Sequences",
    limit: float,
    is_watched: bool,
    undo: "_Undo | None",
    streamer: BaseStreamer | None,
) -> None:
    """Takes steps until the sequences have `limit` tokens, or have ended.

    is_watched: whether the host reads each step's report. undo: takes back the surplus step that was queued before the
    report of the last step was read; None: the host reads each report before the next step.
    """
    finished, awaited = False, None
    while not finished and sequences.ids.shape[1] < limit:
        if awaited is not None and not forward.has_room():
            finished, awaited = awaited.deliver(streamer), None
            continue
        if undo is not None:
            undo.before_step()
        sequences.add(forward.step(sequences))
        if is_watched:
            report = sequences.report()
            if undo is not None:
                report, awaited = awaited, report
            finished = report is not None and report.deliver(streamer)
    if awaited is not None and finished:
        assert undo is not None  # else each report was delivered before the next step
        undo.take_back_step()
    elif awaited is not None:
        awaited.deliver(streamer)


def refuse_other_modes(
    model: PreTrainedModel, generation_config: GenerationConfig, synced_gpus: bool, *, name: str
) -> None:
    """Raises `ValueError`, which names the loop, for what only `generate()` itself can do."""
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"{name} is for greedy search and sampling, not {mode.value}: leave out custom_generate")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is for decoders: leave out custom_generate")
    is_spread = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    if synced_gpus or (is_spread and dist.is_initialized() and dist.get_world_size() > 1):
        raise ValueError(f"{name} does not keep step with other processes (synced_gpus): leave out custom_generate")


def _can_run_ahead(cache: Any, input_ids: Tensor, wanted: bool | None) -> bool:
    """Whether to queue the next step before it is known whether the text has ended."""
    wanted = input_ids.is_cuda if wanted is None else wanted
    return wanted and isinstance(cache, PreallocatedCache) and cache.is_croppable


class _Forward:
    """Calls the model: for the prompt, then for one token at a time."""

    # PreTrainedModel does not declare the methods that generate() calls.
    def __init__(self, model: Any, generation_config: GenerationConfig, model_kwargs: dict[str, Any]):
        self.model, self.config, self.kwargs = model, generation_config, model_kwargs
        compiles = model._valid_auto_compile_criteria(model_kwargs, generation_config)
        self.call = model.get_compiled_call(generation_config.compile_config) if compiles else model.__call__
        self.inputs: dict[str, Any] | None = None
        self.length = 0
        """Tokens in a `PreallocatedCache`, counted by the host."""

    @property
    def cache(self) -> Any:
        return given_cache(self.kwargs)

    def prompt(self, input_ids: Tensor) -> ModelOutput:
        outputs = self.model._prefill(input_ids, self.config, self.kwargs)
        self._update(outputs)
        if isinstance(self.cache, PreallocatedCache):
            self.length = self.cache.length
        return outputs

    def has_room(self) -> bool:
        """Whether the cache can take another token."""
        return not isinstance(self.cache, PreallocatedCache) or self.length < self.cache.capacity

    def step(self, sequences: "_Sequences") -> ModelOutput:
        """One decoding step. The caller must not keep the outputs: the next replay of a CUDA graph overwrites them."""
        if isinstance(self.cache, PreallocatedCache):
            validate_room(self.length + 1, self.cache.capacity)
        if self.inputs is not None:
            # the same inputs as transformers would prepare, without slicing sequences that grow
            self.inputs["input_ids"] = sequences.tokens[:, None]
            self.inputs["position_ids"] = self.inputs["position_ids"] + 1
            outputs = self.call(**self.inputs, return_dict=True)
        else:
            kept = 1 if self.kwargs["use_cache"] else None
            inputs = self.model.prepare_inputs_for_generation(sequences.ids, next_sequence_length=kept, **self.kwargs)
            outputs = self.call(**inputs, return_dict=True)
            self._update(outputs)
            self.inputs = inputs if self._can_be_reused(inputs, sequences.ids) else None
        self.length += 1
        return outputs

    def _update(self, outputs: ModelOutput) -> None:
        self.kwargs = self.model._update_model_kwargs_for_generation(outputs, self.kwargs)

    def _can_be_reused(self, inputs: dict[str, Any], ids: Tensor) -> bool:
        """Whether the next step's inputs differ from these only in the token and its position."""
        if not isinstance(self.cache, PreallocatedCache) or not self.cache.is_compileable:
            return False
        masks = inputs.get("attention_mask")
        masks = masks.values() if isinstance(masks, dict) else [masks]
        tensors = {name for name, value in inputs.items() if isinstance(value, Tensor)}
        is_here = tensors == {"input_ids", "position_ids"} and inputs["input_ids"].device == ids.device
        return is_here and all(mask is None for mask in masks)


class _Sequences:
    """The sequences so far and their recorded outputs; chooses the next tokens from the model's outputs.

    Shapes: `ids` (B, T), `tokens` (B,) the last ones, `unfinished` (B,) bool.
    """

    def __init__(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ):
        self.process, self.is_done, self.do_sample = logits_processor, stopping_criteria, config.do_sample
        self.ids = input_ids
        self.unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        self.padding: Tensor | None = None
        if any(hasattr(rule, "eos_token_id") for rule in stopping_criteria):
            assert config._pad_token_tensor is not None  # generate() sets it where a token ends the text
            self.padding = config._pad_token_tensor.to(input_ids.device)
        self.may_end_early = any(type(rule) is not MaxLengthCriteria for rule in stopping_criteria)
        self.as_dict = config.return_dict_in_generate
        names = ("scores", "logits", "attentions", "hidden_states")
        asked = [name for name in names if self.as_dict and getattr(config, f"output_{name}")]
        self.records: dict[str, tuple] = dict.fromkeys(asked, ())

    def add(self, outputs: Any) -> None:
        """Takes a model's outputs: appends one token to each sequence, and padding to those that have ended."""
        self.earlier = (self.ids, dict(self.records))
        # a copy: the outputs' memory may hold a whole prompt's logits, and the next step may overwrite it
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=self.ids.device)
        scores = self.process(self.ids, logits)
        found = {"scores": scores, "logits": logits}
        for name in self.records:
            self.records[name] += (found[name] if name in found else getattr(outputs, name),)
        self.tokens = self._choose(scores)
        if self.padding is not None:
            self.tokens = torch.where(self.unfinished, self.tokens, self.padding)
        self.ids = torch.cat([self.ids, self.tokens[:, None]], dim=-1)
        self.unfinished = self.unfinished & ~self.is_done(self.ids, self.records.get("scores"))

    def _choose(self, scores: Tensor) -> Tensor:
        """Returns the likeliest tokens (B,) of scores (B, V), or draws tokens.

        A draw equals that of torch.multinomial, which would wait for the device: the index of the largest quotient of a
        probability and an exponentially distributed number.
        """
        if not self.do_sample:
            return scores.argmax(dim=-1)
        probabilities = scores.softmax(dim=-1)
        self.invalid = probabilities.isnan().any()
        return probabilities.div(torch.empty_like(probabilities).exponential_()).argmax(dim=-1)

    def report(self) -> "_Report":
        """The report of the last step, being copied to the host."""
        return _Report(self.unfinished.any(), self.tokens, self.invalid if self.do_sample else None)

    def take_back(self) -> None:
        """Removes the last tokens and their records."""
        self.ids, self.records = self.earlier

    def output(self, cache: Any) -> Tensor | GenerateDecoderOnlyOutput:
        if not self.as_dict:
            return self.ids
        ids: Any = self.ids  # the field is declared as LongTensor, which no operation returns
        return GenerateDecoderOnlyOutput(sequences=ids, **{**as_keyword(cache), **self.records})


class _Report:
    """A step's tokens and whether any sequence goes on, copied to the host; nothing waits until `deliver`."""

    def __init__(self, goes_on: Tensor, tokens: Tensor, invalid: Tensor | None):
        self.copy = HostCopy(goes_on, tokens, *(() if invalid is None else (invalid,)))

    def deliver(self, streamer: BaseStreamer | None) -> bool:
        """Waits for the step and streams its tokens; returns whether all sequences have ended."""
        goes_on, tokens, *invalid = self.copy.wait()
        if any(bool(flag) for flag in invalid):
            raise RuntimeError(
                "the probabilities to sample from are not numbers: the model's logits are infinite or nan"
            )
        if streamer is not None:
            streamer.put(tokens)
        return not bool(goes_on)


class _Undo:
    """Takes back the last decoding step: its tokens, its records, its random numbers and its changes of the cache."""

    def __init__(self, cache: PreallocatedCache, sequences: _Sequences):
        self.cache, self.sequences = cache, sequences
        self.generator = _generator(sequences.ids.device) if sequences.do_sample else None
        cache.activate_past_recording()
        self.is_first = True

    def before_step(self) -> None:
        """Keeps what the next step changes."""
        if not self.is_first:
            self.cache.crop(0)
        self.is_first = False
        if self.generator is not None:
            self.random = self.generator.get_state()

    def take_back_step(self) -> None:
        """Restores the state at the last `before_step`."""
        self.sequences.take_back()
        if self.generator is not None:
            self.generator.set_state(self.random)
        self.cache.crop(-1)


def _generator(device: torch.device) -> torch.Generator:
    """The generator that sampling on this device draws from."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
