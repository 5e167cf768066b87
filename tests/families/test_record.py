"""Every decoder family of the installed transformers passes or is refused in one line, as recorded."""

from typing import Any

import pytest
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto import configuration_auto, modeling_auto
from transformers.utils.generic import ModelOutput

from refreshkv import RefreshCache
from refreshkv.cache.keyword import as_keyword
from refreshkv.families.images import MODELS
from refreshkv.families.record import PAGE, load_record, markdown_page, outcomes_of, summary, text_table
from refreshkv.families.tiny import families
from refreshkv.families.trial import try_family
from refreshkv.launch import models as command

RECORD = load_record()
RECORDED = outcomes_of(RECORD)
IS_RECORDED_RELEASE = RECORD["transformers"] == transformers.__version__
FAST = ("llama", "bert")


def trial_of(family):
    outcome = try_family(family)
    assert outcome.result != "fails", outcome.reason
    assert "\n" not in outcome.reason and (outcome.result == "passes") == (not outcome.reason)
    if IS_RECORDED_RELEASE:
        assert outcome == RECORDED[family], "record it: refreshkv models --try all --record"


@pytest.mark.parametrize("family", FAST)
def test_a_family(family):
    trial_of(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in families() if family not in FAST])
def test_every_family(family):
    trial_of(family)


def test_the_record_has_every_family_and_fifty_pass():
    results = [outcome.result for outcome in RECORDED.values()]
    assert results.count("passes") >= 50 and "fails" not in results
    if IS_RECORDED_RELEASE:
        assert list(RECORDED) == list(families())
    assert sorted(MODELS) == list(RECORD["images"])


def test_the_page_is_made_from_the_record():
    assert PAGE.read_text(encoding="utf-8") == markdown_page(RECORD)


def test_the_table_has_a_line_for_each_family():
    lines = text_table(RECORD).splitlines()
    with_images = [f"{name}+image" for name in RECORD["images"]]
    assert [line.split()[0] for line in lines[:-1]] == [*RECORDED, *with_images] and lines[-1] == summary(RECORD)


class NewcomerConfig(LlamaConfig):
    model_type = "newcomer"


class NewcomerForCausalLM(LlamaForCausalLM):
    config_class = NewcomerConfig


@pytest.fixture
def newcomer(monkeypatch):
    """A family that another release of transformers might have, and nothing here knows."""
    for table in (configuration_auto.CONFIG_MAPPING, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING):
        monkeypatch.setattr(table, "_extra_content", dict(table._extra_content))
    AutoConfig.register("newcomer", NewcomerConfig)
    AutoModelForCausalLM.register(NewcomerConfig, NewcomerForCausalLM)
    monkeypatch.setitem(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "newcomer", "NewcomerForCausalLM")
    return "newcomer"


def test_a_family_of_another_release_is_reported_without_an_edit(newcomer, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--try", newcomer])
    assert ended.value.code == 0
    assert "newcomer: passes  2 full" in capsys.readouterr().out.splitlines()


def test_such_a_family_that_gives_other_numbers_fails(newcomer, monkeypatch, capsys):
    """As where a release changes what a decoder does with a cache."""
    monkeypatch.setattr(NewcomerForCausalLM, "forward", with_other_logits)
    with pytest.raises(SystemExit) as ended:
        command.main(["--try", newcomer])
    assert ended.value.code == 1
    assert "newcomer: fails  decoding and simulating" in capsys.readouterr().out


def with_other_logits(model, input_ids, position_ids=None, past_key_values=None, cache=None, **keywords):
    """Has the cache under both names, for a name that `forward` does not have is not given to it."""
    given = past_key_values if cache is None else cache
    keywords |= {"position_ids": position_ids, **as_keyword(given)}
    logits: Any = LlamaForCausalLM.forward(model, input_ids, **keywords).logits
    return ModelOutput(logits=logits * 1.1 if isinstance(given, RefreshCache) else logits)
