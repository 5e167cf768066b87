"""Passes the simulation, the trace and the cache of a model's call on to its attention modules.

Decoders differ in what they pass on to their layers: StableLM and Nemotron drop keywords that they do not know, and
OLMo 3 and NanoChat replace `use_cache`. So nothing is passed through the layers here. A hook on the model takes
`simulation=` and `trace=` out of the call and keeps them in the model's `ModelCalls`. A hook on each attention module
reads them there and adds them to the keywords that transformers passes on to the attention function.

Under activation checkpointing a backward pass computes layers again, after the call has ended and perhaps after another
one. Each forward pass makes position embeddings of its own, and the repeated layer gets the same ones: they identify
the call that the layer belonged to. A layer that cannot be identified is refused, never computed with other settings.
"""

import inspect
import itertools
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.cache_utils import StaticLayer

from refreshkv.attention.chunks import validate_layers
from refreshkv.attention.inputs import validate_inputs, without_packing
from refreshkv.attention.look_ahead_module import look_ahead_of, rotation_of
from refreshkv.attention.two_streams import OTHER_LAYERS, add_stream, join_streams
from refreshkv.cache.keyword import CACHE_NAME, given_cache
from refreshkv.cache.preallocated import PreallocatedCache
from refreshkv.config import Simulation, Trace
from refreshkv.errors import NotRefreshable
from refreshkv.layers import RECURRENT, LayerKind
from refreshkv.settings import SettingsError

NAME = "refreshkv"
"""The name under which the attention is registered with transformers."""

NOT_OURS = (
    "another attention was set after refreshkv.enable(model), so neither a simulation nor a RefreshCache is followed: "
    "call refreshkv.enable(model) again"
)

TRACED: defaultdict[int, set[int]] = defaultdict(set)
"""From the number of a `ModelCalls` to the layers that torch.compile traced with the refresh attention: compiled code
runs no Python, so it cannot count them in each call."""

TRACED_THREAD = 0
"""The thread of a call that compiled code opened; no thread has this number."""

_NUMBERS = itertools.count()

KEYWORDS = ("simulation", "refresh", "trace")
"""Our keywords of a model's call; `refresh` is the older name of `simulation`."""


@dataclass(eq=False)  # calls of several threads are told apart by identity
class ModelCall:
    """One running call of a model."""

    owner: nn.Module
    """The module that was called: the whole model, or its decoder without the output layer."""
    simulation: Simulation | None
    trace: Trace | None
    cache: PreallocatedCache | None
    """The cache that the call decodes from."""
    has_gradients: bool
    thread: int
    layers: set[int] = field(default_factory=set)
    """Numbers of the layers whose attention followed the simulation or the cache so far."""

    @property
    def uses_cache(self) -> bool:
        """Whether the call decodes from a `PreallocatedCache`."""
        return self.cache is not None

    @property
    def purpose(self) -> tuple[int, int, bool]:
        """Identifies what the call does: a call within another one with the same purpose is a part of it."""
        return id(self.simulation), id(self.trace), self.uses_cache


class ModelCalls:
    """The running calls of one model, shared by the model, its decoder and its attention modules.

    kinds: what each layer is. prompt_attention: transformers' attention for prompts.
    """

    def __init__(self, kinds: list[LayerKind], prompt_attention: str):
        self.kinds, self.prompt_attention = kinds, prompt_attention
        self.refreshable = frozenset(number for number, kind in enumerate(kinds) if kind.is_refreshed)
        """Numbers of the full-attention layers."""
        self.running: list[ModelCall] = []
        self.ended = WeakTensorKeyDictionary()
        """From a pass's position embeddings to its simulation and trace, for as long as a backward pass may come."""
        self.had_gradients = False
        """Whether any simulated call had gradients."""
        self.number = next(_NUMBERS)
        """The key in `TRACED`."""

    def __getstate__(self) -> dict[str, Any]:
        return {"kinds": self.kinds, "prompt_attention": self.prompt_attention}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def innermost(self) -> ModelCall | None:
        """The innermost call that runs in this thread.

        Code that torch.compile traces cannot ask for its thread, so there it is the innermost call of all. A call may
        be opened by compiled code and read by uncompiled code, or the other way round: after a graph break each part
        of a pass may have reached torch's recompile limit.
        """
        if not self.running:  # also what a compiled decoding step finds
            return None
        if torch.compiler.is_compiling():
            return self.running[-1]
        threads = (threading.get_ident(), TRACED_THREAD)
        return next((call for call in reversed(self.running) if call.thread in threads), None)

    def begin(self, call: ModelCall) -> None:
        """Opens a call, unless the call around it has the same simulation, trace and use of a cache."""
        around = self.innermost()
        if around is None or around.purpose != call.purpose:
            self.running.append(call)
        if call.simulation is not None and call.has_gradients:
            self.had_gradients = True

    def settings_for(self, module: nn.Module, keywords: dict[str, Any]) -> tuple[Simulation | None, Trace | None]:
        """The simulation and trace for an attention module that is called with these keywords.

        Raises `RuntimeError` in a backward pass that does not tell which call the layer belonged to.
        """
        call = self.innermost()
        embeddings = _position_embeddings(keywords)
        is_backward = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if is_backward and embeddings is not None and embeddings in self.ended:  # even within another call
            return self.ended[embeddings]
        if call is not None:
            if call.has_gradients and embeddings is not None and not torch.compiler.is_compiling():
                self.ended[embeddings] = call.simulation, call.trace
            return call.simulation, call.trace
        if torch.compiler.is_compiling() or not self.had_gradients:
            return None, None
        if not is_backward:  # the layer was called by itself
            return None, None
        raise RuntimeError(
            f"activation checkpointing: layer {module.layer_idx} is computed again without the position embeddings of "
            "its forward pass, so its simulation is unknown: turn checkpointing off for this model"
        )

    def note(self, layer: int) -> None:
        """Counts a layer whose attention follows the running call's simulation or cache.

        Raises `NotRefreshable` for a layer that runs twice in a call with a cache: the second run would read the keys
        and values of the first.
        """
        if torch.compiler.is_compiling():
            _note_traced(self.number, layer)
        elif (call := self.innermost()) is not None:
            if call.uses_cache and layer in call.layers:
                raise NotRefreshable(
                    f"layer {layer} runs more than once in each pass of the model, and {type(call.cache).__name__} "
                    "holds keys and values of one run: use a cache of transformers for models that repeat layers"
                )
            call.layers.add(layer)

    def end(self, owner: Any, is_complete: bool) -> None:
        """Closes the call of `owner`, if it opened one; raises `RuntimeError` if a complete call left layers out."""
        call = self.innermost()
        if call is None or call.owner is not owner:
            return
        self.running.remove(call)
        if not is_complete and call.cache is not None:
            call.cache.break_off()
        if not is_complete or torch.compiler.is_compiling():
            return
        traced = TRACED[self.number] if owner.config._attn_implementation == NAME else frozenset()
        missing = sorted(self.refreshable - call.layers - traced)
        if missing and (call.simulation is not None or call.uses_cache):
            what = "the simulation" if call.simulation is not None else "decoding from the cache"
            raise RuntimeError(
                f"layers {missing} of {type(owner).__name__} took no part in {what}: their attention does not go "
                "through the attention interface in this pass; with activation checkpointing and a cache, call "
                "model.eval() first"
            )


@torch.compiler.assume_constant_result
def _note_traced(number: int, layer: int) -> bool:
    """Called while torch.compile traces a layer."""
    TRACED[number].add(layer)
    return True


def attach(model: nn.Module, decoders: list[nn.Module], modules: list[Any], calls: ModelCalls) -> None:
    """Registers the hooks on the model, on its decoders and on its attention modules.

    decoders: the modules of the model, perhaps itself, that take tokens.
    """
    hooks: dict[Any, Any] = {model: _begin_call, **dict.fromkeys(decoders, _begin_decoder_call)}
    for module, begin in hooks.items():
        if not hasattr(module, "refreshkv_calls"):
            module.register_forward_pre_hook(begin, with_kwargs=True)
            if module is decoders[-1]:  # the innermost: it holds the layers
                module.register_forward_pre_hook(_add_stream, with_kwargs=True)
                module.register_forward_hook(_join_streams)
            module.register_forward_hook(_end_call, always_call=True)
        module.refreshkv_calls = calls
    for module in modules:
        if not hasattr(module, "refreshkv_calls"):
            module.register_forward_pre_hook(_add_keywords, with_kwargs=True)
        module.refreshkv_calls = calls


# The hooks take any module: nn.Module declares neither `config` nor `refreshkv_calls`.


def _begin_call(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before the model: opens a call. The keywords stay, for the decoder's hook."""
    inputs = _by_name(module, args, kwargs)
    cache = given_cache(inputs)
    _refuse_other_uses(module, cache, inputs)
    given = [name for name in KEYWORDS if name in kwargs]
    if torch.compiler.is_compiling() and not given:
        return  # a decoding step changes no state on the host; attention modules find the cache in their own keywords
    if kwargs.get("simulation") is not None and kwargs.get("refresh") is not None:
        raise ValueError("refresh= is the older name of simulation=: pass one of them")
    simulation = kwargs.get("simulation") or kwargs.get("refresh")
    calls, is_ours = module.refreshkv_calls, isinstance(cache, PreallocatedCache)
    if simulation is not None and simulation.chunks is not None:
        validate_layers(len(calls.refreshable), len(calls.kinds))
    if simulation is not None and is_ours:
        raise ValueError("simulation=Simulation(...) and a RefreshCache exclude each other: pass one of them")
    if given or is_ours or calls.innermost() is None:
        trace = kwargs.get("trace")
        calls.begin(
            ModelCall(module, simulation, trace, cache if is_ours else None, torch.is_grad_enabled(), _thread())
        )


def _begin_decoder_call(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Before the decoder: opens a call, and removes our keywords, which no layer knows."""
    _begin_call(module, args, kwargs)
    return args, without_packing({name: value for name, value in kwargs.items() if name not in KEYWORDS})


def _add_stream(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Before the innermost decoder, in a rectified simulation: adds the second stream of the decoded tokens."""
    simulation = _rectified(module)
    if simulation is None:
        return args, kwargs
    calls = module.refreshkv_calls
    if len(calls.refreshable) != len(calls.kinds):
        raise SettingsError(OTHER_LAYERS)
    return (), add_stream(_by_name(module, args, kwargs), simulation)


def _join_streams(module: Any, args: tuple, output: Any) -> Any:
    """After the innermost decoder, in a rectified simulation: joins the two streams of its last hidden states."""
    simulation = _rectified(module)
    if simulation is None:
        return None
    if not hasattr(output, "last_hidden_state") or getattr(output, "hidden_states", None) is not None:
        raise ValueError("rectify=True gives last hidden states only: leave out return_dict and output_hidden_states")
    output.last_hidden_state, dense = join_streams(output.last_hidden_state, simulation)
    trace = module.refreshkv_calls.innermost().trace
    if trace is not None:
        trace.dense_states = dense
    return output


def _rectified(module: Any) -> Simulation | None:
    """The simulation of the running call if it is a rectified one."""
    call = module.refreshkv_calls.innermost()
    simulation = None if call is None else call.simulation
    return simulation if simulation is not None and simulation.config.rectify else None


def _end_call(module: Any, args: tuple, output: Any) -> None:
    """After the model or its decoder, also where an error broke it off: then there is no output."""
    module.refreshkv_calls.end(module, is_complete=output is not None)


def _add_keywords(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Before an attention module: adds what `refresh_attention` needs to the keywords."""
    calls, cache = module.refreshkv_calls, _given_cache(args, kwargs)
    simulation, trace = calls.settings_for(module, kwargs)
    added = {"prompt_attention": calls.prompt_attention}
    if simulation is not None:
        added.update(simulation=simulation, trace=trace)
    if cache is not None:
        added["refresh_cache"] = cache
    if look_ahead_of(module) is not None and (simulation is not None or cache is not None):
        added["rotation"] = rotation_of(kwargs)
    return args, {**kwargs, **added}


def _given_cache(args: tuple, kwargs: dict[str, Any]) -> PreallocatedCache | None:
    """The cache among an attention module's arguments, which families name differently."""
    cache = given_cache(kwargs)
    if cache is not None:
        return cache if isinstance(cache, PreallocatedCache) else None
    return next((value for value in (*kwargs.values(), *args) if isinstance(value, PreallocatedCache)), None)


def _by_name(module: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by their names."""
    if not args:
        return kwargs
    if torch.compiler.is_compiling():  # which cannot follow `signature`: the tokens come first in every model
        return {"input_ids": args[0], **kwargs}
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _refuse_other_uses(module: Any, cache: Any, inputs: dict[str, Any]) -> None:
    """Refuses caches and inputs that the model would ignore or misread."""
    has_our_cache, has_our_attention = isinstance(cache, PreallocatedCache), module.config._attn_implementation == NAME
    if has_our_cache and inputs.get("use_cache") is False:
        raise ValueError(f"use_cache=False and a {type(cache).__name__} exclude each other: leave one out")
    if not has_our_cache and has_our_attention and _is_static(cache):
        raise ValueError(
            f"the refresh attention has no use for a static cache: pass {CACHE_NAME}=RefreshCache(...), or for "
            'ordinary attention model.set_attn_implementation("sdpa")'
        )
    is_compiling = torch.compiler.is_compiling()
    if is_compiling and not has_our_attention and (has_our_cache or inputs.get("simulation") is not None):
        raise RuntimeError(NOT_OURS)
    if has_our_cache and not is_compiling:  # the prompt's pass before the compiled steps was checked
        _validate_layers(cache, module.refreshkv_calls.kinds)
        cache.begin_pass()
    if has_our_cache or has_our_attention:
        validate_inputs(module, inputs)


def _is_static(cache: Any) -> bool:
    return any(isinstance(layer, StaticLayer) for layer in getattr(cache, "layers", ()))


def _validate_layers(cache: PreallocatedCache, kinds: list[LayerKind]) -> None:
    """Refuses a cache that was made for a model of other layers."""
    if cache.kinds != kinds:
        raise ValueError(
            f"the {type(cache).__name__} is for a model of {_described(cache.kinds)}, and this one has "
            f"{_described(kinds)}: make one with this model's config"
        )


def _described(kinds: list[LayerKind]) -> str:
    sliding = [kind.window for kind in kinds if kind.window is not None]
    recurrent = sum(kind.name == RECURRENT for kind in kinds)
    more = f", {len(sliding)} of them with a window of {sliding[0]} tokens" if sliding else ""
    return f"{len(kinds)} layers{more}" + (f", {recurrent} of them recurrent" if recurrent else "")


def _position_embeddings(keywords: dict[str, Any]) -> Tensor | None:
    """The first tensor of a layer's position embeddings; None if the layer is given none."""
    embeddings = keywords.get("position_embeddings")
    return embeddings[0] if isinstance(embeddings, tuple) else embeddings


def _thread() -> int:
    return TRACED_THREAD if torch.compiler.is_compiling() else threading.get_ident()
