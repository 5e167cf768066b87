"""Whatever is done to a `RefreshCache`, in any order: its logits are those of the parallel form, or it refuses.

hypothesis draws the settings, the operations and their order. Operations with wrong inputs are drawn among them: they
must be refused in one line, and leave the cache as it was. `-m slow` draws more, and others each time.
"""

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from refreshkv import NEVER, RefreshCache, RefreshConfig, Simulation, Trace
from tests.generation.test_generate import SLIDING
from tests.helpers import literal
from tests.helpers.models import padded_positions, random_ids, tiny_enabled, tiny_model

ROOM = 30
REFUSALS = (ValueError, RuntimeError, NotImplementedError)  # SettingsError is a ValueError
FAMILIES = {"full": {}, "grouped": {"groups": 4}, "sliding": SLIDING}
MODELS = {name: tiny_enabled(RefreshConfig(), **family) for name, family in FAMILIES.items()}
REFERENCES = {name: tiny_model(**family) for name, family in FAMILIES.items()}
for reference in REFERENCES.values():
    reference.set_attn_implementation(literal.NAME)


@st.composite
def configs(draw):
    select_stride = draw(st.sampled_from([None, None, 1, 2, 3]))
    return RefreshConfig(
        budget=draw(st.one_of(st.integers(2, 9), st.sampled_from([0.2, 0.5, 1.0, 100]))),
        stride=draw(st.sampled_from([1, 2, 3, 5, NEVER])),
        threshold=draw(st.sampled_from([None, None, -0.1, 0.2, 2.0])),
        pool_kernel=draw(st.sampled_from([1, 3, 7])),
        observation_window=draw(st.sampled_from([1, 1, 2, 5])),
        recent_window=draw(st.sampled_from([0, 0, 2, 40])),
        sink_tokens=draw(st.sampled_from([0, 0, 1, 3])),
        select_stride=select_stride,
        score_bits=16 if select_stride is None else draw(st.sampled_from([16, 8, 4])),
        pool_ahead=draw(st.booleans()),
    )


@contextmanager
def refused(match=None):
    """The block raises an error of one line."""
    with pytest.raises(REFUSALS, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


class Operations(RuleBasedStateMachine):
    """A cache, and beside it the tokens that it was given and the logits that came out."""

    @initialize(
        config=configs(),
        family=st.sampled_from(["full", "full", "grouped", "sliding"]),
        offload=st.booleans(),
        paddings=st.lists(st.sampled_from([0, 0, 1, 4]), min_size=1, max_size=3),
        counts_columns=st.booleans(),
    )
    def begin(self, config, family, offload, paddings, counts_columns):
        self.model, self.reference, self.family = MODELS[family], REFERENCES[family], family
        self.config, self.offload, self.counts_columns = config, offload, counts_columns
        self.cache, self.seed = self.new_cache(), 0
        self.start(paddings)

    def new_cache(self):
        return RefreshCache(self.model.config, ROOM, self.config, offload=self.offload)

    def start(self, paddings):
        self.paddings, self.blocks = list(paddings), []
        self.ids = torch.zeros(len(paddings), 0, dtype=torch.int64)
        self.logits = torch.zeros(len(paddings), 0, self.model.config.vocab_size, dtype=torch.float64)

    @property
    def length(self):
        return self.ids.shape[1]

    def drawn_ids(self, rows, count):
        self.seed += 1
        return random_ids(rows, count, seed=self.seed)

    def inputs(self, count):
        """Arguments of a call with `count` more tokens; without any padding no mask and no positions half the time."""
        ids = self.drawn_ids(len(self.paddings), count)
        mask = torch.ones(len(ids), self.length + count, dtype=torch.int64)
        for row, padding in enumerate(self.paddings):
            mask[row, :padding] = 0
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": self.positions(mask)[:, self.length :]}
        if not any(self.paddings) and self.seed % 2:
            return {"input_ids": ids}
        if self.counts_columns and self.seed % 2:
            del inputs["position_ids"]
        return inputs

    def positions(self, mask):
        return torch.arange(mask.shape[1]).expand_as(mask) if self.counts_columns else padded_positions(mask)

    @torch.no_grad()
    def call(self, inputs, is_block):
        found = self.model(**inputs, past_key_values=self.cache).logits
        if is_block:
            self.blocks.append((self.length, self.length + found.shape[1]))
        self.ids = torch.cat([self.ids, inputs["input_ids"]], dim=1)
        self.logits = torch.cat([self.logits, found], dim=1)

    def has_room(self, count):
        if self.length + count <= ROOM:
            return True
        with refused("RefreshCache is full"), torch.no_grad():
            self.model(**self.inputs(count), past_key_values=self.cache)
        return False

    # ---- what may be done

    def takes_block(self):
        """The naive form of a sliding window knows no second turn."""
        return self.family != "sliding" or not self.blocks or self.blocks[-1][1] == self.length

    @precondition(takes_block)
    @rule(count=st.integers(1, 7))
    def block(self, count):
        """A prompt, a further chunk of it, or another turn."""
        count += max(self.paddings) if self.length == 0 else 0
        if self.has_room(count):
            if self.length > 0:
                self.cache.continue_prompt()
            self.call(self.inputs(count), is_block=True)

    @precondition(lambda self: self.length > 0)
    @rule(count=st.integers(1, 9))
    def steps(self, count):
        for _ in range(count):
            if self.has_room(1):
                self.call(self.inputs(1), is_block=False)

    @precondition(lambda self: 0 < self.length < ROOM)
    @rule(accepted=st.booleans())
    def crop(self, accepted):
        if not self.cache.is_croppable:
            with refused("cannot take tokens back"):
                self.cache.activate_past_recording()
            return
        self.cache.activate_past_recording()
        if accepted:
            self.call(self.inputs(1), is_block=False)
            self.cache.crop(0)
            return
        with torch.no_grad():
            self.model(**self.inputs(1), past_key_values=self.cache)
        self.cache.crop(-1)

    @precondition(lambda self: self.length > 0)
    @rule(data=st.data(), kind=st.sampled_from(["numbers", "mask", "beams", "list", "repeat"]))
    def rows(self, data, kind):
        rows = len(self.paddings)
        if kind == "repeat":
            repeats = data.draw(st.integers(1, 2)) if rows < 4 else 1
            chosen = [row for row in range(rows) for _ in range(repeats)]
            self.cache.batch_repeat_interleave(repeats)
        elif kind == "mask":
            flags = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows).filter(any))
            chosen = [row for row, flag in enumerate(flags) if flag]
            self.cache.batch_select_indices(torch.tensor(flags))
        else:
            chosen = data.draw(st.lists(st.integers(-rows, rows - 1), min_size=1, max_size=4))
            change = self.cache.reorder_cache if kind == "beams" else self.cache.batch_select_indices
            change(chosen if kind == "list" else torch.tensor(chosen))
        self.ids, self.logits = self.ids[chosen], self.logits[chosen]
        self.paddings = [self.paddings[row] for row in chosen]

    @rule(pickled=st.booleans())
    def copies(self, pickled):
        """Goes on with a copy; what happens to the original afterwards does not matter."""
        original = self.cache
        self.cache = pickle.loads(pickle.dumps(original)) if pickled else copy.deepcopy(original)
        if 0 < self.length < ROOM:
            with torch.no_grad():
                self.model(**self.inputs(1), past_key_values=original)
        original.reset()

    @rule(paddings=st.lists(st.sampled_from([0, 0, 2]), min_size=1, max_size=3))
    def reset(self, paddings):
        self.check()
        self.cache.reset()
        self.start(paddings)

    # ---- what may not

    @precondition(lambda self: self.length < ROOM - 8)
    @rule(data=st.data(), count=st.integers(1, 4))
    def wrong(self, data, count):
        """A call with one wrong input."""
        count += max(self.paddings) + 1 if self.length == 0 else 0
        inputs, rows, columns = self.inputs(count), len(self.paddings), self.length + count
        mask = inputs.get("attention_mask", torch.ones(rows, columns, dtype=torch.int64))
        positions = self.positions(mask)[:, self.length :]
        holes = mask.clone()
        holes[:, -1] = 0
        changes = {
            "short mask": {"attention_mask": mask[:, 1:]},
            "long mask": {"attention_mask": torch.cat([mask, mask[:, -1:]], dim=1)},
            "mask of other rows": {"attention_mask": mask[:1].repeat(rows + 1, 1)},
            "right padding": {"attention_mask": holes},
            "prepared mask": {"attention_mask": mask[:, None, None].expand(-1, 1, count, -1).bool()},
            "short positions": {"position_ids": positions[:, 1:]},
            "positions of other rows": {"position_ids": positions[:1].repeat(rows + 1, 1)},
            "attention weights": {"output_attentions": True},
            "head mask": {"head_mask": torch.ones(2, 4)},
            "no cache": {"use_cache": False},
            "packed": {"cu_seq_lens_q": torch.tensor([0, 1, rows * count + 1])},
            "simulation": {"simulation": Simulation(1)},
            "no tokens": {"input_ids": inputs["input_ids"][:, :0]},
        }
        if count > 1:
            restarting = torch.cat([positions[:, :-1], positions[:, :1]], dim=1)
            changes["packed positions"] = {"position_ids": restarting, "attention_mask": mask}
        if self.length > 0:
            changes["positions from 0"] = {"position_ids": positions - self.length}
            changes["other rows"] = {
                name: value[:1].repeat(rows + 1, 1) for name, value in inputs.items() if name != "position_ids"
            }
        if self.length > 1 and max(self.paddings) + 1 < self.length:
            other = mask.clone()
            other[torch.arange(rows), torch.tensor(self.paddings)] = 0
            changes["more padding"] = {"attention_mask": other}
        change = changes[data.draw(st.sampled_from(sorted(changes)))]
        with refused(), torch.no_grad():
            self.model(**{**inputs, **change}, past_key_values=self.cache)

    @precondition(lambda self: self.length > 0)
    @rule(indices=st.sampled_from([[], [7], [-7], [0.5], [[0]], [True] * 7, [False] * 7]))
    def wrong_rows(self, indices):
        """Rows that no batch has here: they are six at most."""
        with refused():
            self.cache.batch_select_indices(torch.tensor(indices))

    # ---- the parallel form

    def check(self):
        if self.length == 0:
            return
        mask = torch.ones_like(self.ids)
        for row, padding in enumerate(self.paddings):
            mask[row, :padding] = 0
        extra = {"attention_mask": mask, "position_ids": self.positions(mask)}
        ends = [end for _, end in self.blocks]
        is_single = [0, *ends[:-1]] == [start for start, _ in self.blocks]
        with torch.no_grad():
            if is_single:
                trace, simulation = Trace(), Simulation(ends[-1], self.config)
                expected = self.model(self.ids, simulation=simulation, trace=trace, use_cache=False, **extra).logits
                for layer, flags in trace.full_steps.items():
                    assert torch.equal(flags[:, ends[-1] - 1 :], self.cache.full_steps[layer][:, ends[-1] - 1 :])
            else:
                expected = self.reference(
                    self.ids, blocks=self.blocks, config=self.config, use_cache=False, **extra
                ).logits
        assert self.cache.length == self.length and self.logits.isfinite().all()
        torch.testing.assert_close(self.logits[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-9)

    def teardown(self):
        if hasattr(self, "paddings"):
            self.check()


BOUNDED = settings(
    max_examples=120,
    stateful_step_count=14,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_each_sequence_of_operations_equals_the_parallel_form_or_is_refused():
    run_state_machine_as_test(Operations, settings=BOUNDED)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_sequences_of_operations():
    run_state_machine_as_test(
        Operations, settings=settings(BOUNDED, derandomize=False, max_examples=1500, stateful_step_count=25)
    )
