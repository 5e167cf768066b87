"""Twenty-five kills at random moments: the same command, run again, continues exactly.

REFRESHKV_SEED chooses the moments; a failure prints it.
"""

import json
import os
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from refreshkv.data.rows import load_rows
from refreshkv.files import not_on_record
from refreshkv.prefix.backend_folder import FolderBackend
from refreshkv.train.checkpoint_reader import find_checkpoint, open_checkpoint
from refreshkv.train.config import ModelConfig
from refreshkv.train.export_folder import is_export
from refreshkv.train.run_folder import finished_checkpoints
from refreshkv.train.shape import model_configuration
from tests.helpers.jobs import ROOT, VOCABULARY, make_rows, read_metrics, run_settings
from tests.helpers.kills import Command

KILLS = {
    "prepare": 2,
    "prepare --overwrite": 2,
    "train on 1 rank, ZeRO 0": 3,
    "train on 2 ranks, ZeRO 0": 1,
    "train on 2 ranks, ZeRO 2": 4,
    "train --overwrite": 1,
    "export": 2,
    "export --overwrite": 2,
    "evaluate": 3,
    "experiment": 3,
    "prompt store": 2,
}
"""What is killed, and how often: 25 in all."""

SEED = int(os.environ.get("REFRESHKV_SEED", random.randrange(10**6)))
STEPS, SAVE_EVERY = 6, 2
VALUES = ("loss", "loss full", "loss partial", "grad norm")
SCRATCH = {**run_settings(Path("rows"), Path("run"))["model"]["scratch"], "max_position_embeddings": 2048}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with prepared rows and a tiny base model of their tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    rows = make_rows(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_configuration(ModelConfig(scratch=SCRATCH)))
    model.generation_config.eos_token_id = model.config.eos_token_id = 0
    model.save_pretrained(folder / "model")
    for file in (rows / "tokenizer").iterdir():
        shutil.copy(file, folder / "model")
    return folder


def write_settings(folder, values, name="settings"):
    """A YAML file beside `folder`."""
    path = folder.with_name(f"{folder.name}-{name}.yaml")
    path.write_text(yaml.safe_dump(values))
    return path


class Kind:
    """What is killed: the command, what must hold after a kill, and what it has made at the end."""

    def __init__(self, base: Path):
        self.base = base

    def command(self, folder: Path) -> Command:
        """The command, whose files lie below `folder`; makes what it starts from."""
        raise NotImplementedError

    def check(self, folder: Path) -> None:
        """Nothing half-written has the name of something whole."""

    def result(self, folder: Path) -> object:
        """What must be equal to that of a command that nothing interrupted."""
        raise NotImplementedError


class Preparation(Kind):
    def __init__(self, base, overwrite=False):
        super().__init__(base)
        self.overwrite = overwrite

    def command(self, folder):
        data = {"folder": str(folder / "rows"), "path": "json", "data_files": str(self.base / "texts.jsonl")}
        data |= {"train_vocabulary": VOCABULARY, "row_length": 40}
        if self.overwrite:
            shutil.copytree(self.base / "rows", folder / "rows")
        path = write_settings(folder, {"data": data, "refresh": {"budget": 8}})
        return Command(folder, "prepare", "--config", path, *(["--overwrite"] if self.overwrite else []))

    def check(self, folder):
        if (folder / "rows").exists():
            self.result(folder)
            assert not_on_record(folder / "rows", leave_out=[".preparing"]) is None

    def result(self, folder):
        rows = load_rows(folder / "rows")
        splits = {split: getattr(rows, split).with_format(None)[:] for split in ("train", "validation", "test")}
        if rows.info["data"]["row_length"] != 40:
            assert self.overwrite and len(rows.train) == len(load_rows(self.base / "rows").train)
        return rows.info["fingerprint"], rows.info["splits"], splits


class Training(Kind):
    def __init__(self, base, ranks, stage, overwrite=False):
        super().__init__(base)
        self.ranks, self.stage, self.overwrite = ranks, stage, overwrite

    def command(self, folder):
        deepspeed = str(ROOT / "configs" / "deepspeed" / f"zero{self.stage}.json")
        training = {"steps": STEPS, "save_every": SAVE_EVERY, "deepspeed": deepspeed, "global_batch": 4, "timeout": 60}
        settings = run_settings(self.base / "rows", folder / "run", training=training)
        settings["model"] = {"path": str(self.base / "model")}
        if self.overwrite:
            self.earlier_run(folder, settings)
        arguments = ["--config", write_settings(folder, settings), "--overwrite" if self.overwrite else "--resume"]
        return Command(folder, "train", *arguments, ranks=self.ranks)

    def earlier_run(self, folder, settings):
        """A finished run with another seed, to be replaced."""
        settings = {**settings, "training": {**settings["training"], "seed": 7}}
        Command(folder, "train", "--config", write_settings(folder, settings, "earlier")).finish()

    def check(self, folder):
        saved = finished_checkpoints(folder / "run")
        for checkpoint in saved:
            open_checkpoint(checkpoint)
        if saved:
            find_checkpoint(folder / "run")
        metrics = folder / "run" / "metrics.jsonl"
        last = max(read_metrics(folder / "run"), default=0) if metrics.exists() else 0
        assert last < 2 * SAVE_EVERY or saved or self.overwrite, "a finished checkpoint is lost"

    def result(self, folder):
        steps = {step: [line.get(name) for name in VALUES] for step, line in read_metrics(folder / "run").items()}
        checkpoint = find_checkpoint(folder / "run").folder
        files = sorted(checkpoint.glob("*.pt"))
        return steps, {file.name: plain(torch.load(file, weights_only=False)) for file in files}


def plain(value):
    """Nested values with tensors as lists, to be compared."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items() if key not in ("ds_config", "ds_version")}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, int | float | str | bool | type(None)) else str(type(value))


class Export(Kind):
    def __init__(self, base, overwrite=False):
        super().__init__(base)
        self.overwrite = overwrite

    def command(self, folder):
        run = self.base / "run-to-export"
        if not run.exists():
            training = {"steps": 4, "save_every": 2, "deepspeed": "zero2", "global_batch": 4}
            settings = run_settings(self.base / "rows", run, training=training)
            settings["model"] = {"path": str(self.base / "model")}
            Command(run, "train", "--config", write_settings(run, settings)).finish()
        arguments = [finished_checkpoints(run)[-1], folder / "model"]
        if self.overwrite:
            Command(folder, "export", finished_checkpoints(run)[0], folder / "model").finish()
            arguments.append("--overwrite")
        return Command(folder, "export", *arguments)

    def check(self, folder):
        if (folder / "model").exists():
            assert is_export(folder / "model")
            assert not_on_record(folder / "model", leave_out=[".exporting"]) is None
            load_file(folder / "model" / "model.safetensors")

    def result(self, folder):
        return {name: tensor.tolist() for name, tensor in load_file(folder / "model" / "model.safetensors").items()}


class Evaluation(Kind):
    def command(self, folder):
        arguments = ["--model", self.base / "model", "--data", self.base / "rows", "--rows", 4, "--last-tokens", 12]
        arguments += ["--split", "validation"]
        arguments += ["--strategies", "full,refresh:3,snapkv", "--budget", 8, "--output", folder / "report"]
        return Command(folder, "evaluate", *arguments, "--resume")

    def result(self, folder):
        evaluation = json.loads((folder / "report" / "report.json").read_text())["evaluation"]
        return without_times(evaluation)


def without_times(value):
    """The values of a report but for those that are measured anew each time."""
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if not name.endswith(("seconds", "memory"))}
    return [without_times(item) for item in value] if isinstance(value, list) else value


class Experiment(Kind):
    def command(self, folder):
        rows = {"folder": str(folder / "rows"), "path": "json", "data_files": str(self.base / "texts.jsonl")}
        data = {**rows, "tokenizer": str(self.base / "model"), "row_length": 48}
        training = {"steps": 2, "save_every": 1, "global_batch": 4, "micro_batch": 2}
        study = {
            "settings": {"data": data, "refresh": {"budget": 8, "stride": 5}},
            "base": {"model": {"path": str(self.base / "model")}},
            "continued": {"training": training},
            "arms": ["none", "whole"],
            "perplexity": {"last_tokens": 12, "rows": 2, "strides": [5], "split": "validation"},
        }
        values = {
            "output": str(folder / "runs"),
            "results": str(folder / "results"),
            "selections": {"paper": {}},
            "settings": {"training": {"deepspeed": "zero0", "dtype": "fp32"}},
            "arms": {
                "none": {"selections": ["paper"]},
                "whole": {"selections": ["paper"], "settings": {"simulation": {"pattern": "whole", "stride": [5]}}},
            },
            "studies": {"small": study},
        }
        return Command(folder, "experiment", "--config", write_settings(folder, values))

    def check(self, folder):
        results = folder / "results" / "results.json"
        for entry in json.loads(results.read_text()).values() if results.exists() else ():
            assert entry["results"]

    def result(self, folder):
        entries = json.loads((folder / "results" / "results.json").read_text())
        assert sorted(entries) == ["small/none/paper/perplexity", "small/whole/0/paper/perplexity"]
        assert (folder / "results" / "tables.md").is_file()
        return {name: (entry["rows"], entry["results"], entry["base model"]) for name, entry in entries.items()}


class PromptStore(Kind):
    def command(self, folder):
        arguments = ["--model", self.base / "model", "--tasks", "chain_of_key", "--task-length", 1200, "--examples", 2]
        arguments += ["--strategies", "full,refresh:4", "--budget", 40, "--output", folder / "report", "--resume"]
        arguments += ["--prefix-store", folder / "store", "tasks.chain_of_key.keys=2"]
        return Command(folder, "evaluate", *arguments, "tasks.chain_of_key.max_new_tokens=40")

    def check(self, folder):
        """Every entry that the store would serve is whole, to its last byte."""
        if not (folder / "store" / "store.json").exists():
            return
        identity = json.loads((folder / "store" / "store.json").read_text())
        identity.pop("layout")
        backend = FolderBackend(folder / "store", identity, "store")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for entry in backend.entries().values():
                names = [name for name in load_file(backend._file(entry.name)) if name.startswith(("key", "value"))]
                assert set(map(len, backend.read(entry, len(entry.ids), names).values())) == {len(entry.ids)}

    def result(self, folder):
        assert not list((folder / "store").glob("*.partial"))
        lines = [json.loads(line) for line in (folder / "report" / "examples.jsonl").read_text().splitlines()]
        return sorted((line["decoding"], line["index"], line["prediction"]) for line in lines)


KINDS = {
    "prepare": Preparation,
    "prepare --overwrite": lambda base: Preparation(base, overwrite=True),
    "train on 1 rank, ZeRO 0": lambda base: Training(base, 1, 0),
    "train on 2 ranks, ZeRO 0": lambda base: Training(base, 2, 0),
    "train on 2 ranks, ZeRO 2": lambda base: Training(base, 2, 2),
    "train --overwrite": lambda base: Training(base, 1, 0, overwrite=True),
    "export": Export,
    "export --overwrite": lambda base: Export(base, overwrite=True),
    "evaluate": Evaluation,
    "experiment": Experiment,
    "prompt store": PromptStore,
}


def is_done(kind, folder, printed):
    """Whether the command had ended its work before it was killed, and says so."""
    return any(words in printed for words in ("already holds", "is fetched already")) and kind.result(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_a_killed_command_is_run_again(base, tmp_path, name):
    """Equal losses, weights, files and figures; no finished thing lost, nothing half-written taken for whole."""
    kind, draw = KINDS[name](base), random.Random(f"{SEED} {name}")
    (tmp_path / "straight").mkdir()
    events = kind.command(tmp_path / "straight").finish()
    expected, kills = kind.result(tmp_path / "straight"), 0
    for number in range(4 * KILLS[name]):
        folder = tmp_path / f"killed-{number}"
        folder.mkdir()
        command = kind.command(folder)
        print(f"REFRESHKV_SEED={SEED}, {name}, kill {kills + 1}, folder {folder}")
        kills += command.kill(events, draw)
        kind.check(folder)
        codes, _, printed = command.run()
        assert set(codes) == {0} or is_done(kind, folder, printed), f"REFRESHKV_SEED={SEED}\n{printed}"
        assert kind.result(folder) == expected, f"REFRESHKV_SEED={SEED}"
        kind.check(folder)
        if kills == KILLS[name]:
            return
    raise AssertionError(f"{name} ended before most kills; REFRESHKV_SEED={SEED}")


def test_there_are_twenty_five_kills():
    assert sum(KILLS.values()) == 25 and set(KILLS) == set(KINDS)
