"""The benchmark of chunked prompts runs to its tables, and its losses are those of a plain computation."""

import json
import sys

import pytest
import torch

from tests.benchmarks.test_benchmarks import BENCHMARKS
from tests.helpers.models import VOCABULARY, random_ids, tiny_model
from tests.helpers.rows import save_rows

ROWS, LENGTH, LAST, CHUNKS = 3, 90, 20, 4


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import chunks

    yield chunks
    sys.modules.pop("chunks")


def losses(model, ids, mask):
    """Mean loss of the last tokens of ids (1, T), whose attention sees the columns of `mask` (T, T) bool."""
    with torch.no_grad():
        logits = model(ids, attention_mask=mask[None, None]).logits[:, -LAST - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits[0], ids[0, -LAST:]))


def test_losses_are_those_of_masks(script, tmp_path, capsys):
    """Full prompts, and chunks alone: computed by the model itself with a mask."""
    model, ids = tiny_model(dtype=torch.float32), random_ids(ROWS, LENGTH)
    model.save_pretrained(tmp_path / "model")
    save_rows(tmp_path / "rows", {"train": ids.tolist(), "validation": [], "test": ids.tolist()}, VOCABULARY)
    command = ["--loss", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows"), "--output"]
    sizes = ["--last-tokens", str(LAST), "--chunks", str(CHUNKS), "--dtype", "float32"]
    script.main([*command, str(tmp_path / "out"), *sizes])
    found = json.loads((tmp_path / "out" / "chunks.json").read_text())["loss"]
    lines = {(line["prompt"], line["then"]): line for line in found}
    assert list(lines) == [
        *((name, "full") for name in ("full prompt", "chunks alone", "first 16", "changed 15%", "question alone")),
        ("full prompt", "recommended"),
        ("chunks alone", "recommended"),
    ]
    ends = script.equal_ends(LENGTH - LAST, CHUNKS)
    assert ends == (17, 35, 52, 70)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    alone = causal.clone()
    for start, end in zip((0, *ends), ends[:-1], strict=False):
        alone[start:end, :start] = False
    for name, mask in (("full prompt", causal), ("chunks alone", alone)):
        expected = sum(losses(model, row[None], mask) for row in ids) / ROWS
        assert lines[name, "full"]["nats"] == pytest.approx(expected, abs=2e-5)
    over = [losses(model, row[None], alone) - losses(model, row[None], causal) for row in ids]
    assert lines["chunks alone", "full"]["over full of rows"] == pytest.approx(over, abs=1e-5)
    assert lines["chunks alone", "full"]["±"] == pytest.approx(torch.tensor(over).std().item() / ROWS**0.5, abs=2e-5)
    assert lines["full prompt", "full"]["agreement"] == 1 and lines["chunks alone", "full"]["agreement"] < 1
    assert [line["computed"] for line in found] == [52, 0, 32, 8, 0, 52, 0]
    assert "changed 15%" in capsys.readouterr().out


def test_times_and_their_table(script, tmp_path, capsys):
    shape = "--layers 2 --hidden 64 --intermediate 64 --heads 4 --kv-heads 2 --vocabulary 128".split()
    sizes = "--documents 3 --document-tokens 40 --question-tokens 8 --repeat 1 --first 4 --dtype float32".split()
    script.main(["--time", *shape, *sizes, "--output", str(tmp_path)])
    found = json.loads((tmp_path / "chunks.json").read_text())["time"]
    assert [line["prompt"] for line in found] == ["full prompt", "chunks alone", "first 4", "changed 15%"]
    assert [line["recomputed"] for line in found] == [0, 0, 8, 18]
    assert all(line["first token ms"] > 0 for line in found) and found[0]["times faster"] == 1
    assert "chunks alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --loss or --time"),
        (["--loss"], "needs --model"),
        (["--loss", "--model", "m", "--data", "d", "--chunks", "1"], "make two"),
    ],
)
def test_what_cannot_be_measured_is_refused(script, arguments, words, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert words in capsys.readouterr().err
