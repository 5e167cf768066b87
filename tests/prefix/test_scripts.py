"""launch/generate.py and launch/evaluate.py with --prefix-store."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch

from refreshkv import RefreshConfig, enable
from refreshkv.evaluation.strategies import build_strategies
from refreshkv.evaluation.tasks.scores import BatchOptions, ExampleRecords, evaluate_tasks, make_examples
from refreshkv.prefix.store import PrefixStore
from refreshkv.settings import SettingsError
from tests.evaluation.test_task_scores import CONFIG, lines, model, tasks, tokenizer  # noqa: F401  fixtures
from tests.generation.test_generate import SLIDING, letters_tokenizer
from tests.helpers.marks import slow_tuples_unless
from tests.helpers.models import random_ids, tiny_enabled, tiny_model
from tests.helpers.scripts import load_script

PROMPT = "".join(chr(32 + token) for token in random_ids(1, 150).flatten().tolist())
CUT = 110


# ---- launch/generate.py


@pytest.fixture
def windows():
    """Settings of the model's sliding windows; tests replace them by a parameter of this name."""
    return {}


@pytest.fixture
def folder(windows, tmp_path):
    tiny_enabled(RefreshConfig(budget=12, stride=4), dtype=torch.float32, **windows).save_pretrained(tmp_path)
    letters_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "prompt.txt").write_text(PROMPT)
    (tmp_path / "other.txt").write_text(PROMPT[:CUT] + PROMPT[CUT:][::-1])
    return tmp_path


def generated(capsys, folder, prompt, *more):
    """The text, and the rows of the report."""
    given = ["--model", str(folder), "--prompt-file", str(folder / prompt), "--max-new-tokens", "12", *more]
    load_script("generate").main([*given, "--device", "cpu"])
    text, table = capsys.readouterr().out.split("\n\n")
    return text, dict(re.split(r"  +|: ", row, maxsplit=1) for row in table.strip().splitlines())


FIXED, SIMILARITY, FULL = (), ("--threshold", "0.5"), ("--full",)


@pytest.mark.parametrize(
    ("windows", "strategy"),
    slow_tuples_unless(
        [({}, SIMILARITY), ({}, FULL), (SLIDING, FIXED)],
        [(windows, strategy) for windows in ({}, SLIDING) for strategy in (FIXED, SIMILARITY, FULL)],
    ),
)
def test_generate(folder, capsys, strategy):
    store = ("--prefix-store", str(folder / "store"))
    for prompt, reused, kept in [("prompt.txt", 0, True), ("other.txt", CUT, True), ("prompt.txt", 148, False)]:
        expected, _ = generated(capsys, folder, prompt, *strategy)
        text, rows = generated(capsys, folder, prompt, *strategy, *store)
        assert text == expected
        assert re.match(rf"reused {reused} of 150 prompt tokens, \d+\.\d MB in ", rows["prefix store"])
        assert ("s saved" in rows["prefix store"]) == (reused > 0)
        assert ("prompt stored" in rows) == kept and ("prompt not stored" in rows) != kept
    assert len(list((folder / "store").glob("*.safetensors"))) == 2


def test_generate_after_documents(folder, capsys):
    """Known documents in another order; with all tokens computed again the text is that of the whole prompt."""
    texts = {"first.txt": PROMPT[:70], "second.txt": PROMPT[70:100], "whole.txt": PROMPT, "question.txt": PROMPT[100:]}
    for name, text in texts.items():
        (folder / name).write_text(text)
    first, second = str(folder / "first.txt"), str(folder / "second.txt")
    store = ("--prefix-store", str(folder / "store"), "--documents")
    expected, _ = generated(capsys, folder, "whole.txt")
    text, rows = generated(capsys, folder, "question.txt", *store, first, second, "--recompute-changed", "1")
    assert text == expected and rows["prompt tokens"] == "150"
    assert rows["prefix store"].startswith("chunks of 100 tokens, 0 of them known, 30 computed again, in ")
    text, rows = generated(capsys, folder, "question.txt", *store, second, first, "--recompute-first", "5")
    assert rows["prefix store"].startswith("chunks of 100 tokens, 100 of them known, 5 computed again, in ")
    assert text != expected


def test_generate_refuses(folder, capsys):
    store = ("--prefix-store", str(folder / "store"))
    document = ("--documents", str(folder / "other.txt"))
    for more, message in [
        (document, "--documents needs --prefix-store"),
        ((*store, "--recompute-first", "5"), "--recompute-first needs --documents"),
        ((*store, *document, "--full"), "--documents needs a small cache"),
        ((*store, *document, "--recompute-changed", "2"), "--recompute-changed must be "),
        ((*store, *document, "--max-new-tokens", "300"), "--documents: --max-new-tokens=300 and the prompt's 300"),
        (("--prefix-store-gb", "1"), "--prefix-store-gb needs --prefix-store"),
        ((*store, "--prefix-store-gb", "0"), "--prefix-store-gb must be more than 0"),
        (("--prefix-store", str(folder)), "--prefix-store .* holds .*: choose a new or an empty folder"),
    ]:
        with pytest.raises(SettingsError, match=message):
            generated(capsys, folder, "prompt.txt", *more)
    _, rows = generated(capsys, folder, "prompt.txt", *store, "--prefix-store-gb", "0.00001")
    assert rows["prompt not stored"].endswith("it alone is more than --prefix-store-gb")
    with pytest.raises(SettingsError, match=r"made by another model \(not the same dtype\)"):
        generated(capsys, folder, "prompt.txt", *store, "--dtype", "bfloat16")


# ---- launch/evaluate.py


def test_tasks_compute_each_prompt_once(model, tokenizer, tasks, tmp_path):  # noqa: F811
    """Six ways to decode, in batches: the same answers as without a store, and each prompt once."""
    names = ["full", "refresh", "refresh:9", "similarity:3:0.5", "snapkv", "streaming"]
    decodings, work = build_strategies(names, CONFIG), make_examples(model, tokenizer, tasks[1:], 3, progress=False)
    computed = []

    def count(module, args, given):
        if given["input_ids"].shape[1] > 8:
            computed.append(given["input_ids"].shape[0])

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    found = {}
    for store in (None, PrefixStore(tmp_path / "store", 10**9, model)):
        computed.clear()
        path = tmp_path / f"{store is None}.jsonl"
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            evaluate_tasks(
                model, tokenizer, work, decodings, ExampleRecords(path), BatchOptions(2), progress=False, store=store
            )
        found[store is None] = {line["key"]: line for line in lines(path)}
        assert sum(computed) == (6 * 3 if store is None else 3)
    handle.remove()
    for key, line in found[True].items():
        with_store = found[False][key]
        for name in ("prediction", "scores", "new_tokens", "full_steps", "prompt_tokens"):
            assert line[name] == with_store[name]
        assert line["reuse"] is None
        reuse = with_store["reuse"]
        assert 0.8 * line["prompt_tokens"] < reuse["tokens"] < line["prompt_tokens"] and reuse["bytes"] > 0
        assert reuse["seconds_saved"] is not None


def test_evaluate(tokenizer, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    plain = tiny_model(dtype=torch.float32, vocab_size=len(tokenizer), eos_token_id=0, max_position_embeddings=1024)
    plain.save_pretrained("model")
    tokenizer.save_pretrained("model")
    main = load_script("evaluate").main
    given = ["--model", "model", "--tasks", "chain_of_key", "--task-length", "260", "--examples", "2", "--budget", "40"]
    given += ["--device", "cpu", "tasks.chain_of_key.keys=2", "tasks.chain_of_key.max_new_tokens=20"]
    main([*given, "--output", "without"])
    main([*given, "--output", "with", "--prefix-store", "store"])
    reports = [json.loads(Path(name, "tasks.json").read_text()) for name in ("without", "with")]
    scores = [[result["scores"] for result in report["results"]] for report in reports]
    assert scores[0] == scores[1]
    assert reports[1]["settings"]["prefix store"] == "store; seconds are without the prompts'"
    assert all(line["reuse"]["tokens"] > 100 for line in lines(Path("with/examples.jsonl")))
    for more, message in [
        (["--prefix-store-gb", "1"], "--prefix-store-gb needs --prefix-store"),
        (["--prefix-store", "store", "--prefix-store-gb", "inf"], "--prefix-store-gb must be a finite number"),
        (["--prefix-store", "model"], "--prefix-store model holds .*: choose a new or an empty folder"),
        (["--prefix-store", "store", "--dtype", "bfloat16"], r"not the same dtype"),
    ]:
        with pytest.raises(SettingsError, match=message):
            main([*given, "--output", "refused", *more])
    assert not Path("refused").exists()
    with pytest.raises(SettingsError, match="--prefix-store means nothing with --data"):
        main(["--model", "model", "--data", "rows", "--prefix-store", "store"])


def test_h2o_with_a_store_is_refused(model, tokenizer, tasks, tmp_path):  # noqa: F811
    """Before anything is computed; without a store it computes its prompts."""
    work, decodings = make_examples(model, tokenizer, tasks[1:], 1, progress=False), build_strategies(["h2o"], CONFIG)
    records, store = ExampleRecords(tmp_path / "examples.jsonl"), PrefixStore(None, 10**9, model)
    with pytest.raises(SettingsError, match=r"H2OCache depends .*: leave out the prefix store \(--prefix-store\), or"):
        evaluate_tasks(model, tokenizer, work, decodings, records, progress=False, store=store)
    assert not (tmp_path / "examples.jsonl").exists() and not store.entries


def test_old_records_are_still_read(tmp_path, tokenizer, tasks):  # noqa: F811
    settings = {"vocab_size": len(tokenizer), "eos_token_id": 0, "max_position_embeddings": 1024}
    again = enable(tiny_model(dtype=torch.float64, **settings), CONFIG)
    work = make_examples(again, tokenizer, tasks[:1], 1, progress=False)
    path = tmp_path / "examples.jsonl"
    evaluate_tasks(again, tokenizer, work, build_strategies(["full"], CONFIG), ExampleRecords(path), progress=False)
    (line,) = lines(path)
    del line["reuse"], line["checksum"]
    path.write_text(json.dumps(line) + "\n")
    assert ExampleRecords(path).get(line["key"]).reuse is None
