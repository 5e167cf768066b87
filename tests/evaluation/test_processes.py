"""Several processes share an evaluation: files and figures are those of one, also after an interruption."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from refreshkv import RefreshConfig, Simulation, enable
from refreshkv.data.tasks.words import coined_words
from refreshkv.data.tokenizer import train_tokenizer
from refreshkv.evaluation.processes import joined_processes
from refreshkv.settings import SettingsError
from tests.helpers.models import decode_logits, random_ids, tiny_model
from tests.helpers.ranks import run_ranks, run_script
from tests.helpers.rows import save_rows
from tests.helpers.scripts import load_script

TIMES = ("prompt_seconds", "seconds", "peak_memory", "checksum")
PERPLEXITY = (
    "--data {folder}/rows --rows 5 --last-tokens 24 --budget 6 --batch-size 2 --strategies full,refresh:4,snapkv"
)
TASKS = "--tasks niah_single_2 --task-length 520 --examples 3 --budget 40 --strategies full,refresh:4"
SWEEP = "--data {folder}/rows --rows 3 --last-tokens 24 --budget 6 --thresholds 0.2,0.8 --strides 4 --split test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, and prepared sequences."""
    folder, generator = tmp_path_factory.mktemp("processes"), random.Random(0)
    tokenizer = train_tokenizer([" ".join(coined_words(generator, 200)) for _ in range(5)], 400)
    settings = {"vocab_size": len(tokenizer), "eos_token_id": 0, "bos_token_id": 0, "max_position_embeddings": 1024}
    tiny_model(dtype=torch.float32, **settings).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    splits = {name: random_ids(6, 60, seed).tolist() for seed, name in enumerate(("train", "validation", "test"))}
    save_rows(folder / "rows", splits, len(tokenizer))
    return folder


def line(folder, output, options):
    return ["--model", str(folder / "model"), "--output", str(output), *options.format(folder=folder).split()]


def run_one(script, arguments):
    load_script(script).main(arguments)


def run_two(script, arguments, log):
    return run_ranks(2, log, run_script, arguments, f"launch/{script}.py")


def records(file):
    """The lines of a file of records, without times."""
    lines = [json.loads(text) for text in Path(file).read_text().splitlines()]
    return [{name: value for name, value in own.items() if name not in TIMES} for own in lines]


def test_two_processes_write_the_records_of_one(folder, tmp_path, capsys):
    run_one("evaluate", line(folder, tmp_path / "one", PERPLEXITY))
    whole = (tmp_path / "one" / "rows.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    interrupted = tmp_path / "two"
    shutil.copytree(tmp_path / "one", interrupted)
    (interrupted / "rows.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:50])

    printed = run_two("evaluate", [*line(folder, interrupted, PERPLEXITY), "--resume"], tmp_path / "log")

    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert records(interrupted / "rows.jsonl") == records(tmp_path / "one" / "rows.jsonl")
    parallel = [own for own in lines if b'"SnapKV"' not in own]
    assert b"".join(parallel) == b"".join(
        own for own in (interrupted / "rows.jsonl").read_bytes().splitlines(keepends=True) if b'"SnapKV"' not in own
    )
    assert without_times(two["evaluation"]) == without_times(one["evaluation"])
    assert two["settings"]["processes"] == 2 and "processes" not in one["settings"]
    assert two["command"].startswith("torchrun --nproc-per-node")
    assert printed.count("report.json") == 1  # one process prints
    assert capsys.readouterr().out.count("report.json") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "report", "file"),
    [("evaluate", TASKS, "tasks.json", "examples.jsonl"), ("sweep", SWEEP, "sweep.json", "rows.jsonl")],
    ids=["tasks", "sweep"],
)
def test_every_command_divides_its_work(folder, tmp_path, script, options, report, file):
    run_one(script, line(folder, tmp_path / "one", options))
    run_two(script, line(folder, tmp_path / "two", options), tmp_path / "log")
    assert records(tmp_path / "two" / file) == records(tmp_path / "one" / file)
    one, two = (json.loads((tmp_path / name / report).read_text()) for name in ("one", "two"))
    assert without_times(two["results" if script == "evaluate" else "points"]) == without_times(
        one["results" if script == "evaluate" else "points"]
    )


def without_times(values):
    if isinstance(values, dict):
        return {name: without_times(value) for name, value in values.items() if name not in TIMES}
    return [without_times(value) for value in values] if isinstance(values, list) else values


def fail_in_the_second(folder):
    with joined_processes() as processes:
        found = processes.from_all(lambda: processes.rank + 10)
        assert found == [10, 11]
        assert list(processes.shared([1, 2, 3], lambda job: job * job)) == [(1, 1), (2, 4), (3, 9)]
        try:
            processes.from_all(lambda: fail() if processes.rank == 1 else 0)
        except SettingsError as error:
            Path(folder, f"error{processes.rank}").write_text(str(error))


def fail():
    raise SettingsError("one line")


def test_an_error_of_one_process_is_raised_in_all(tmp_path):
    run_ranks(2, tmp_path / "log", fail_in_the_second, str(tmp_path))
    assert [(tmp_path / f"error{rank}").read_text() for rank in (0, 1)] == ["one line", "one line"]


def refused(folder, options):
    try:
        load_script("evaluate").main(line(Path(folder), Path(folder) / "refused", options))
    except SettingsError as error:
        assert "--prefix-store computes each prompt once in one process" in str(error)
    else:
        raise AssertionError


@pytest.mark.slow
def test_a_prompt_store_needs_one_process(folder, tmp_path):
    run_ranks(2, tmp_path / "log", refused, str(folder), f"{TASKS} --prefix-store {tmp_path / 'store'}")


# ---- models over several devices; on this machine there is the CPU only


@pytest.mark.slow
def test_a_device_map_gives_the_same_losses(folder, tmp_path):
    run_one("evaluate", line(folder, tmp_path / "one", PERPLEXITY))
    run_one("evaluate", [*line(folder, tmp_path / "map", PERPLEXITY), "--device-map", "auto"])
    assert records(tmp_path / "map" / "rows.jsonl") == records(tmp_path / "one" / "rows.jsonl")
    assert json.loads((tmp_path / "map" / "report.json").read_text())["settings"]["device map"] == "auto"
    with pytest.raises(SettingsError, match="--device and --device-map both say"):
        run_one("evaluate", [*line(folder, tmp_path / "x", PERPLEXITY), "--device-map", "auto", "--device", "cpu"])


def test_accelerates_hooks_leave_the_attention_as_it_is():
    """What a model that is spread over devices has around every module."""
    from accelerate import dispatch_model

    config, ids = RefreshConfig(budget=6, stride=4, select_stride=2), random_ids(2, 40)
    plain, spread = (enable(tiny_model(dtype=torch.float64), config) for _ in range(2))
    places = {name: "cpu" for name, module in spread.named_modules() if name.count(".") == 2 and "layers" in name}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    dispatch_model(spread, places, force_hooks=True)
    assert hasattr(spread.model.layers[0].self_attn, "_hf_hook")
    expected, _ = decode_logits(plain, ids, 20, config)
    logits, cache = decode_logits(spread, ids, 20, config)
    assert torch.equal(logits, expected) and bool(cache.selecting_steps.any())
    with torch.no_grad():
        simulated = [model(ids, simulation=Simulation(20, config)).logits for model in (spread, plain)]
    assert torch.equal(*simulated)
