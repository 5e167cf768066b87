"""What a model family goes through on a tiny random model, in float64 on the CPU (`refreshkv models --try`).

1. An ordinary call of the enabled model gives the logits of the model's own attention, with left padding too.
2. A simulation with a budget beyond the text gives them as well, and one with a small budget does not.
3. Decoding token by token gives the logits of the simulation: both schedules, selecting steps, windows, left padding.
4. `generate` with the cache gives the tokens that the simulation predicts.
5. Gradients of a simulation with a budget beyond the text are those of the model's own attention.
6. The saved and reloaded model gives the same logits, by its saved schedule.

Rounding is judged by the model itself: some families compute in float32 whatever their dtype, and their decoding with
transformers' own cache differs from their whole pass by that much.

Shapes: `B` batch rows, `T` tokens, `V` vocabulary.
"""

import inspect
import logging
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from refreshkv.attention.enable import enable
from refreshkv.cache.keyword import as_keyword
from refreshkv.cache.refresh import RefreshCache
from refreshkv.config import NEVER, RefreshConfig, Simulation
from refreshkv.families.tiny import EXPERTS, VOCABULARY, tiny_model
from refreshkv.layers import layer_kinds
from refreshkv.settings import SettingsError

PACKAGE = str(Path(__file__).resolve().parent.parent)
TOKENS, PROMPT_LENGTH, PADDING = 34, 17, 5
EXACT = 1e-6
"""Largest difference of two logits that is rounding, as a share of the largest logit: most families have some
arithmetic in float32, such as norms and routers, whatever their dtype."""
SINGLE = 1e-4
"""The same where some of the arithmetic is in float32."""
GRADIENTS = 1e3
"""How much more gradients may differ than logits."""
NOISE = 20.0
"""How many times the model's own difference two of ours may differ."""
LARGEST_NOISE = 1e-2
"""Beyond this own difference, as a share of the largest logit, a comparison would say nothing."""
REFRESHES = (
    RefreshConfig(budget=6, stride=4),
    RefreshConfig(budget=0.4, stride=3, threshold=0.0, observation_window=3, recent_window=2, sink_tokens=1),
    RefreshConfig(budget=6, stride=NEVER, select_stride=2, score_bits=8, pool_ahead=True, pool_kernel=4),
)


class Outcome(NamedTuple):
    """What became of a family."""

    result: Literal["passes", "refused", "fails", "not tried"]
    """"refused": by a message of this package. "not tried": no tiny model could be made or called, or
    transformers reloads other weights than it saved."""
    reason: str
    """One line; empty if it passes."""
    layers: str
    """How many layers of each kind the tiny model has."""


class Failed(Exception):
    """A check whose numbers are not those that they should be."""


class Untried(Exception):
    """A check that says nothing, because transformers itself does something else than it should."""


def try_family(family: str) -> Outcome:
    """Puts a family, a model type of `refreshkv.families.tiny.families`, through all checks, on text alone."""
    with quiet():
        model = None
        try:
            model = tiny_model(family)
            trial = Trial(model)
            trial.validate_noise()
        except Exception as error:  # whatever the family's classes raise for such sizes, or such a call
            reason = None if model is None else _refusal(model)
            return Outcome("not tried", _one_line(error), "") if reason is None else Outcome("refused", reason, "")
        layers = layers_of(trial.model)
        try:
            trial.run()
        except Exception as error:
            return outcome_of_error(error, layers)
        return Outcome("passes", "", layers)


class Trial:
    """The checks of one model, and what the model computes by its own attention."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, VOCABULARY, (2, TOKENS), generator=generator)
        self.mask = torch.ones_like(self.ids)
        self.mask[1, :PADDING] = 0
        self.gives_positions = False
        """Whether calls without padding get the positions of their tokens, as `generate` gives them."""
        self.own, self.own_padded, self.own_rounding = self._own_logits()
        self.own_gradient = self._gradient()
        self.noise = self._own_noise()

    def run(self) -> None:
        """All checks; raises `Failed`, or what this package or transformers raise."""
        enable(self.model, REFRESHES[0])
        for check in (
            self.ordinary_calls, self.whole_budget, self.decoding, self.generation, self.gradients, self.reloading,
        ):  # fmt: skip
            check()

    def ordinary_calls(self) -> None:
        self._compare(self.logits(), self.own, "an ordinary call and the model's own attention", own=True)
        self._compare(self.logits(padded=True), self.own_padded, "an ordinary call with left padding", own=True)

    def whole_budget(self) -> None:
        whole = Simulation(PROMPT_LENGTH, RefreshConfig(budget=TOKENS, stride=7))
        self._compare(self.logits(simulation=whole), self.own, "a simulation with a budget beyond the text", own=True)
        small = Simulation(PROMPT_LENGTH, RefreshConfig(budget=3, stride=5))
        if self._difference(self.logits(simulation=small), self.own) <= self._tolerance(own=True):
            raise Failed("a small budget changes nothing: the simulation is not followed")

    def decoding(self) -> None:
        for number, refresh in enumerate(REFRESHES):
            padded = number % 2 == 1
            simulated = self.logits(simulation=Simulation(PROMPT_LENGTH, refresh), padded=padded)
            what = f"decoding and simulating {refresh.to_dict()}" + (" with left padding" if padded else "")
            self._compare(self._decoded(RefreshCache(self.model.config, TOKENS, refresh), padded), simulated, what)

    def generation(self) -> None:
        generated: Any = self.model.generate  # pyright: ignore[reportCallIssue]  # declared in a mixin
        cache = RefreshCache(self.model.config, TOKENS, REFRESHES[0])
        prompt = self.ids[:1, :PROMPT_LENGTH]
        found = generated(prompt, **as_keyword(cache), max_new_tokens=4, do_sample=False, eos_token_id=-1)
        with torch.no_grad():
            simulation = Simulation(PROMPT_LENGTH, REFRESHES[0])
            positions = self._positions(torch.arange(found.shape[1])[None])  # which `generate` gives, too
            logits = self.model(input_ids=found, simulation=simulation, use_cache=False, **positions).logits
        expected = logits.argmax(-1)
        if not torch.equal(found[:, PROMPT_LENGTH:], expected[:, PROMPT_LENGTH - 1 : -1]):
            raise Failed("generate() gives other tokens than the simulation predicts")

    def gradients(self) -> None:
        """With a budget beyond the text gradients are those of the model's own attention, else finite."""
        whole = self._gradient(Simulation(PROMPT_LENGTH, RefreshConfig(budget=TOKENS, stride=7)))
        scale = max(1.0, float(self.own_gradient.abs().max()))
        difference = float((whole - self.own_gradient).abs().max())
        allowed = min(GRADIENTS * self._tolerance(own=True) / self._scale(), LARGEST_NOISE) * scale
        if not difference <= allowed:
            raise Failed(f"gradients differ from those of the model's own attention by {difference:.1e}")
        if not self._gradient(Simulation(PROMPT_LENGTH, REFRESHES[0])).isfinite().all():
            raise Failed("gradients of a simulation are not finite")

    def reloading(self) -> None:
        simulation = Simulation(PROMPT_LENGTH, REFRESHES[0])
        expected = self.logits(simulation=simulation)
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            loaded = type(self.model).from_pretrained(folder, dtype=self.model.dtype, **EXPERTS)
        weights = zip(self.model.state_dict().values(), loaded.state_dict().values(), strict=True)
        if not all(torch.equal(saved, found) for saved, found in weights):
            raise Untried("transformers reloads other weights than it saved")
        model: Any = enable(loaded.eval())
        self.model = model
        self._compare(self.logits(simulation=simulation), expected, "the reloaded model and the saved one")

    def _own_logits(self) -> tuple[Tensor, Tensor, float]:
        """Logits by the model's own attention, without and with padding, and their rounding as a share of the largest.

        That is torch's attention or, for models that it does not fit, the eager one, which has a softmax in float32.
        """
        decoder = self.model.config.get_text_config(decoder=True)
        try:
            if getattr(decoder, "attn_logit_softcapping", None) is not None:
                raise NotImplementedError("some releases of transformers leave out a softcap here")
            self.model.set_attn_implementation("sdpa")
            logits, rounding = self.logits(), EXACT
        except (ValueError, NotImplementedError):
            self.model.set_attn_implementation("eager")
            logits, rounding = self.logits(), SINGLE
        padded = self.logits(padded=True)
        if padded[:, PADDING:].isnan().any():  # some families' own attention makes this of padding: take the row alone
            with torch.no_grad():
                padded[1, PADDING:] = self.model(input_ids=self.ids[1:, PADDING:], use_cache=False).logits[0]
        return logits, padded, rounding

    # ---- passes

    @torch.no_grad()
    def logits(self, simulation: Simulation | None = None, padded: bool = False) -> Tensor:
        """Logits of one pass over all tokens, (B, T, V)."""
        keywords = {} if simulation is None else {"simulation": simulation}
        return self.model(input_ids=self.ids, use_cache=False, **keywords, **self._padding(padded, 0, TOKENS)).logits

    @torch.no_grad()
    def _decoded(self, cache: Any, padded: bool = False) -> Tensor:
        """Logits of the prompt in one pass and of the other tokens one by one, (B, T, V)."""
        bounds = [0, *range(PROMPT_LENGTH, TOKENS + 1)]
        parts = [
            self.model(
                input_ids=self.ids[:, a:b], **as_keyword(cache), use_cache=True, **self._padding(padded, a, b)
            ).logits
            for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        return torch.cat(parts, dim=1)

    def _padding(self, padded: bool, start: int, end: int) -> dict[str, Tensor]:
        if not padded:
            return self._positions(torch.arange(start, end)[None]) if self.gives_positions else {}
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, start:end].contiguous()  # some families view them
        return {"attention_mask": self.mask[:, :end], **self._positions(positions)}

    def _positions(self, positions: Tensor) -> dict[str, Tensor]:
        """The keyword of positions (B, n), if the model takes any."""
        takes_any = "position_ids" in inspect.signature(type(self.model).forward).parameters
        return {"position_ids": positions} if takes_any else {}

    def _gradient(self, simulation: Simulation | None = None) -> Tensor:
        """The next-token loss's gradient, all parameters in one vector."""
        keywords = {} if simulation is None else {"simulation": simulation}
        self.model.zero_grad()
        logits = self.model(input_ids=self.ids, use_cache=False, **keywords).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten()).backward()
        parameters = (parameter for parameter in self.model.parameters() if parameter.grad is not None)
        return torch.cat([parameter.grad.flatten() for parameter in parameters])  # pyright: ignore[reportOptionalMemberAccess]

    # ---- rounding

    def _own_noise(self) -> float:
        """The largest difference between decoding with transformers' own cache and the whole pass; 0 for rounding in
        float64, and if the model has no such cache."""
        for self.gives_positions in (False, True):  # some families count from 0 in each call that gives none
            try:
                found = self._decoded(DynamicCache(config=self.model.config))
            except Exception:  # some families have caches of their own; the checks say what works here
                return 0.0
            difference = float((found - self.own).abs().max())
            if difference <= EXACT * self._scale():
                return 0.0
            if difference <= LARGEST_NOISE * self._scale():
                break
        return difference

    def validate_noise(self) -> None:
        """Raises `ValueError` if transformers' own decoding is so far from its whole pass that ours says nothing."""
        if self.noise > LARGEST_NOISE * self._scale():
            raise ValueError(
                "with transformers' own cache this tiny model decodes other logits than its whole pass has"
            )

    def _scale(self) -> float:
        return max(1.0, float(self.own.abs().max()))

    def _tolerance(self, own: bool = False) -> float:
        return (self.own_rounding if own else EXACT) * self._scale() + NOISE * self.noise

    def _difference(self, found: Tensor, expected: Tensor) -> float:
        """The largest difference of a logit, without the padded columns; NaN if one is NaN."""
        return float((found - expected).abs()[:, PADDING:].max())

    def _compare(self, found: Tensor, expected: Tensor, what: str, own: bool = False) -> None:
        difference, allowed = self._difference(found, expected), self._tolerance(own)
        if not difference <= allowed:
            raise Failed(f"{what}: logits differ by {difference:.1e}, more than {allowed:.1e}")


def outcome_of_error(error: Exception, layers: str) -> Outcome:
    """What an error of the checks says of a family with such layers."""
    if isinstance(error, Failed):
        return Outcome("fails", str(error), layers)
    if isinstance(error, Untried):
        return Outcome("not tried", str(error), layers)
    return Outcome("refused" if _is_refusal(error) else "fails", _one_line(error), layers)


def layers_of(model: PreTrainedModel) -> str:
    """Such as "2 full, 4 sliding"; empty for layers of unknown kinds."""
    try:
        kinds = Counter(kind.name for kind in layer_kinds(model.config))
    except SettingsError:
        return ""
    return ", ".join(f"{count} {name}" for name, count in sorted(kinds.items()))


def _raised_here(error: BaseException) -> bool:
    """Whether a function of this package raised the error."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not frames[-1].filename.startswith(PACKAGE):
        return False
    return (frames[-1].line or "").startswith("raise ")


def _refusal(model: PreTrainedModel) -> str | None:
    """Why `enable` refuses a model, None if it does not."""
    try:
        enable(model, REFRESHES[0])
    except SettingsError as error:
        return _one_line(error)
    return None


def _is_refusal(error: BaseException) -> bool:
    """Whether this package refuses the model, or the model refuses this package's cache by its name."""
    return isinstance(error, SettingsError) or _raised_here(error) or RefreshCache.__name__ in str(error)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= 240 else text[:237] + "..."
    return text if isinstance(error, SettingsError) or _raised_here(error) else f"{type(error).__name__}: {text}"


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps warnings about tiny models to itself."""
    level: Callable[[], int] = transformers_logging.get_verbosity
    before = level()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(before)
