"""Every decoder family of the installed transformers passes or is refused in one line, as recorded."""

import pytest
import transformers

from refreshkv.families.record import PAGE, load_record, markdown_page, outcomes_of, summary, text_table
from refreshkv.families.tiny import families
from refreshkv.families.trial import try_family

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


def test_the_page_is_made_from_the_record():
    assert PAGE.read_text(encoding="utf-8") == markdown_page(RECORD)


def test_the_table_has_a_line_for_each_family():
    lines = text_table(RECORD).splitlines()
    assert [line.split()[0] for line in lines[:-1]] == list(RECORDED) and lines[-1] == summary(RECORD)
