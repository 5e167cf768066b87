"""LongProc's released problems: the folder's layout, prompts, scores worked by hand, and what is refused."""

import json

import pytest

from refreshkv.data.tasks.html_table import HtmlTable
from refreshkv.data.tasks.longproc import RELEASED
from refreshkv.data.tasks.longproc_search import leading_actions, written_search
from refreshkv.data.tasks.registry import build_task
from refreshkv.data.tokenizer import train_tokenizer
from refreshkv.settings import SettingsError
from tests.helpers.longproc import PAGES, write_longproc

SEARCH = """\
# Search Procedure
Initial number set: [21, 16, 17, 26], target: 46. Options for choosing two numbers: \
[(21, 16), (21, 17), (21, 26), (16, 17), (16, 26), (17, 26)].
 |- Pick two numbers (21, 16) (numbers left: [17, 26]). Try possible operations.
  |- Try 21 + 16 = 37. Add 37 to the number set. Current number set: [37, 17, 26], target: 46. \
Options for choosing two numbers: [(37, 17), (37, 26), (17, 26)].
   |- Pick two numbers (37, 17) (numbers left: [26]). Try possible operations.
    |- Try 37 + 17 = 54. Add 54 to the number set. Current number set: [54, 26], target: 46, just two numbers left.
     |- Try 54 + 26 = 80. Evaluate 80 != 46, drop this branch.
     |- Try 54 - 26 = 28. Evaluate 28 != 46, drop this branch.
     |- Try 54 * 26 = 1404. Evaluate 1404 != 46, drop this branch.
     |- Try 54 / 26 = 2.1. 2.1 is a decimal, drop this branch.
    |- Try 37 - 17 = 20. Add 20 to the number set. Current number set: [20, 26], target: 46, just two numbers left.
     |- Try 26 + 20 = 46. Evaluate 46 == 46, target found!

Now we have found the target, let's trace back the solution:
Final step: 26 + 20 = 46
The step before: 37 - 17 = 20
The first step: 21 + 16 = 37

Output the solution in the required format:
<Solution>
21 + 16 = 37
37 - 17 = 20
26 + 20 = 46
</Solution>
"""
"""LongProc's search for 46, from its files."""


@pytest.fixture(scope="module")
def longproc(tmp_path_factory):
    return write_longproc(tmp_path_factory.mktemp("longproc"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([SEARCH, *PAGES.values()] * 3, 400)


def task(name, folder, **settings):
    return build_task(name, {"data": str(folder), "length": 8000, **settings})


@pytest.mark.parametrize("level", ["0.5k", "2k", "8k"])
@pytest.mark.parametrize("name", RELEASED)
def test_problems_and_their_own_answers(name, level, longproc, tokenizer):
    made = task(name, longproc, level=level)
    examples = list(made.examples(tokenizer, 3))
    assert [example.index for example in examples] == [0, 1, 2]
    for example in examples:
        assert made.score(example.answer, example.references)["score"] == 1
        assert made.score("nothing", example.references)["score"] == 0
        assert json.loads(json.dumps(example.references)) == example.references
    assert made.label == name, "nothing is a substitute"
    with pytest.raises(SettingsError, match="holds 3 problems: ask for fewer examples"):
        list(made.examples(tokenizer, 4))


def test_prompts_are_the_folders(longproc, tokenizer):
    html, path, countdown = (next(task(name, longproc).examples(tokenizer, 1)).prompt for name in RELEASED)
    assert html == PAGES["long.html"] + "\nfruit: (1) name; (2) price\nname\tprice\n{a line}\n"
    assert path == "Cities.\nFrom Ulm to Kiel0:\n"
    assert countdown.endswith("\n\nNumbers: [21, 16, 17, 26]\nTarget: 46\n")
    assert countdown.count("# Example\nNumbers: [") == 2 and countdown.count("<Solution>") == 2


def test_short_prompts_are_left_out(longproc, tokenizer):
    examples = list(task("html_to_tsv", longproc, shortest_prompt=100).examples(tokenizer, 2))
    assert [example.index for example in examples] == [0, 2]
    with pytest.raises(SettingsError, match="fewer examples, or lower shortest_prompt=100"):
        list(task("html_to_tsv", longproc, shortest_prompt=100).examples(tokenizer, 3))


def test_the_search_is_longprocs():
    lines, answer = written_search((21, 16, 17, 26), 46)
    assert answer == SEARCH and list(lines) == SEARCH.split("\n")[1:12]
    lines, _ = written_search((3, 3, 7, 1), 15)
    assert any("(invalid operation). drop this branch." in line for line in lines)
    lines, _ = written_search((50, 50, 3, 1), 5)
    assert any("2500 exceeds the maximum intermediate result, drop this branch." in line for line in lines)


def test_leading_actions_by_hand():
    lines = SEARCH.split("\n")[1:12]
    assert leading_actions(lines, lines) == 11
    other = [*lines[:3], lines[3].replace("(37, 17)", "(17, 37)"), *lines[4:]]
    assert leading_actions(other, lines) == 3, "another pair"
    other = [*lines[:5], lines[5].replace("= 80. Evaluate 80", "= 81. Evaluate 81"), *lines[6:]]
    assert leading_actions(other, lines) == 11, "a wrong sum that is dropped as well"
    other = [*lines[:5], lines[5].replace("!= 46, drop this branch", "== 46, target found!"), *lines[6:]]
    assert leading_actions(other, lines) == 5, "kept instead of dropped"
    assert leading_actions(lines[:4], lines) == 4 and leading_actions([], lines) == 0


def test_without_data_the_problems_are_generated():
    assert isinstance(build_task("html_to_tsv").family, HtmlTable)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("countdown", "countdown_0.5k.json", "[", "countdown_0.5k.json is not readable JSON"),
        ("countdown", "countdown_0.5k.json", "{}", "must be a list of problems"),
        ("countdown", "countdown_0.5k.json", '[{"nums": [1, 2], "target": "3"}]', "problem 0: target must be int"),
        ("countdown", "prompts.yaml", "a: [", "prompts.yaml is not readable YAML"),
        ("countdown", "prompts.yaml", "a: b", "prompts.yaml has no text USER_PROMPT"),
        ("countdown", "prompts.yaml", None, "prompts.yaml cannot be read .*; name a copy of the folder `data`"),
        ("path_traversal", "path_traversal_0.5k.json", None, "cannot be read .*; name a copy of the folder `data`"),
        (
            "html_to_tsv",
            "html_to_tsv_0.5k.json",
            json.dumps([dict.fromkeys(RELEASED["html_to_tsv"].columns, "../../secret")]),
            "html_path=../../secret leads out of",
        ),
    ],
)
def test_damaged_folders_are_refused(name, file, content, message, tmp_path, tokenizer):
    folder = write_longproc(tmp_path / "data")
    path = folder / name / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match=message):
        list(task(name, folder).examples(tokenizer, 1))


def test_settings_that_cannot_be(longproc):
    with pytest.raises(
        SettingsError, match="shortest_prompt=9000 must lie between 0 and length - max_new_tokens = 6976"
    ):
        task("html_to_tsv", longproc, shortest_prompt=9000)
    with pytest.raises(SettingsError, match="level must be one of"):
        task("html_to_tsv", longproc, level="1k")
    with pytest.raises(SettingsError, match="unknown setting rows"):
        task("html_to_tsv", longproc, rows=3)
