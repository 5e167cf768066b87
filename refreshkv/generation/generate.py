"""generate(): does what a model's own `generate` does, with a small cache that it sizes, keeps and uses again.

    refreshkv.generate(model, **inputs, max_new_tokens=256)

The loop is `decode_ahead`, or with `lossless=True` `decode_lossless`. A model that cannot be refreshed, and ways of
decoding other than greedy search and sampling (beams, an assistant), get the model's own `generate`, with one warning
that says why.
"""

import copy
import functools
import threading
import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GENERATION_MODES_MAPPING

from refreshkv.attention.enable import PROMPT_ATTENTIONS, enable
from refreshkv.attention.model_call import NAME
from refreshkv.cache.keyword import as_keyword, given_cache
from refreshkv.cache.preallocated import PreallocatedCache
from refreshkv.cache.refresh import saved_config
from refreshkv.config import RefreshConfig
from refreshkv.errors import NotRefreshable
from refreshkv.generation.cache_pool import CachePool, Shape
from refreshkv.generation.decode_ahead import decode_ahead
from refreshkv.generation.lossless import DraftCounts, decode_lossless
from refreshkv.generation.turns import Stop, Turns

DECODED_HERE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
ORDINARY = "{} decodes with ordinary attention, without a small cache"
OWN_ATTENTION = "it decodes with its own attention"


def generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    refresh: RefreshConfig | None = None,
    cache_length: int | None = None,
    offload: bool = False,
    lossless: bool | DraftCounts = False,
    stream_to: BaseStreamer | None = None,
    **settings: Any,
) -> Any:
    """Generates like `model.generate`, but from a small cache. It takes the same arguments and returns the same values.

    The model is enabled if need be. The cache has room for the prompt and all tokens that the generation settings
    allow, rounded up to a multiple of 128; caches of earlier calls are used again. Calls from several threads take
    turns.

    `functools.partial(refreshkv.generate, model)` may stand in for `model.generate`, and the function may be given as
    `model.generate(..., custom_generate=refreshkv.generate)`. There pass a streamer as `stream_to` and stop strings as
    a `StopStringCriteria`, because transformers passes on neither `streamer` nor `tokenizer`.

    Args:
        model: a transformers decoder.
        inputs: (B, P) token ids; or `input_ids`, or `inputs_embeds`, among the settings.
        generation_config: as in `model.generate`.
        refresh: schedule and selection; None: those saved with the model.
        cache_length: least capacity of the cache in tokens, for later and longer texts. With
            `return_dict_in_generate=True` the output holds the cache, and the next turn of a chat takes it under the
            same name, with all tokens so far as its prompt. It is the caller's from then on.
        offload: as in `RefreshCache`.
        lossless: True: full attention's tokens, or samples of its distribution, drafted from the small cache by
            `decode_lossless`, which has no streamer; a `DraftCounts` is True too, and receives the counts.
        stream_to: a streamer; the same as `streamer`.
        settings: further arguments of `model.generate`, `streamer`, `stop_strings` and `tokenizer` among them. With a
            `custom_generate`, which is another loop, the model's own `generate` gets all arguments.

    Raises `SettingsError` if the model has no saved schedule and `refresh` is None.
    """
    streamer = settings.pop("streamer", None) or stream_to
    call = Call(_state(model), refresh, cache_length, offload, streamer, lossless)
    if hasattr(generation_config, "_eos_token_tensor"):  # transformers prepared it: this is its `custom_generate`
        assert inputs is not None and generation_config is not None
        return _decode(model, inputs, generation_config=generation_config, call=call, **settings)
    arguments = {"inputs": inputs, "generation_config": generation_config, **settings}
    own = functools.partial(type(model).generate, model)
    if arguments.pop("custom_generate", None) is not None:
        return own(**arguments, streamer=call.streamer, custom_generate=settings["custom_generate"])
    reason = _why_ordinary(model, call, arguments)
    if reason is not None:
        return own(**arguments, streamer=call.streamer)
    arguments = _with_criteria(model, arguments)
    arguments, replaced = _taken_out(model, "cache_implementation", arguments)
    if replaced is not None:
        call.state.warn(f"cache_implementation={replaced!r} is left out: the small cache takes its place")
    return own(**arguments, custom_generate=functools.partial(_decode, call=call))


@dataclass
class ModelState:
    """What `generate` keeps of one model between calls."""

    pool: CachePool = field(default_factory=CachePool)
    turns: Turns = field(default_factory=Turns)
    enabling: threading.Lock = field(default_factory=threading.Lock)
    warned: set[str] = field(default_factory=set)

    def warn(self, reason: str) -> None:
        """Warns that a call decodes with ordinary attention, once for each reason."""
        if reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(f"refreshkv: {reason}", stacklevel=4)


@dataclass(frozen=True)
class Call:
    """One call of `generate`: the arguments that `model.generate` does not know."""

    state: ModelState
    refresh: RefreshConfig | None
    cache_length: int | None
    offload: bool
    streamer: BaseStreamer | None
    lossless: bool | DraftCounts

    def decode(self, model: Any, input_ids: Tensor, **settings: Any) -> Any:
        """Decodes by the loop of this call."""
        if self.lossless is False:
            return decode_ahead(model, input_ids, stream_to=self.streamer, **settings)
        drafts = None if self.lossless is True else self.lossless
        return decode_lossless(model, input_ids, streamer=self.streamer, drafts=drafts, **settings)


_STATES: weakref.WeakKeyDictionary[Any, ModelState] = weakref.WeakKeyDictionary()
_STATES_LOCK = threading.Lock()


def _state(model: Any) -> ModelState:
    with _STATES_LOCK:
        return _STATES.setdefault(model, ModelState())


def _why_ordinary(model: Any, call: Call, arguments: dict[str, Any]) -> str | None:
    """Why the model's own `generate` must serve the call, after one warning; None if a small cache can serve it.

    Enables the model.
    """
    try:
        _enable(model, call)
    except NotRefreshable as error:
        reason = f"{error}; {OWN_ATTENTION}"
    else:
        cache = given_cache(arguments)
        if cache is not None and not isinstance(cache, PreallocatedCache):
            return "the caller's own cache"
        reason = _other_way_of_decoding(model, arguments)
    if reason is not None:
        call.state.warn(reason)
    return reason


def _enable(model: Any, call: Call) -> None:
    """Enables the model unless it is; raises `NotRefreshable` if it cannot be."""
    with call.state.enabling:
        if getattr(model.config, "_attn_implementation", None) == NAME and hasattr(model, "refreshkv_calls"):
            return
        own = getattr(model.config, "_attn_implementation", None)
        config = call.refresh if getattr(model.config, "refreshkv", None) is None else None
        enable(model, config, prompt_attention=own if own in PROMPT_ATTENTIONS else "sdpa")


def _other_way_of_decoding(model: Any, arguments: dict[str, Any]) -> str | None:
    """Why no small cache can serve what the call asks for; None if one can."""
    assistant = arguments.get("assistant_model")
    names = ("inputs", "generation_config", "assistant_model", "custom_generate")
    rest = {name: value for name, value in arguments.items() if name not in names}
    config, _ = model._prepare_generation_config(arguments["generation_config"], **rest)
    mode = config.get_generation_mode(assistant)
    if mode not in DECODED_HERE:
        return ORDINARY.format(mode.value.replace("_", " "))
    if config.use_cache is False:
        return "use_cache=False leaves no cache to choose from, so ordinary attention decodes"
    if config.cache_implementation == "paged":
        return 'cache_implementation="paged" decodes with ordinary attention: leave it out for a small cache'
    return None


def _with_criteria(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with stop strings as a stopping criterion, because transformers would not pass on the tokenizer."""
    arguments, strings = _taken_out(model, "stop_strings", arguments)
    tokenizer = arguments.pop("tokenizer", None)
    if strings is None:
        return arguments
    if tokenizer is None:
        raise ValueError("stop_strings need the model's tokenizer: pass tokenizer=")
    own = arguments.get("stopping_criteria") or []
    return {**arguments, "stopping_criteria": StoppingCriteriaList([*own, StopStringCriteria(tokenizer, strings)])}


def _taken_out(model: Any, name: str, arguments: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The arguments without the generation setting `name`, wherever it was set; and its value, None if it was not."""
    config, changed = arguments["generation_config"], dict(arguments)
    of_model = getattr(model.generation_config, name, None)
    values = (changed.pop(name, None), getattr(config, name, None), of_model)
    value = next((value for value in values if value is not None), None)
    if config is not None and getattr(config, name, None) is not None:
        changed["generation_config"] = config = copy.deepcopy(config)
        setattr(config, name, None)
    if of_model is not None:
        changed[name] = None  # an argument None overrides the model's own setting
    return changed, value


def _decode(model: Any, input_ids: Tensor, *, generation_config: GenerationConfig, call: Call, **keywords: Any) -> Any:
    """The decoding method that transformers calls once everything is prepared: the call's loop with a pooled cache."""
    mode, reason = generation_config.get_generation_mode(), None
    try:
        _enable(model, call)
    except NotRefreshable as error:
        reason = f"{error}; {OWN_ATTENTION}"
    if mode not in DECODED_HERE:
        reason = ORDINARY.format(mode.value.replace("_", " "))
    if reason is not None:
        call.state.warn(reason)
        method = getattr(type(model), GENERATION_MODES_MAPPING[mode])
        return method(model, input_ids, generation_config=generation_config, streamer=call.streamer, **keywords)
    criteria = keywords.pop("stopping_criteria")

    def decode(stop: Stop | None) -> Any:
        rules = criteria if stop is None else StoppingCriteriaList([*criteria, stop])
        settings = {**keywords, "stopping_criteria": rules, "generation_config": generation_config}
        return _decode_from_pool(model, input_ids, call, settings)

    return call.state.turns.run(decode, model.device)


def _decode_from_pool(model: Any, input_ids: Tensor, call: Call, settings: dict[str, Any]) -> Any:
    """Decodes with the caller's cache, or with one from the pool, which is then returned to it."""
    config, given = settings["generation_config"], given_cache(settings)
    if isinstance(given, PreallocatedCache) or getattr(given, "_is_user_defined", False):
        return call.decode(model, input_ids, **settings)
    embeddings = settings.get("inputs_embeds")
    prompt = 0 if embeddings is None or input_ids.shape[1] else embeddings.shape[1]  # not counted by max_length
    rows = len(input_ids) if embeddings is None else len(embeddings)
    shape = Shape(rows, call.refresh or saved_config(model.config, "refresh"), call.offload)
    cache = call.state.pool.take(model.config, shape, max(config.max_length + prompt, call.cache_length or 0))
    try:
        return call.decode(model, input_ids, **settings | as_keyword(cache))
    finally:
        if not config.return_dict_in_generate:  # an output that holds the cache is the caller's
            call.state.pool.give_back(shape, cache)
