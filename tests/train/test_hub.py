"""Uploads during training: they arrive, and when they do not, training goes on."""

import huggingface_hub.constants
import pytest
import yaml

from refreshkv.settings import SettingsError
from refreshkv.train.config import HubConfig
from refreshkv.train.hub import BackgroundPush, validate_push
from refreshkv.train.manifest import find_damage, write_manifest
from tests.helpers.hub_server import HubServer
from tests.helpers.jobs import make_rows, read_metrics, run_settings, write_config
from tests.helpers.ranks import run_ranks, run_script

TOKEN, REPOSITORY = "hf_secret", "someone/run"


@pytest.fixture
def server(monkeypatch):
    with HubServer(TOKEN) as server:
        use(server.url, monkeypatch.setattr)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def use(url, set_value=setattr):
    set_value(huggingface_hub.constants, "ENDPOINT", url)
    set_value(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    set_value(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def run_with_hub(url, arguments):
    use(url)
    run_script(arguments)


def a_run(folder):
    checkpoint = folder / "checkpoints" / "step-0000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    (folder / "run.yaml").write_text("training: {}")
    (folder / "metrics.jsonl").write_text('{"step": 3}\n')
    return checkpoint


def test_checkpoints_and_metrics_arrive(server, tmp_path):
    checkpoint, said = a_run(tmp_path), []
    push = BackgroundPush(HubConfig(REPOSITORY), tmp_path, said.append)
    push.metrics(3)
    push.checkpoint(checkpoint)
    push.checkpoint(tmp_path / "checkpoints" / "removed-meanwhile")
    push.close()
    assert said == [] and server.repositories[REPOSITORY]["private"]
    assert server.repositories[REPOSITORY]["files"] == {
        "run.yaml": b"training: {}",
        "metrics.jsonl": b'{"step": 3}\n',
        "checkpoints/step-0000003/state.json": b"{}",
    }


def test_paths_of_this_machine_stay_here(server, tmp_path):
    checkpoint = a_run(tmp_path)
    (checkpoint / "model").mkdir()
    (checkpoint / "model" / "tokenizer_config.json").write_text('{"name_or_path": "/home/alice/llama", "eos": "</s>"}')
    settings = {"model": {"path": "/home/alice/llama"}, "data": {"data_files": ["~/texts/a.txt"], "path": "org/texts"}}
    for folder in (tmp_path, checkpoint):
        (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    write_manifest(checkpoint)
    before = {file: file.read_bytes() for file in checkpoint.rglob("*") if file.is_file()}
    push = BackgroundPush(HubConfig(REPOSITORY), tmp_path, pytest.fail)
    push.metrics(3)
    push.checkpoint(checkpoint)
    push.close()
    files = server.repositories[REPOSITORY]["files"]
    assert not [name for name, content in files.items() if b"alice" in content or b"texts/a" in content]
    public = {"model": {"path": "llama"}, "data": {"data_files": ["a.txt"], "path": "org/texts"}}
    assert yaml.safe_load(files["run.yaml"]) == public
    assert {file: file.read_bytes() for file in before} == before
    downloaded = tmp_path / "downloaded"
    for name, content in files.items():
        (downloaded / name).parent.mkdir(parents=True, exist_ok=True)
        (downloaded / name).write_bytes(content)
    assert find_damage(downloaded / "checkpoints" / checkpoint.name) is None


def test_a_failing_push_is_told_once_and_without_the_token(server, tmp_path):
    checkpoint, said = a_run(tmp_path), []
    server.refuse_with = 403
    push = BackgroundPush(HubConfig(REPOSITORY), tmp_path, said.append)
    for _ in range(3):
        push.checkpoint(checkpoint)
    push.close()
    assert len(said) == 1 and "the Hub answered 403" in said[0] and "training goes on" in said[0]
    assert TOKEN not in said[0] and "\n" not in said[0]


@pytest.mark.parametrize("status", [None, 500])
def test_training_with_a_hub(server, tmp_path, status):
    rows, output = make_rows(tmp_path), tmp_path / "run"
    server.refuse_with = status
    training = {"steps": 4, "save_every": 2, "evaluate_every": 2, "evaluate_rows": 4, "evaluate_tokens": 8}
    settings = run_settings(rows, output, training=training, hub={"repo": REPOSITORY})
    arguments = ["--config", str(write_config(settings))]
    printed = run_ranks(1, tmp_path / "printed.txt", as_user, server.url, arguments)
    assert list(read_metrics(output)) == [1, 2, 3, 4] and "Traceback" not in printed
    warned = [line for line in printed.splitlines() if line.startswith("warning: hub.repo")]
    if status:
        assert len(warned) == 1, printed
    else:
        files = server.repositories[REPOSITORY]["files"]
        assert warned == [] and b"evaluation" in files["metrics.jsonl"]
        assert files["checkpoints/step-0000004/manifest.json"]


def as_user(url, arguments):
    import os

    os.environ["HF_TOKEN"] = TOKEN
    run_with_hub(url, arguments)


def test_a_push_that_cannot_work_is_refused_first(monkeypatch):
    with pytest.raises(SettingsError, match="hub.repo: .*not a/valid/name"):
        validate_push("not a/valid/name", "hub.repo")
