"""Models and tokenizers with Python code of their own, and revisions of a Hub repository."""

import os
import subprocess
import sys
from dataclasses import replace

import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
import torch
import transformers.dynamic_module_utils as dynamic_modules
import transformers.utils.hub

from refreshkv import RefreshConfig, SettingsError, enable
from refreshkv.data.config import DataConfig
from refreshkv.identity import fingerprint, folder_identity, tokenizer_identity
from refreshkv.loading import Origin, hub_commit, load_configuration, load_model, load_tokenizer
from refreshkv.parity import decoding_difference
from refreshkv.settings import settings_from_dict
from refreshkv.train.adapter import base_of
from refreshkv.train.adapter_config import AdapterConfig
from refreshkv.train.card import model_card
from refreshkv.train.config import ModelConfig, RunConfig
from refreshkv.train.job import resolve
from refreshkv.train.run_folder import State
from tests.helpers.hub_server import COMMIT, HubServer
from tests.helpers.jobs import ROOT, make_rows, run_job, run_settings
from tests.helpers.models import random_ids, tiny_model
from tests.helpers.own_code import write_model_with_code

TOKEN, REPOSITORY = "hf_ThisIsTheSecretOfTheTest", "someone/tiny"
TRUSTED = Origin(trust_remote_code=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model_with_code(tmp_path_factory.mktemp("own") / "model")


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """transformers copies a model's code to a folder of the user's, which the tests shall not write to."""

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    cache, path = str(tmp_path_factory.mktemp("modules")), list(sys.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_modules, "HF_MODULES_CACHE", cache)
        forget()
        yield
        forget()
    sys.path[:] = path


def test_own_code_runs_only_if_it_is_trusted(folder):
    for setting, option in (("--model", "--trust-remote-code"), ("model.path", "model.trust_remote_code=true")):
        for load in (load_configuration, load_model, load_tokenizer):
            with pytest.raises(SettingsError, match=f"^{setting}: .* is not run without {option}"):
                load(str(folder), setting)
    with pytest.raises(SettingsError, match="data.trust_remote_code=true"):
        load_tokenizer(folder, "data.tokenizer")
    model = load_model(str(folder), "--model", TRUSTED, dtype=torch.float64)
    assert type(model).__name__ == "OwnForCausalLM"
    assert type(load_tokenizer(folder, "--model", TRUSTED)).__name__ == "OwnTokenizer"
    enable(model, RefreshConfig(budget=6, stride=4))
    assert decoding_difference(model, random_ids(2, 40), 24, RefreshConfig(budget=6, stride=4))[0].max() < 1e-10


def test_own_code_is_part_of_the_identity(folder, tmp_path):
    other = write_model_with_code(tmp_path / "other", scale=3.0)
    models = [load_model(str(path), "--model", TRUSTED, dtype=torch.float32) for path in (folder, other)]
    assert torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)
    assert fingerprint(models[0]) != fingerprint(models[1])
    same = load_model(str(folder), "--model", TRUSTED, dtype=torch.float32)
    assert fingerprint(models[0]) == fingerprint(same)
    first, second = folder_identity(folder), folder_identity(other)
    assert first is not None and second is not None
    assert first["weights"] == second["weights"] and first["rest"] != second["rest"]
    (other / "tokenization_own.py").write_text((other / "tokenization_own.py").read_text() + "\n# changed\n")
    tokenizers = [load_tokenizer(path, "--model", TRUSTED) for path in (folder, other)]
    assert tokenizer_identity(tokenizers[0]) != tokenizer_identity(tokenizers[1])


def test_revisions_that_mean_nothing_are_refused(folder):
    with pytest.raises(SettingsError, match="^--revision=abc: .* has no revisions"):
        load_model(str(folder), "--model", Origin("abc"))
    with pytest.raises(SettingsError, match="^model.revision=abc: .* has no revisions"):
        resolve(settings_from_dict(RunConfig, {"model": {"path": str(folder), "revision": "abc"}}), 1, dry=True)
    with pytest.raises(SettingsError, match=r"^model\.revision means nothing with model\.scratch"):
        ModelConfig(scratch={"model_type": "llama"}, revision="abc")
    with pytest.raises(SettingsError, match=r"^data\.tokenizer_revision means nothing without data\.tokenizer"):
        DataConfig(train_vocabulary=300, tokenizer_revision="abc")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback with two states of one repository, and an empty cache."""
    for name, scale in (("main", 2.0), ("later", 5.0)):
        write_model_with_code(tmp_path / name, scale, seed=int(scale))
    with HubServer(TOKEN) as server:
        server.add(REPOSITORY, tmp_path / "main")
        server.add(REPOSITORY, tmp_path / "later", "later")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name, value in {
            "ENDPOINT": server.url, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        }.items():  # fmt: skip
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        # both libraries keep a client for the process, with the address that was in force when it was made
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        yield server


def test_a_revision_is_the_one_that_is_loaded(hub, tmp_path):
    commit = hub.add(REPOSITORY, tmp_path / "later", "later")
    for revision, name in ((None, "main"), ("later", "later"), (commit, "later")):
        origin = replace(TRUSTED, revision=revision)
        loaded = load_model(REPOSITORY, "--model", origin, dtype=torch.float32)
        expected = load_model(str(tmp_path / name), "--model", TRUSTED, dtype=torch.float32)
        assert hub_commit(REPOSITORY, origin) == (COMMIT if name == "main" else commit)
        assert fingerprint(loaded) == fingerprint(expected)
        assert type(load_tokenizer(REPOSITORY, "--model", origin)).__name__ == "OwnTokenizer"
        run = {"model": {"path": REPOSITORY, **origin.settings()}, "data": {"row_length": 64}}
        run = settings_from_dict(RunConfig, run)
        job = resolve(run, 1, dry=True)
        assert job.shape.parameters == loaded.num_parameters()
        run.training.adapter = AdapterConfig()
        assert base_of(run, job.model_config) == hub_commit(REPOSITORY, origin)
    # each question went to this Hub: another one would be waited for
    assert f"GET /api/models/{REPOSITORY}/tree/{commit}/additional_chat_templates" in hub.calls
    with pytest.raises(SettingsError, match="--model: no model could be loaded"):
        load_model(REPOSITORY, "--model", replace(TRUSTED, revision="never"))


def test_cards_name_the_revision_and_the_code():
    run = RunConfig(model=ModelConfig(path=REPOSITORY, revision="later", trust_remote_code=True))
    state = State(3, 300, 1, 2, "rows")
    card = model_card(run, state, "tiny")
    assert f"Trained, from {REPOSITORY} (revision later)," in card and "no code\nbut the model's own is run" in card
    card = model_card(run, state, "tiny", is_adapter=True)
    assert f'"{REPOSITORY}", dtype="auto", revision=\'later\', trust_remote_code=True)' in card


@pytest.mark.slow
def test_a_model_with_code_through_the_whole_road(tmp_path):
    """Prepare, train on 2 ranks, export, evaluate, sweep, generate, show: each with the model's own code."""
    folder = write_model_with_code(tmp_path / "base", texts=[f"word{i:02d}" for i in range(60)])
    make_rows(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")

    def refreshkv(*arguments, code=0):
        command = [sys.executable, "-m", "refreshkv", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    prepare = (
        "prepare", "data.folder=own", "data.path=json", f"data.data_files={tmp_path}/texts.jsonl",
        f"data.tokenizer={folder}", "data.train_vocabulary=null", "data.row_length=48", "refresh.budget=8",
    )  # fmt: skip
    assert "data.trust_remote_code=true" in refreshkv(*prepare, code=2)
    refreshkv(*prepare, "data.trust_remote_code=true")

    settings = run_settings(tmp_path / "own", tmp_path / "run", training={"steps": 3, "save_every": 3, "log_every": 1})
    settings["model"] = {"path": str(folder), "trust_remote_code": True}
    settings["data"] = {**settings["data"], "folder": str(tmp_path / "own")}
    code, printed = run_job(settings)
    assert code == 0, printed
    refreshkv("export", "run", "model")
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert names >= {"modeling_own.py", "configuration_own.py", "scale.py", "tokenization_own.py"}

    (tmp_path / "prompt.txt").write_text("word00 word01 word02 " * 4)
    trusted = ("--trust-remote-code",)
    data = ("--data", "own", "--split", "train", "--rows", 2, "--last-tokens", 8, "--budget", 8)
    assert "--trust-remote-code" in refreshkv("evaluate", "--model", "model", *data, code=2)
    refreshkv("evaluate", "--model", "model", *data, *trusted)
    refreshkv("sweep", "--model", "model", *data, *trusted, "--thresholds", "0.5")
    prompt = ("--prompt-file", "prompt.txt", "--max-new-tokens", 4)
    generated = refreshkv("generate", "--model", "model", *prompt, *trusted)
    assert "budget" in generated.lower() or "K" in generated
    refreshkv("show", "model", *prompt, *trusted)
    assert (tmp_path / "page.html").is_file()


def test_ordinary_models_are_named_as_before(tmp_path):
    """Finished work of earlier releases must be found again."""
    from refreshkv.identity import describe

    assert set(describe(tiny_model(dtype=torch.float32))) == {"class", "dtype", "config", "adapters", "weights"}
