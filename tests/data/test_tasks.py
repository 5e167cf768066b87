"""Tasks: problems, scores (cases worked by hand), prompts that fit their length, and training sequences."""

import builtins
import json
import random
import re
import zipfile
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

from refreshkv.data.config import DataConfig
from refreshkv.data.rows import load_rows, prepare_rows
from refreshkv.data.tasks import scoring
from refreshkv.data.tasks.chain_of_key import ChainOfKey
from refreshkv.data.tasks.countdown import is_solution, search
from refreshkv.data.tasks.html_table import read_table, row_overlap
from refreshkv.data.tasks.registry import RULER, TASKS, build_task, build_tasks
from refreshkv.data.tasks.rows import prompt_length, task_sequences, training_tasks
from refreshkv.data.tasks.task import FULL_ENOUGH
from refreshkv.data.tasks.template import load_template
from refreshkv.data.tasks.words import ADJECTIVES, NOUNS, coined_words, wonderwords_vocabulary
from refreshkv.data.tokenizer import train_tokenizer
from refreshkv.settings import SettingsError
from refreshkv.train.batch import make_batch

LENGTH = 1600
SETTINGS = {
    "vt": {"max_new_tokens": 64},
    "cwe": {"max_new_tokens": 200, "length": 2600},
    "fwe": {"max_new_tokens": 64},
    "path_traversal": {"max_new_tokens": 400},
    "countdown": {"max_new_tokens": 800, "length": 4000},
    "html_to_tsv": {"rows": 3, "max_new_tokens": 200},
}
"""Settings with which the tasks fit a small tokenizer."""

GENERATED = [name for name in TASKS if name not in ("gov_report", "qmsum", "novel_summary")]


@pytest.fixture(scope="module")
def tokenizer():
    """Trained on the tasks' words, so that a word takes few tokens."""
    generator = random.Random(0)
    texts = [" ".join([*coined_words(generator, 100), *ADJECTIVES, *NOUNS, *map(str, range(500))]) for _ in range(30)]
    return train_tokenizer(texts, 1200)


def task(name, **settings):
    return build_task(name, {"length": LENGTH, **SETTINGS.get(name, {}), **settings})


def draw(name, size, seed="0", **settings):
    """A problem of a given size, and its task."""
    made = task(name, **settings)
    return made.family.draw(random.Random(seed), size, 0, made.template), made


# ---- all tasks


@pytest.mark.parametrize("name", GENERATED)
def test_every_task_fills_its_room_and_scores_its_own_answer(name, tokenizer):
    made = task(name)
    room = made.family.length - made.family.max_new_tokens
    examples = list(made.examples(tokenizer, 3))
    assert [example.index for example in examples] == [0, 1, 2]
    for example in examples:
        assert example.prompt_ids == tokenizer(example.prompt)["input_ids"]
        assert len(example.prompt_ids) <= room
        if name != "countdown":  # its prompts have one length
            unit = 250 if name == "html_to_tsv" else 120  # tokens; none is longer
            assert len(example.prompt_ids) >= min(FULL_ENOUGH * room, room - unit)
        assert 0 < len(example.answer_ids) <= made.family.max_new_tokens
        assert made.score(example.answer, example.references)["score"] == 1
        assert made.score("nothing of the kind", example.references)["score"] == 0


@pytest.mark.parametrize("name", GENERATED)
def test_the_seed_decides_alone(name, tokenizer):
    first, again = (list(task(name).examples(tokenizer, 3)) for _ in range(2))
    assert first == again
    assert list(task(name).examples(tokenizer, 2)) == first[:2]
    others = [
        next(task(name, seed=1).examples(tokenizer, 1)),
        next(task(name).examples(tokenizer, 1, purpose="training")),
    ]
    prompts = [example.prompt for example in [*first, *others]]
    assert len(set(prompts)) == len(prompts)


def test_rulers_thirteen_have_its_settings():
    assert len(RULER) == 13 and [made.name for made in build_tasks(["ruler"])] == RULER
    settings = {made.name: made.settings() for made in build_tasks(["ruler"])}
    needles = ("haystack", "key_kind", "value_kind", "keys", "values", "queries")
    assert {name: tuple(values[key] for key in needles) for name, values in settings.items() if "keys" in values} == {
        "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
        "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
        "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
        "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
        "niah_multikey_2": ("needles", "words", "numbers", 1, 1, 1),
        "niah_multikey_3": ("needles", "uuids", "uuids", 1, 1, 1),
        "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
        "niah_multiquery": ("essay", "words", "numbers", 1, 1, 4),
    }
    assert (settings["vt"]["chains"], settings["vt"]["hops"]) == (1, 4)
    assert build_task("cwe").family.repeats == (30, 3) and build_task("cwe", {"length": 4000}).family.repeats == (6, 1)
    assert settings["fwe"]["alpha"] == 2.0
    rooms = {name: settings[name]["max_new_tokens"] for name in ("niah_single_1", "vt", "cwe", "fwe", "qa_1", "qa_2")}
    assert rooms == {"niah_single_1": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}


def test_substitutes_are_named(tmp_path):
    essays = tmp_path / "essays.json"
    essays.write_text(json.dumps({"text": "One. Two."}))
    labels = {made.name: made.label for made in build_tasks(GENERATED)}
    substitutes = {name for name, label in labels.items() if label == f"{name}-substitute"}
    essay_tasks = {name for name, (_, preset) in TASKS.items() if preset.get("haystack") == "essay"}
    assert substitutes == {*essay_tasks, "qa_1", "qa_2", "html_to_tsv"}
    assert {labels[name] for name in labels if name not in substitutes} == set(labels) - substitutes
    assert build_task("niah_single_2", {"data_files": str(essays)}).label == "niah_single_2"


# ---- chain-of-key


def test_chain_of_key_every_key_has_one_successor():
    problem, made = draw("chain_of_key", 40, words_per_key=3, keys=12)
    keys = problem.fields["context"].split("\n")
    assert len(set(keys)) == 40 and all(len(key.split("-")) == 3 for key in keys)
    successor = {key: [other for other in keys if other.split("-")[0] == key.split("-")[-1]] for key in keys}
    assert all(len(following) == 1 for following in successor.values())
    chain, key = [], problem.fields["start"]
    for _ in range(12):
        key = successor[key][0]
        chain.append(key)
    assert problem.references["chain"] == chain and len({problem.fields["start"], *chain}) == 13
    assert problem.answer == " " + ", ".join(chain)
    seen = {key}  # one ring through all keys
    while successor[key][0] not in seen:
        key = successor[key][0]
        seen.add(key)
    assert len(seen) == 40


def test_chain_of_key_words_of_any_length():
    problem, _ = draw("chain_of_key", 30, syllables=5)
    words = re.split("[-\n]", problem.fields["context"])
    assert len(words) == 60 and all(re.fullmatch("([bdfghjklmnprstvwz][aeiou]){5}", word) for word in words)


def test_chain_of_key_counts_leading_valid_keys():
    family = ChainOfKey(keys=4)
    references = {"start": "a-b", "chain": ["b-c", "c-d", "d-e", "e-f"]}
    for prediction, score in [
        (" b-c, c-d, d-e, e-f", 1.0),
        ("b-c\nc-d\nd-e\ne-f\nf-g", 1.0),  # more keys than asked for do no harm
        ("a-b, b-c, c-d", 0.5),  # the start itself first
        ("b-c, c-d, x-y, e-f", 0.5),  # nothing counts after the first wrong one
        ("b-c, d-e, c-d, e-f", 0.25),
        ("c-d, d-e, e-f", 0.0),
        ("", 0.0),
    ]:
        assert family.score(prediction, references) == {"score": score}, prediction


# ---- RULER


def test_ruler_string_match_by_hand():
    assert scoring.match_all("They are 123 and 456.", ["123", "456", "789", "12"]) == 0.75
    assert scoring.match_all("ALPHA", ["alpha"]) == 1
    assert scoring.match_any("in the town of Denver, Colorado", ["colorado", "Utah"]) == 1
    assert scoring.match_any("Denver", ["Colorado", "Utah"]) == 0


def test_needles_stand_in_the_haystack_once():
    for name, queries, values in [("niah_single_1", 1, 1), ("niah_multivalue", 1, 4), ("niah_multiquery", 4, 1)]:
        problem, _ = draw(name, 50)
        assert len(problem.references) == queries * values
        found = re.findall(r"The secret number of (\S+) is (\d{7})\.", problem.fields["context"])
        assert len(found) == queries * values
        assert problem.fields["query"].replace(" and", "").split(", ") == list(
            dict.fromkeys(next(key for key, value in found if value == answer) for answer in problem.references)
        )
    problem, _ = draw("niah_multikey_1", 50)
    assert len(re.findall(r"The secret number of", problem.fields["context"])) == 4 and len(problem.references) == 1
    problem, _ = draw("niah_multikey_3", 50)
    needles = re.findall(r"The secret uuid of (\S{36}) is (\S{36})\.", problem.fields["context"])
    assert len(dict(needles)) == 51 and dict(needles)[problem.fields["query"]] == problem.references[0]
    noise = draw("niah_single_1", 50)[0].fields["context"].split("\n")
    assert len(noise) == 51 and len(set(noise)) == 2


def test_needles_use_the_essays_they_are_given(tmp_path):
    file = tmp_path / "essays.jsonl"
    file.write_text("".join(json.dumps({"body": f"Sentence {i} here. And\nthen {i}!"}) + "\n" for i in range(3)))
    problem, made = draw("niah_single_2", 5, data_files=[str(file)], text_column="body")
    sentences = re.split(r"(?<=[.!])\s", problem.fields["context"])
    assert len(sentences) == 6 and made.label == "niah_single_2"
    kept = [sentence for sentence in sentences if "secret" not in sentence]
    ring = [f"Sentence {i} here." if part == 0 else f"And then {i}!" for i in range(3) for part in range(2)]
    start = ring.index(kept[0])
    assert kept == [ring[(start + i) % 6] for i in range(5)]


def test_wonderwords_are_rulers_keys():
    problem, _ = draw("niah_single_1", 5, words="wonderwords")
    assert re.fullmatch(r"[^\d]+-[^\d]+", problem.fields["query"])
    problem, _ = draw("cwe", 30, words="wonderwords")
    assert len(set(problem.references)) == 10 and set(problem.references) <= set(wonderwords_vocabulary())


def test_variables_are_assigned_in_order():
    problem, _ = draw("vt", 20, chains=2)
    lines = problem.fields["context"].split("\n")
    assert len(lines) == 20 + 2 * 5
    held, order = {}, []
    for line in lines:
        if match := re.fullmatch(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", line):
            held[match[1]] = held.get(match[2], match[2])
            order.append(match[1])
    assert len(held) == 10 and len(set(held.values())) == 2
    assert [name for name in order if held[name] == problem.fields["query"]] == problem.references
    assert len(problem.examples) == 1 and len(problem.examples[0].references) == 5


def test_common_words_are_repeated():
    for length, often, seldom in [(4096, 30, 3), (2600, 6, 1)]:
        problem, _ = draw("cwe", 25, length=length)
        listed = re.findall(r"(\d+)\. ([a-z]+)", problem.fields["context"])
        assert [int(number) for number, _ in listed] == list(range(1, 10 * often + 15 * seldom + 1))
        counts = Counter(word for _, word in listed)
        assert {word for word, count in counts.items() if count == often} == set(problem.references)
        assert sorted(counts.values()) == [seldom] * 15 + [often] * 10


def test_frequent_words_follow_the_zeta_distribution():
    problem, made = draw("fwe", 1000)
    # 1000 / zeta(2) = 607.93, over 1, 4, 9, 16, 25
    assert made.family.counts(1000)[:5] == [607, 151, 67, 37, 24]
    counts = Counter(problem.fields["context"].split())
    assert counts.most_common(4) == [("...", 607), *zip(problem.references, (151, 67, 37), strict=True)]
    assert made.family.different == LENGTH // 50


def test_questions_from_squad(tmp_path):
    paragraphs = [
        {"context": f"Text {a}{p}.", "qas": [{"question": f"Q{a}{p}?", "answers": [{"text": f"A{a}{p}"}]}]}
        for a in "xyz"
        for p in range(3)
    ]
    paragraphs[0]["qas"].append({"question": "Never?", "answers": [], "is_impossible": True})
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"paragraphs": paragraphs[3 * a : 3 * a + 3]} for a in range(3)]}))
    made = task("qa_1", data_files=str(file))
    asked = set()
    for index in range(9):
        problem = made.family.draw(random.Random(index), 4, index, made.template)
        asked.add(problem.fields["query"])
        name = problem.fields["query"][1:-1]
        texts = re.findall(r"Document (\d+):\nText (\w\d)\.", problem.fields["context"])
        assert [int(number) for number, _ in texts] == [1, 2, 3, 4]
        # its own paragraph, the article's other two, and one of another article
        assert sorted(text[0] == name[0] for _, text in texts) == [False, True, True, True]
        assert problem.references == [f"A{name}"] and problem.answer == f" A{name}"
    assert len(asked) == 9 and made.family.largest_size(0) == 9 and made.label == "qa_1"
    assert made.family.draw(random.Random(0), 4, 0, made.template).references  # a real answer may be long
    assert not made.family.answer_fits and task("qa_1").family.answer_fits
    with pytest.raises(SettingsError, match="has 9 questions"):
        made.family.draw(random.Random(0), 4, 9, made.template)


def test_files_that_cannot_be_read(tmp_path, tokenizer):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "page.html").write_text("text")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": "One."}) + "\n")
    for name, file, message in [
        ("niah_single_2", "nowhere.txt", "nowhere.txt cannot be read"),
        ("niah_single_2", "empty.txt", "the files are empty|the files hold no sentence|cannot be read"),
        ("niah_single_2", "page.html", r"must be files of one kind \(\.txt, "),
        ("niah_single_2", "rows.jsonl", "text_column=text: the files have no such column, only body"),
        ("qa_1", "nowhere.json", "there is no file"),
        ("gov_report", "rows.jsonl", "have no column context; they have body"),
    ]:
        with pytest.raises(SettingsError, match=f"^tasks.{name}.*({message})") as caught:
            next(task(name, data_files=str(tmp_path / file)).examples(tokenizer, 1))
        assert "\n" not in str(caught.value)


def test_questions_from_hotpot(tmp_path):
    file = tmp_path / "hotpot.json"
    items = [
        {"question": f"Q{i}?", "answer": f"A{i}", "context": [[f"T{i}{j}", ["One. ", "Two."]] for j in range(2)]}
        for i in range(4)
    ]
    file.write_text(json.dumps(items))
    made = task("qa_2", data_files=str(file))
    problem = made.family.draw(random.Random(0), 3, 0, made.template)
    number = problem.fields["query"][1]
    titles = re.findall(r"Document \d:\n(T\d\d)\nOne. Two.", problem.fields["context"])
    assert len(titles) == 3 and {f"T{number}0", f"T{number}1"} < set(titles) and problem.references == [f"A{number}"]
    with pytest.raises(SettingsError, match="does not have the layout of source=squad"):
        draw("qa_1", 3, data_files=str(file))


def test_made_up_questions_need_one_or_two_documents():
    problem, _ = draw("qa_1", 6)
    person = re.fullmatch(r"In which town does (\w+ \w+) live\?", problem.fields["query"])[1]
    assert f"{person} lives in {problem.references[0]} " in problem.fields["context"]
    problem, _ = draw("qa_2", 6)
    person = re.fullmatch(r"In which country does (\w+ \w+) live\?", problem.fields["query"])[1]
    town = re.search(rf"{person} lives in (\w+) ", problem.fields["context"])[1]
    assert f"{town} lies in {problem.references[0]} " in problem.fields["context"]


# ---- LongProc


def test_path_traversal_has_one_route():
    problem, _ = draw("path_traversal", 30, steps=6)
    lines = re.findall(r"From (\w+), the (\w+) goes to (\w+)\.", problem.fields["context"])
    assert len(lines) == 30
    connections = {city: (transit, other) for city, transit, other in lines}
    assert len(connections) == 30 and all(city != other for city, (_, other) in connections.items())
    city, route = problem.fields["start"], []
    for _ in range(6):
        transit, other = connections[city]
        route.append(f"From {city}, take a {transit} to {other}.")
        city = other
    assert city == problem.fields["goal"] and problem.references == route
    assert problem.answer == "\n".join(["<Route>", *route, "</Route>"])


def test_path_traversal_score_by_hand():
    family, references = task("path_traversal").family, ["one", "two", "three", "four"]
    for prediction, score, partial in [
        ("<Route>\none\ntwo\nthree\nfour\n</Route> and so on", 1.0, 1.0),
        ("<Route>\n one\ntwo\nx\nfour \n</Route>", 0.0, 0.5),
        ("<Route>\none\n two\nthree\nfour\n</Route>", 0.0, 0.25),  # LongProc strips the whole, not the lines
        ("<Route>\none\ntwo\nthree\nfour\nfive\n</Route>", 0.0, 1.0),
        ("<Route>\none\ntwo\nthree\nfour", 0.0, 0.0),  # no end
        ("one\ntwo\nthree\nfour", 0.0, 0.0),
    ]:
        assert family.score(prediction, references) == {"score": score, "partial": partial}, prediction


def test_countdown_search_by_hand():
    # pairs from left to right, larger number first, + - * /; the result goes in front
    lines, equations = search([4, 2, 3], 3)
    assert equations == ["4 + 2 = 6", "6 - 3 = 3"]
    assert lines == ["4 + 2 = 6: left 6, 3", "  6 + 3 = 9: not 3, drop", "  6 - 3 = 3: Target reached."]
    lines, equations = search([2, 6, 1], 4)
    assert lines == [
        "6 + 2 = 8: left 8, 1",
        "  8 + 1 = 9: not 4, drop",
        "  8 - 1 = 7: not 4, drop",
        "  8 * 1 = 8: not 4, drop",
        "  8 / 1 = 8: not 4, drop",
        "6 - 2 = 4: left 4, 1",
        "  4 + 1 = 5: not 4, drop",
        "  4 - 1 = 3: not 4, drop",
        "  4 * 1 = 4: Target reached.",
    ]
    assert equations == ["6 - 2 = 4", "4 * 1 = 4"]
    assert "50 * 50: too large, drop" in search([50, 50, 3], 4)[0]
    lines, equations = search([3, 3, 7], 8)
    assert lines == [
        "3 + 3 = 6: left 6, 7",
        "  7 + 6 = 13: not 8, drop",
        "  7 - 6 = 1: not 8, drop",
        "  7 * 6 = 42: not 8, drop",
        "  7 / 6: not whole, drop",
        "3 - 3 = 0: left 0, 7",
        "  7 + 0 = 7: not 8, drop",
        "  7 - 0 = 7: not 8, drop",
        "  7 * 0 = 0: not 8, drop",
        "  7 / 0: division by zero, drop",
        "3 * 3 = 9: left 9, 7",
        "  9 + 7 = 16: not 8, drop",
        "  9 - 7 = 2: not 8, drop",
        "  9 * 7 = 63: not 8, drop",
        "  9 / 7: not whole, drop",
        "3 / 3 = 1: left 1, 7",
        "  7 + 1 = 8: Target reached.",
    ]
    assert equations == ["3 / 3 = 1", "7 + 1 = 8"]
    with pytest.raises(ValueError, match="no way"):
        search([1, 1], 7)


def test_countdown_solutions_by_hand():
    numbers = [9, 16, 6, 18]
    for text, right in [
        ("9 + 16 = 25\n25 - 6 = 19\n19 + 18 = 37", True),
        ("9+16=25\n 25 - 6=19\n19+18 = 37 ", True),  # spaces do not matter
        ("9 + 16 = 25\n25 - 6 = 19\n19 + 18 = 37 done", False),
        ("9 + 16 = 25\n25 - 6 = 19\n19 + 18 = " + 5000 * "9", False),
        ("9 + 16 = 25\n25 - 6 = 19", False),
        ("9 + 16 = 25\n25 - 6 = 18\n18 + 18 = 36", False),  # wrong sum
        ("9 + 16 = 25\n25 - 9 = 16\n16 + 18 = 34", False),  # a number twice
        ("9 + 16 = 25\n25 - 6 = 19\n19 - 18 = 1", False),  # another target
        ("9 + 16 = 25\nso\n19 + 18 = 37", False),
        ("9 + 16 = 25\n25 / 6 = 4\n4 + 18 = 22", False),
    ]:
        assert is_solution(text, numbers, 37) is right, text
    family = task("countdown").family
    references = {"numbers": [4, 2, 3], "target": 3, "search": search([4, 2, 3], 3)[0]}
    found = "<Solution>\n4 + 2 = 6\n6 - 3 = 3\n</Solution>"
    assert family.score(found, references) == {"score": 1.0, "partial": 1.0}
    lines = "# Search\n4 + 2 = 6: left 6, 3\n  6 + 3 = 9: not 3, drop\n  6 * 3 = 18: not 3, drop"
    assert family.score(lines, references) == {"score": 0.0, "partial": pytest.approx(2 / 3)}
    assert family.score("4 + 2 = 6: left 6, 3", references) == {"score": 0.0, "partial": 0.0}


def test_html_rows_by_hand():
    expected = read_table("Name\tPrice\nThe Red Hat\t$1.50\nBlue-Cap\t2\nScarf\t3")
    assert expected == [("redhat", "150"), ("bluecap", "2"), ("scarf", "3")]
    for text, precision, recall in [
        ("h\th\nscarf\t3\nred hat\t1.50\nBlue cap\t2", 1.0, 1.0),
        ("h\th\nscarf\t3\nred hat\t9", 1 / 2, 1 / 3),
        ("h\th\nscarf\t3\nscarf\t3\nscarf\t3\nx\ty", 3 / 4, 1 / 3),
        ("h\th\nscarf\t3\nbroken\nred hat\t1.50", 2 / 3, 2 / 3),  # a row with too few cells matches nothing
        ("h\th\nscarf\t3\nthat was all", 1.0, 1 / 3),  # but the last one is left out
        ("h\nscarf", 0.0, 0.0),  # another number of columns
        ("h\th", 0.0, 0.0),
        ("h\th\nscarf\t3\rred hat\t1.50", 0.0, 0.0),  # no table: a carriage return within a line
        ("", 0.0, 0.0),
    ]:
        assert row_overlap(read_table(text), expected) == pytest.approx((precision, recall)), text


def test_html_score_reads_the_fenced_table():
    family, table = task("html_to_tsv").family, "a\tb\n1\t2\n3\t4"
    half = {"score": pytest.approx(2 / 3), "precision": 1.0, "recall": 0.5}
    assert family.score(f"Here:\n```tsv\n{table}\n```\nDone.", table)["score"] == 1
    assert family.score("```tsv\na\tb\n1\t2\n```", table) == half
    assert family.score("```tsv\na\tb\n1\t2\n3", table) == half  # cut short
    assert family.score(table, table)["score"] == 1


def test_html_pages_hold_the_rows():
    problem, _ = draw("html_to_tsv", 12, rows=4)
    cards = problem.fields["context"].split('<div class="card"')[1:]
    wanted = [card for card in cards if f'<p class="kind">{problem.fields["category"]}</p>' in card]
    rows = [line.split("\t") for line in problem.references.split("\n")[1:]]
    assert len(cards) == 12 and len(wanted) == len(rows) == 4
    for card, cells in zip(wanted, rows, strict=True):
        assert all(f">{cell}<" in card for cell in cells)


# ---- summaries


@pytest.fixture
def documents(tmp_path) -> str:
    file = tmp_path / "documents.jsonl"
    text = " ".join(f"word{i}" for i in range(900))
    rows = [{"context": text, "input": f"Why {i}?", "answers": ["Word 0 and word 1.", f"All {i}."]} for i in range(2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_documents_within_an_archive(documents, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # it takes every address for one of the network
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(documents, "data/qmsum.jsonl")
    inside = task("qmsum", data_files=f"zip://data/qmsum.jsonl::{tmp_path / 'data.zip'}")
    (found,), (expected,) = (made.examples(tokenizer, 1) for made in (inside, task("qmsum", data_files=documents)))
    assert (found.prompt, found.references) == (expected.prompt, expected.references)


def test_summaries_cut_the_documents_end(documents, tokenizer):
    made = task("qmsum", data_files=documents)
    first, second = made.examples(tokenizer, 2)
    assert (
        "Why 0?" in first.prompt and "Why 1?" in second.prompt and first.references == ["Word 0 and word 1.", "All 0."]
    )
    kept = re.findall(r"word(\d+)", first.prompt)
    assert kept == [str(i) for i in range(len(kept))] and 0 < len(kept) < 900
    room = LENGTH - made.family.max_new_tokens
    assert FULL_ENOUGH * room <= len(first.prompt_ids) <= room
    with pytest.raises(SettingsError, match=r"tasks\.qmsum\.data_files hold 2 documents"):
        list(made.examples(tokenizer, 3))
    whole = next(task("gov_report", data_files=documents, length=20_000).examples(tokenizer, 1))
    assert "word899" in whole.prompt


def test_rouge_by_hand(documents):
    made = task("gov_report", data_files=documents)
    # longest common subsequence: "the cat sat", 3 of 4 words of the prediction and 3 of 6 of the reference
    f = 2 * (3 / 4) * (3 / 6) / (3 / 4 + 3 / 6)
    assert made.score("the cat quietly sat", ["the cat sat on the mat"])["score"] == pytest.approx(f)
    assert made.score("the cat quietly sat", ["no", "The cats quietly sat."])["score"] == 1


def test_rouge_without_its_library(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("rouge_score"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SettingsError, match=r'pip install "refreshkv\[tasks\]"'):
        scoring.rouge_l("a", ["a"])


# ---- wording and room


def test_a_template_file_replaces_parts(tmp_path, tokenizer):
    file = tmp_path / "ruler.yaml"
    file.write_text('prompt: "{context}\\nWhat is the {kind} of {query}?"\nneedle: "{key} has {kind} {value}!"\n')
    example = next(task("niah_single_1", template_file=str(file)).examples(tokenizer, 1))
    assert re.search(rf"\S+ has number {example.references[0]}!", example.prompt)
    assert re.search(r"What is the number of \S+\?The text gives these secret numbers of \S+:$", example.prompt)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('prompts: "{context}"', "unknown part 'prompts'; this task has needle, noise, prompt, answer_prefix"),
        ('prompt: "{context} {query}"', r"prompt lacks \{kind\}"),
        ('prompt: "{context} {query} {kind} {value}"', r"prompt has an unknown \{value\}"),
        ('needle: "{key} {kind} {value} {context}"', r"needle has an unknown \{context\}"),
        ('prompt: "{context"', "prompt: .*write {{ and }} for braces"),
        ("prompt: 5", "prompt must be text, got 5"),
        ("just text", "must hold parts of text"),
        ("{", "is not readable YAML"),
    ],
)
def test_templates_that_do_not_fit(tmp_path, content, message):
    file = tmp_path / "own.yaml"
    file.write_text(content)
    with pytest.raises(SettingsError, match=message):
        load_template(TASKS["niah_single_1"][0].template, str(file), "tasks.niah_single_1.template_file")
    with pytest.raises(SettingsError, match="there is no file"):
        load_template({}, "nowhere.yaml", "x")


def test_chat_template_wraps_the_question(tokenizer):
    made = task("niah_single_1", chat=True)
    with pytest.raises(SettingsError, match="niah_single_1.chat: the tokenizer has no chat template"):
        next(made.examples(tokenizer, 1))
    chatty = train_tokenizer(["a b"] * 3, 300)
    for template, reason in {"{% for": "does not take", "{# #}": "writes nothing", "hello": "leaves it out"}.items():
        chatty.chat_template = template
        with pytest.raises(SettingsError, match=f"niah_single_1.chat: the tokenizer's chat template .*{reason}"):
            next(made.examples(chatty, 1))
    chatty.chat_template = "<user>{{ messages[0]['content'] }}</user><model>"
    example = next(task("niah_single_1", chat=True, length=3000).examples(chatty, 1))
    assert example.prompt.startswith("<user>The text") and "</user><model>The text gives" in example.prompt


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("niah_single", {}, "there is no task niah_single; did you mean niah_single_"),
        ("zzz", {}, "there is no task zzz: known are chain_of_key, "),
        ("vt", {"hop": 3}, "tasks.vt: unknown setting hop; did you mean hops"),
        ("vt", {"hops": 0}, "tasks.vt: hops must be"),
        ("vt", {"length": 30}, "tasks.vt: length=30 .* leaves no prompt"),
        ("vt", {"max_new_tokens": 0}, "tasks.vt: max_new_tokens must be"),
        ("chain_of_key", {"words_per_key": 1}, "tasks.chain_of_key: keys must be"),
        ("chain_of_key", {"syllables": 1}, "tasks.chain_of_key: syllables must be between 2 and 8, got 1"),
        ("niah_single_1", {"data_files": "x"}, "data_files means nothing for haystack=noise"),
        ("niah_single_2", {"values": 41}, "40 places"),
        ("cwe", {"common_repeats": 3}, "common_repeats above uncommon_repeats"),
        ("fwe", {"alpha": 9.0}, "come equally often"),
        ("gov_report", {}, "tasks.gov_report: data_files: name files"),
        ("qmsum", {"data_files": "x", "question_column": None}, "question_column must name"),
        ("path_traversal", {"steps": 0}, "steps must be"),
        ("countdown", {"largest_number": 1}, "largest_number must be"),
        ("html_to_tsv", {"rows": 0}, "rows must be"),
    ],
)
def test_settings_that_cannot_work(name, values, message):
    with pytest.raises(SettingsError, match=message) as caught:
        build_task(name, values)
    assert "\n" not in str(caught.value)


def test_room_that_is_too_small(tokenizer, monkeypatch):
    monkeypatch.setattr("refreshkv.data.tasks.task.MOST_REDRAWS", 20)
    with pytest.raises(SettingsError, match="chain_of_key.length=300 is too short: the shortest prompt has"):
        next(task("chain_of_key", length=300).examples(tokenizer, 1))
    with pytest.raises(SettingsError, match="chain_of_key.max_new_tokens=8 cannot hold the right answer"):
        next(task("chain_of_key", max_new_tokens=8).examples(tokenizer, 1))
    with pytest.raises(SettingsError, match="countdown.max_new_tokens=30: of 20 problems none"):
        next(task("countdown", max_new_tokens=30, length=4000).examples(tokenizer, 1))
    with pytest.raises(SettingsError, match="tasks.vt has settings but is not among the tasks: fwe"):
        build_tasks(["fwe"], {"vt": {}})


def test_settings_of_a_group():
    """They apply to its tasks that have them; a task's own override them in any order."""
    values = {"vt": {"hops": 2, "chat": False}, "ruler": {"chat": True, "hops": 3}}
    values["ruler_essays"] = {"data_files": "essays.txt"}
    made = {
        item.name: item.family for item in build_tasks(["ruler", "chain_of_key"], {**values, "cwe": None}, length=8192)
    }
    assert made["vt"].hops == 2 and not made["vt"].chat and made["cwe"].chat and not made["chain_of_key"].chat
    assert [name for name, family in made.items() if getattr(family, "data_files", None)] == [
        *("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
    ]
    assert all(family.length == 8192 for family in made.values())
    assert [item.family.chat for item in training_tasks({"ruler": {"chat": True}}, 4096)] == [True] * 13
    for names, values, message in [
        (["ruler"], {"ruler": {"hop": 3}}, "tasks.ruler.hop: none of these tasks has such a setting"),
        (["qmsum"], {"ruler": {"chat": True}}, "tasks.ruler has settings but is not among the tasks: qmsum"),
        (["vt"], {"vt": 3}, r"tasks.vt must be a section with settings, \{\} for none, got 3"),
    ]:
        with pytest.raises(SettingsError, match=message):
            build_tasks(names, values)


# ---- the training form


def test_training_rows(tmp_path, tokenizer):
    values = {"chain_of_key": {"keys": 3, "max_new_tokens": 60}, "niah_multikey_2": {"max_new_tokens": 20}}
    tasks = training_tasks(values, 400)
    begin = prompt_length(tasks, 400)
    assert begin == 400 - 60 - 1
    rows = list(task_sequences(tasks, tokenizer, 400, 5))
    examples = [list(made.examples(tokenizer, 3, "training", begin, made.family.max_new_tokens)) for made in tasks]
    in_turn = [examples[i % 2][i // 2] for i in range(6)]
    assert len(rows) == 5
    for row, example, before in zip(rows, in_turn[1:], in_turn, strict=False):
        front, end = begin - len(example.prompt_ids), begin + row.answer_length
        assert len(row.token_ids) == 400 and row.text == example.prompt + example.answer
        assert row.token_ids[front:begin] == example.prompt_ids
        assert row.token_ids[begin:end] == [*example.answer_ids, tokenizer.eos_token_id]
        filling = [*before.prompt_ids, *before.answer_ids, tokenizer.eos_token_id]
        assert row.token_ids[:front] == filling[len(filling) - front :]
        assert row.token_ids[end:] == filling[: 400 - end]


def test_summaries_longer_than_their_room_are_cut(tmp_path, tokenizer):
    file = tmp_path / "long.jsonl"
    summary = " ".join(f"point{i}" for i in range(300))
    rows = [{"context": f"Text {i}. " * 50, "answers": [f"{i}: {summary}"]} for i in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = training_tasks({"gov_report": {"data_files": str(file), "max_new_tokens": 40}}, 400)
    (first, second) = task_sequences(tasks, tokenizer, 400, 2)
    assert len(first.token_ids) == len(second.token_ids) == 400 and first.answer_length == 41
    whole = tokenizer(first.text[first.text.rindex(" 1: point0") :], add_special_tokens=False).input_ids
    assert first.token_ids[400 - 41 :] == whole[:41] and tokenizer.eos_token_id not in whole[:41]


def test_tasks_are_prepared_like_any_corpus(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = DataConfig(
        folder=str(tmp_path / "rows"),
        path="tasks",
        tasks={"chain_of_key": {"keys": 3, "max_new_tokens": 60}, "vt": {"max_new_tokens": 64, "examples": 0}},
        task_examples=40,
        tokenizer=str(tmp_path / "tokenizer"),
        row_length=600,
    )
    report = prepare_rows(config, budget=50)
    assert "answers begin at token 535: with simulation.prompt_length=535" in str(report)
    rows = load_rows(config.folder)
    assert sum(len(split) for split in (rows.train, rows.validation, rows.test)) == 40 and len(rows.test) > 0
    assert rows.info["prompt_length"] == 535 and list(rows.info["tasks"]) == ["chain_of_key", "vt"]
    own = AutoTokenizer.from_pretrained(rows.tokenizer_folder)
    for row in islice(rows.train, 4):
        begin, end = int(row["prompt_length"]), int(row["prompt_length"] + row["answer_length"])
        ids = row["input_ids"].tolist()
        assert begin == 535 and ids[end - 1] == own.eos_token_id and own.eos_token_id not in ids[begin : end - 1]
        batch = make_batch({name: row[name][None] for name in row if name != "document"}, "answers", "cpu")
        assert batch.targets[batch.counted].tolist() == ids[begin:end]
        answer = own.decode(ids[begin : end - 1])
        assert re.fullmatch(r"( [a-z]+-[a-z]+,?){3}|( [A-Z]{5},?){5}", answer), answer
    assert prepare_rows(config, budget=50, overwrite=True).info["fingerprint"] == report.info["fingerprint"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "json", "data_files": "x", "tasks": {"vt": {}}}, "data.tasks means nothing for data.path=json"),
        ({"path": "tasks"}, "name the tasks in data.tasks"),
        ({"path": "tasks", "tasks": {"vt": {}}, "max_documents": 3}, "data.max_documents means nothing"),
        ({"path": "tasks", "tasks": {"vt": {}}, "train_vocabulary": 300}, "data.train_vocabulary means nothing"),
        ({"task_examples": 0}, "data.task_examples must be"),
    ],
)
def test_task_corpora_that_cannot_work(values, message):
    with pytest.raises(SettingsError, match=message):
        DataConfig(**values)


def test_training_tasks_that_cannot_work():
    for values, message in [
        ({"vtt": {}}, "data.tasks: there is no task vtt; did you mean vt"),
        ({"vt": {"hop": 1}}, "data.tasks.vt: unknown setting hop"),
        ({"vt": {"length": 99}}, "data.tasks.vt.length is set by data.row_length=400"),
        ({"vt": 5}, "data.tasks.vt must be a section"),
        ({"vt": {"max_new_tokens": 400}}, "data.tasks.vt: length=400 .*; `length` is data.row_length=400 here"),
    ]:
        with pytest.raises(SettingsError, match=message):
            training_tasks(values, 400)


def test_training_rows_that_are_too_short(tokenizer):
    tasks = training_tasks({"chain_of_key": {"max_new_tokens": 60}}, 300)
    with pytest.raises(SettingsError, match="data.tasks.chain_of_key.length=300 is too .*is data.row_length=300 here"):
        next(task_sequences(tasks, tokenizer, 300, 5))


def test_documented():
    text = Path(__file__).parents[2].joinpath("docs", "tasks.md").read_text()
    assert all(f"`{name}`" in text for name in TASKS)
