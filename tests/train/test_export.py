"""Export of real checkpoints of every ZeRO stage, what is refused, and the upload to a Hub on loopback."""

import hashlib
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers.dynamic_module_utils as dynamic_modules
import yaml
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import refreshkv
from refreshkv import RefreshCache, RefreshConfig, parity
from refreshkv.data.config import DataConfig
from refreshkv.evaluation.perplexity.report import build_report, protocol, write_report
from refreshkv.evaluation.perplexity.results import Evaluation, Result
from refreshkv.evaluation.strategies import build_strategies
from refreshkv.files import RECORD_FILE, write_record
from refreshkv.settings import SettingsError, load_settings
from refreshkv.train import export as export_module
from refreshkv.train import hub
from refreshkv.train.card import model_card
from refreshkv.train.config import ModelConfig, RunConfig, SimulationConfig
from refreshkv.train.export import export
from refreshkv.train.export_error import ExportError
from refreshkv.train.export_folder import is_export
from refreshkv.train.job import resolve
from refreshkv.train.manifest import write_manifest
from refreshkv.train.model import build_model
from refreshkv.train.run_folder import State
from tests.helpers import make_checkpoints
from tests.helpers.hub_server import HubServer
from tests.helpers.make_checkpoints import CASES, REFRESH, STEPS, VOCABULARY
from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOKEN = "hf_ThisIsTheSecretOfTheTest"
REPOSITORY = "someone/tiny"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of one run per case, each with a checkpoint that two ranks wrote."""
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(2, folder / "printed.txt", make_checkpoints.main, folder)
    return folder


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """An export that tests only read."""
    output = tmp_path_factory.mktemp("exported") / "model"
    export(runs / "zero2-fp32-tied", output, name=REPOSITORY)
    return output


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the run of the first case, to damage: its weights lie in one file."""
    return copy_run(runs / "zero0-fp32", tmp_path)


def copy_run(run, folder):
    return Path(shutil.copytree(run, folder / run.name))


def checkpoint_of(run, step=STEPS):
    return run / "checkpoints" / f"step-{step:07d}"


def expected_model(run):
    """The trained model with the weights that the ranks held at the end, not taken from any checkpoint file."""
    config = AutoConfig.from_pretrained(checkpoint_of(run) / "model")
    weights = torch.load(run / "expected.pt")
    model = AutoModelForCausalLM.from_config(config, dtype=weights["model.norm.weight"].dtype)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith("out")]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_export_is_the_trained_model(runs, tmp_path, case):
    stage, dtype, tied = CASES[case]
    result = export(runs / case, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = expected_model(runs / case)
    ids = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(7))

    assert model.dtype == DTYPES[dtype]
    assert torch.equal(model(ids).logits, expected(ids).logits)
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert result.parameters == sum(parameter.numel() for parameter in expected.parameters())
    assert result.step == STEPS and result.reload_difference == 0 and result.decode_difference < 1e-5
    assert leftovers(tmp_path) == ["out"] and not (tmp_path / "out" / ".exporting").exists()


def test_training_had_moved_the_weights(runs):
    config = load_settings(RunConfig, checkpoint_of(runs / "zero3-bf16") / "run.yaml")
    before = build_model(resolve(config, world=1, dry=True))
    after = torch.load(runs / "zero3-bf16" / "expected.pt")
    assert not any(torch.equal(value.bfloat16(), after[name]) for name, value in before.named_parameters())


def test_export_holds_all_that_transformers_needs(exported):
    model = refreshkv.enable(AutoModelForCausalLM.from_pretrained(exported))
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert RefreshConfig.from_dict(model.config.refreshkv) == REFRESH
    assert tokenizer.decode(tokenizer("a small cache").input_ids) == "a small cache"
    assert (exported / "generation_config.json").is_file()
    assert json.loads((exported / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_summary_names_parameters_files_and_differences(runs, tmp_path):
    text = str(export(checkpoint_of(runs / "zero1-bf16"), tmp_path / "out"))
    assert "34,720 parameters, bfloat16" in text and "model.safetensors" in text
    assert len(re.findall(r"largest logit difference \d\.\de[+-]\d\d", text)) == 2


def test_run_folder_means_its_newest_finished_checkpoint(run, tmp_path):
    newer = Path(shutil.copytree(checkpoint_of(run), checkpoint_of(run, 7)))
    state = json.loads((newer / "state.json").read_text())
    (newer / "state.json").write_text(json.dumps({**state, "step": 7}))
    write_manifest(newer)
    for name in ("step-0000009.partial", "step-0000008.damaged", "step-0000008.universal"):
        shutil.copytree(newer, newer.with_name(name))
    assert export(run, tmp_path / "out").step == 7
    for name in ("step-0000009.partial", "step-0000008.damaged"):
        with pytest.raises(ExportError, match="was not finished"):
            export(newer.with_name(name), tmp_path / "out2")
    assert leftovers(tmp_path) == ["out"]


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ExportError, match="there is no folder"):
        export(tmp_path / "missing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="neither a finished checkpoint nor a run"):
        export(tmp_path / "empty", tmp_path / "out")


def missing_shard(checkpoint):
    next(checkpoint.glob("*_1_*optim_states.pt")).unlink()


def truncated_shard(checkpoint):
    shard = next(checkpoint.glob("*_1_*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:1000])


def unreadable_state(checkpoint):
    (checkpoint / "state.json").write_text('{"step": 3')


def unknown_setting(checkpoint):
    (checkpoint / "run.yaml").write_text("training:\n  stepps: 3\n")


def no_model_config(checkpoint):
    (checkpoint / "model" / "config.json").unlink()


@pytest.mark.parametrize("case", ["zero2-fp32-tied", "zero3-bf16"])
@pytest.mark.parametrize("damage", [missing_shard, truncated_shard])
def test_damaged_shards_are_refused(runs, tmp_path, case, damage):
    run = copy_run(runs / case, tmp_path)
    damage(checkpoint_of(run))
    with pytest.raises(ExportError, match="step-0000003 is damaged or incomplete"):
        export(run, tmp_path / "out")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("damage", [unreadable_state, unknown_setting, no_model_config])
def test_damaged_descriptions_are_refused(run, tmp_path, damage):
    damage(checkpoint_of(run))
    with pytest.raises(ExportError, match="CHECKPOINT: .*step-0000003"):
        export(run, tmp_path / "out")
    assert leftovers(tmp_path) == []


def change_weights(run, change):
    file = checkpoint_of(run) / "mp_rank_00_model_states.pt"
    states = torch.load(file, weights_only=False)
    change(states["module"])
    torch.save(states, file)
    write_manifest(checkpoint_of(run))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda weights: weights.pop("model.norm.weight"), "missing keys model.norm.weight"),
        (lambda weights: weights.update(extra=torch.ones(2)), "unexpected keys extra"),
        (lambda weights: weights.update({"model.norm.weight": torch.ones(3)}), "mismatched keys .*model.norm.weight"),
        (lambda weights: weights["model.norm.weight"].fill_(float("nan")), "logits differ by nan"),
    ],
    ids=["missing", "unexpected", "shape", "nan"],
)
def test_weights_that_do_not_fit_are_refused(run, tmp_path, change, problem):
    change_weights(run, change)
    with pytest.raises(ExportError, match=problem):
        export(run, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_output_in_use_is_refused(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ExportError, match="is no export"):
            export(run, out, overwrite=overwrite)
    assert leftovers(tmp_path) == ["out"] and (out / "notes.txt").read_text() == "mine"


def test_only_an_earlier_export_is_overwritten(run, tmp_path):
    out = tmp_path / "out"
    export(run, out)
    with pytest.raises(ExportError, match="already holds an export.*--overwrite"):
        export(run, out)

    (out / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"also holds notes.txt"):
        export(run, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"

    (out / "notes.txt").unlink()
    (out / "model-00001-of-00002.safetensors").write_text("of a larger model")
    write_record(out)
    export(run, out, overwrite=True)
    assert leftovers(tmp_path) == ["out"] and not (out / "model-00001-of-00002.safetensors").exists()


def test_checkpoint_is_never_the_output(run):
    inside = checkpoint_of(run) / "model"
    for output in (inside, checkpoint_of(run), run):
        with pytest.raises(ExportError, match="lie in each other"):
            export(run, output, overwrite=True)
    assert (inside / "config.json").is_file()


def test_what_a_killed_export_left_is_cleared_away_but_nothing_else(run, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="holds other files"):
        export(run, tmp_path / "out")
    assert (partial / "notes.txt").exists()
    (partial / ".exporting").touch()
    export(run, tmp_path / "out")
    assert leftovers(tmp_path) == ["out"] and not (tmp_path / "out" / "notes.txt").exists()


def write_other_weights(monkeypatch):
    write = export_module._write

    def spoiled(model, *arguments):
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(1.1)
        write(model, *arguments)

    monkeypatch.setattr(export_module, "_write", spoiled)


def decode_with_another_selection(monkeypatch):
    def other(config, refresh, max_cache_len):
        changed = RefreshConfig(budget=refresh.budget, stride=refresh.stride)
        return RefreshCache(config=config, refresh=changed, max_cache_len=max_cache_len)

    monkeypatch.setattr(parity, "RefreshCache", other)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (write_other_weights, "the reloaded model is not the checkpoint's"),
        (decode_with_another_selection, "decoding does not equal the parallel form"),
    ],
)
def test_failed_check_leaves_nothing_new(run, tmp_path, monkeypatch, spoil, problem):
    spoil(monkeypatch)
    with pytest.raises(ExportError, match=problem):
        export(run, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_failed_check_keeps_the_earlier_export(run, tmp_path, monkeypatch):
    export(run, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    write_other_weights(monkeypatch)
    with pytest.raises(ExportError):
        export(run, tmp_path / "out", overwrite=True)
    assert is_export(tmp_path / "out") and (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert leftovers(tmp_path) == ["out"]


def make_report(folder):
    """A report as launch/evaluate.py writes it, with made-up figures."""
    results = [
        Result("full", None, None, [1.0, 1.1], 0.1, {}),
        Result("refresh S=4", REFRESH, 8, [1.2, 1.3], 0.1, {0: 4.0, 1: 4.0}),
    ]
    evaluation = Evaluation(results, rows=16, row_length=48, last_tokens=2, warnings=["only 16 rows"])
    measured = protocol("fingerprint", "test", 16, 48, 2, build_strategies(["full", "refresh:4"], REFRESH))
    report = build_report(evaluation, measured, "model", {}, "python launch/evaluate.py")
    folder.mkdir()
    write_report(folder, report)
    return folder


def front_matter(card):
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def test_card_tells_settings_data_and_evaluation(run, tmp_path):
    export(run, tmp_path / "out", report=make_report(tmp_path / "report"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["refreshkv", "kv-cache", "long-context"],
    }
    for line in (
        "| refresh S=4 | 8 | 4 | 3.490 |",
        "**Warning:** only 16 rows.",
        "Perplexity of the last 2 tokens of 16 rows of 48 tokens (test split)",
        "| observation_window | 2 |",
        "| pattern | whole |",
        "| steps | 3 of 10 |",
        "| source | python-stdlib |",
        "| rows trained on | 6 of 48 tokens |",
        "| tokens trained on | 288 |",
        "@inproceedings{xu2025refreshkv,",
    ):
        assert line in card
    assert str(tmp_path) not in card and str(run.parent) not in card


def test_missing_report_is_refused_before_any_work(run, tmp_path):
    with pytest.raises(SettingsError, match="no report.json"):
        export(run, tmp_path / "out", report=tmp_path)
    assert leftovers(tmp_path) == []


def test_card_names_a_base_on_the_hub_and_no_folder_of_this_machine(tmp_path, monkeypatch):
    state = State(step=2, tokens=64, world_size=1, zero_stage=1, rows="fingerprint")
    data = DataConfig(folder=str(tmp_path), path="json", data_files=["/home/someone/secret/a.jsonl", "b.jsonl"])
    paper = SimulationConfig(pattern="paper", stride=50)
    card = model_card(RunConfig(ModelConfig(path="org/Base-8B"), data=data, simulation=paper), state, "mine")
    assert front_matter(card)["base_model"] == "org/Base-8B" and "from org/Base-8B," in card
    assert "| source | json, a.jsonl, b.jsonl |" in card and "/home" not in card and "prompt_length" not in card

    monkeypatch.chdir(tmp_path)
    Path("org/Base-8B").mkdir(parents=True)
    for path in ("org/Base-8B", "./runs/base", "/home/someone/base"):
        card = model_card(RunConfig(ModelConfig(path=path)), state, "mine")
        assert "base_model" not in front_matter(card) and path not in card


def test_card_counts_prepared_rows_only_of_the_same_rows(tmp_path):
    splits = {"train": {"rows": 1234}, "test": {"rows": 5}}
    (tmp_path / "rows.json").write_text(json.dumps({"fingerprint": "this", "splits": splits}))
    config = RunConfig(data=DataConfig(folder=str(tmp_path)))
    same, other = (model_card(config, State(1, 8, 1, 2, rows=rows), "mine") for rows in ("this", "other"))
    assert "| rows prepared | 1,234 train, 5 test |" in same and "rows prepared" not in other


def test_usage_of_the_card_runs_as_printed(exported, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    card = (exported / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert f'name = "{REPOSITORY}"' in snippet and len(snippet.splitlines()) <= 12
    exec(snippet.replace(REPOSITORY, str(exported)), {})
    assert capsys.readouterr().out.startswith("The text to go on with")


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != RECORD_FILE)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def server(monkeypatch):
    """A Hub on loopback that this process's own client talks to."""
    with HubServer(TOKEN) as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield server


def launch(monkeypatch, capfd, *arguments):
    """`launch/export.py` in this process: its exit code, and what it wrote to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # as the script would, but only for this test
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "launch" / "export.py"), run_name="__main__")
    return ended.value.code, *capfd.readouterr()


def test_launch_exports_and_pushes(runs, tmp_path, server, monkeypatch, capfd):
    arguments = (runs / "zero3-bf16", tmp_path / "out", "--push-to-hub", REPOSITORY)
    code, printed, errors = launch(monkeypatch, capfd, *arguments)
    assert code == 0, errors
    assert server.repositories == {REPOSITORY: {"private": False, "files": contents(tmp_path / "out")}}
    weights = hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    assert f"PUT /storage/{weights}" in server.calls
    assert f"pushed to {server.url}/{REPOSITORY}" in printed and "34,720 parameters" in printed
    assert TOKEN not in printed + errors
    assert f'name = "{REPOSITORY}"' in (tmp_path / "out" / "README.md").read_text()


def test_launch_reports_a_refused_push_in_one_line(runs, tmp_path, server, monkeypatch, capfd):
    server.refuse_with = 403
    arguments = (runs / "zero3-bf16", tmp_path / "out", "--push-to-hub", REPOSITORY)
    code, printed, errors = launch(monkeypatch, capfd, *arguments)
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert code == 2 and errors.rstrip().endswith(line)
    assert REPOSITORY in line and "the Hub answered 403" in line
    assert "Traceback" not in errors and TOKEN not in printed + errors
    assert is_export(tmp_path / "out") and server.repositories == {}


def test_launch_refuses_private_without_a_repository(tmp_path, monkeypatch, capfd):
    code, _, errors = launch(monkeypatch, capfd, tmp_path, tmp_path / "out", "--private")
    assert code == 2 and "--private needs --push-to-hub" in errors


def test_second_push_replaces_weights_and_keeps_other_files(exported, server):
    files = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"old", "notes.txt": b"mine"}
    server.repositories[REPOSITORY] = {"private": False, "files": files}
    hub.push(exported, REPOSITORY)
    assert server.repositories[REPOSITORY]["files"] == {**contents(exported), "notes.txt": b"mine"}


def test_private_push_makes_a_private_repository(exported, server):
    hub.push(exported, REPOSITORY, private=True)
    assert server.repositories[REPOSITORY] == {"private": True, "files": contents(exported)}


def test_private_push_to_a_public_repository_uploads_nothing(exported, server):
    server.repositories[REPOSITORY] = {"private": False, "files": {}}
    with pytest.raises(hub.HubError, match="is public, so nothing was uploaded"):
        hub.push(exported, REPOSITORY, private=True)
    assert server.repositories[REPOSITORY]["files"] == {}


def test_wrong_token_is_reported_without_showing_it(exported, server):
    server.token = "hf_another"
    with pytest.raises(hub.HubError, match=f"{REPOSITORY}: the Hub answered 401") as caught:
        hub.push(exported, REPOSITORY)
    assert TOKEN not in str(caught.value)


def test_unreachable_hub_is_reported(exported, server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(hub.HubError, match=f"--push-to-hub {REPOSITORY}: ConnectError: "):
        hub.push(exported, REPOSITORY)


def test_token_in_an_error_is_hidden(exported, server, monkeypatch):
    def fail(self, **arguments):
        raise RuntimeError(f"bad header 'Bearer {TOKEN}'")

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    with pytest.raises(hub.HubError, match=r"Bearer \[token\]") as caught:
        hub.push(exported, REPOSITORY)
    assert TOKEN not in str(caught.value) and caught.value.__cause__ is None and caught.value.__suppress_context__


def test_push_that_must_fail_is_refused_before_any_work(server, monkeypatch):
    with pytest.raises(hub.HubError, match="--push-to-hub: .*not a/valid/name"):
        hub.validate_push("not a/valid/name")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(hub.HubError, match="there is no token"):
        hub.validate_push(REPOSITORY)
