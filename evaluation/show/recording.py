"""Records one generation: the tokens, and what each layer and key/value head kept at each choice.

A choice is the prompt's end, a full step or a selecting step. Until the next one the small cache takes in the new
tokens and drops its lowest ranks, one at a time (specification, section 4).
"""

from dataclasses import dataclass, field

from torch import Tensor
from transformers import LogitsProcessor

from refreshkv.cache.layer import RefreshLayer
from refreshkv.cache.refresh import RefreshCache
from refreshkv.ops.state import LAST_FULL


@dataclass(frozen=True)
class Choice:
    """What one layer kept at one position."""

    position: int
    """The position whose query chose."""
    is_full: bool
    """Whether the step attended to all tokens; else it was a selecting step."""
    kept: list[list[int]]
    """For each key/value head the kept positions, in ascending order."""
    dropped: list[list[int]]
    """For each head the positions that left the small cache before the next choice, the first one first."""


@dataclass
class Recording:
    """One generation of a single sequence."""

    prompt_length: int
    budget: int
    """K, the size of the small cache."""
    tokens: list[int] = field(default_factory=list)
    """All tokens, those of the prompt first. The last was generated and never went through the model."""
    choices: dict[int, list[Choice]] = field(default_factory=dict)
    """Refreshed layer -> its choices in order; the first is the prompt's end."""

    @property
    def last_position(self) -> int:
        """The last position that went through the model."""
        return len(self.tokens) - 2

    def attended(self, layer: int, head: int, position: int) -> list[int]:
        """The positions that a token after the prompt attended to, itself included, in ascending order."""
        choice = next(choice for choice in reversed(self.choices[layer]) if choice.position <= position)
        if choice.position == position:
            return list(range(position + 1)) if choice.is_full else choice.kept[head]
        since, own = position - choice.position, choice.kept[head]
        gone = set(choice.dropped[head][: ranks_dropped(len(own), since, self.budget)])
        recent = range(max(choice.position + 1, position - self.budget), position + 1)
        return [*(kept for kept in own if kept not in gone), *recent]


def ranks_dropped(kept: int, since: int, budget: int) -> int:
    """How many of the kept positions a token no longer sees, `since >= 1` steps after the choice."""
    return min(kept, max(0, kept + since - 1 - budget))


class ChoiceRecorder(LogitsProcessor):
    """Looks at a cache after each of the model's passes; given to `generate()` as a logits processor."""

    def __init__(self, cache: RefreshCache, prompt_length: int):
        self._cache = cache
        self._recording = Recording(prompt_length, cache.config.largest_budget(prompt_length))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - 1
        for number, layer in enumerate(self._cache.layers):
            if isinstance(layer, RefreshLayer):
                self._look(layer, self._recording.choices.setdefault(number, []), position)
        return scores

    def _look(self, layer: RefreshLayer, made: list[Choice], position: int) -> None:
        last = int(layer.row_state[0, LAST_FULL])
        selected = layer.selected[0].tolist()  # the ranks that drop next are in order
        if not made or made[-1].position != last:
            kept = [sorted(own for own in ranks if own >= 0) for ranks in selected]
            made.append(Choice(last, bool(layer.full_steps[0, last]), kept, [[] for _ in kept]))
        choice = made[-1]
        for ranks, own, gone in zip(selected, choice.kept, choice.dropped, strict=True):
            if len(gone) < ranks_dropped(len(own), position - last, self._recording.budget):
                gone.append(ranks[len(own) - len(gone) - 1])

    def finished(self, output: Tensor) -> Recording:
        """The recording, once `generate()` has returned `output`, (1, P + new)."""
        recording = self._recording
        recording.tokens = output[0].tolist()
        for number, made in recording.choices.items():  # without a step that was taken back
            recording.choices[number] = [choice for choice in made if choice.position <= recording.last_position]
        return recording
