"""The small world in which bad inputs are tried: texts, sequences, a run, its export, reports and an experiment.

Our own commands make it, so that each of them is known to work on the good inputs that the table makes bad.
"""

import json
from pathlib import Path

import yaml

from tests.helpers import jobs
from tests.helpers.forked import CommandServer

ROOT = Path(__file__).resolve().parents[2]
ROW_LENGTH, POSITIONS = 48, 512
SCRATCH = {**jobs.SCRATCH, "max_position_embeddings": POSITIONS}
DATA = {
    "folder": "rows",
    "path": "json",
    "data_files": "texts.jsonl",
    "train_vocabulary": jobs.VOCABULARY,
    "row_length": ROW_LENGTH,
}
TRAINING = {
    "output": "run",
    "deepspeed": "zero0",
    "dtype": "fp32",
    "steps": 2,
    "global_batch": 4,
    "micro_batch": 2,
    "warmup_steps": 1,
    "save_every": 1,
}
RUN = {
    "model": {"scratch": SCRATCH},
    "data": DATA,
    "refresh": {"budget": 8, "stride": 5},
    "simulation": {"prompt_length": [8, 30], "stride": [2, 5]},
    "training": TRAINING,
}
EXPERIMENT = {
    "output": "jobs",
    "results": "results",
    "selections": {"paper": {}},
    "settings": {"training": {"deepspeed": "zero0", "dtype": "fp32"}},
    "arms": {"none": {"selections": ["paper"]}, "whole": {"selections": ["paper"], "settings": {}}},
    "studies": {
        "small": {
            "settings": {"data": DATA, "refresh": {"budget": 8, "stride": 5}},
            "base": {"model": {"path": "model"}},
            "continued": {"training": {"steps": 2, "global_batch": 4, "micro_batch": 2}},
            "arms": ["none", "whole"],
            "perplexity": {"last_tokens": 12, "rows": 4, "strides": [5]},
        }
    },
}
SUITE = {
    "title": "a table",
    "about": "what a small cache costs",
    "reading": "ours",
    "paper": {"source": "none", "numbers": {"m": {"full": {"loss": 1.0}}}},
    "corpora": {
        "words": {"data": "rows", "prepare": "refreshkv prepare", "row_length": 48, "rows": 2, "last_tokens": 8}
    },
    "rows": {"full": {"strategy": "full"}, "ours": {"strategy": "refresh"}},
    "columns": {"loss": {"of": "words", "value": "perplexity"}},
}
COMMANDS = {
    "prepare": "prepare --config run.yaml",
    "train": "train --config run.yaml",
    "export": "export run model",
    "evaluate": "evaluate --model model --data rows --rows 2 --last-tokens 8 --output report",
    "tasks": "evaluate --model model --tasks niah_single_1 --task-length 500 --examples 1 --output scores "
    "--strategies full,refresh",
    "suite": "evaluate --suite suite.yaml --model model --output table",
    "sweep": "sweep --model model --data rows --rows 2 --last-tokens 8 --split test --thresholds 0.5,0.9 "
    "--output sweep",
    "generate": "generate --model model --prompt-file prompt.txt --max-new-tokens 4 --prefix-store store",
    "experiment": "experiment --config experiment.yaml --dry-run",
    "models": "models",
    "doctor": "doctor",
}
"""Commands that succeed, in the order in which they make the world."""


def make_world(server: CommandServer, folder: Path) -> None:
    """Fills `folder`. Fails the test if one of the commands does."""
    write_inputs(folder)
    for command in COMMANDS.values():
        done = server.run(command.split(), folder, seconds=200)
        assert done.code == 0, f"refreshkv {command}: {done.code}\n{done.out}\n{done.err}"


def write_inputs(folder: Path) -> None:
    """Makes `folder` with the files that the commands begin with."""
    folder.mkdir()
    words = [f"word{i:02d}" for i in range(60)]
    texts = [" ".join(words[(i * i + 7 * j + i) % 60] for j in range(200)) for i in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "prompt.txt").write_text(texts[0][:100])
    for name, values in (("run", RUN), ("experiment", EXPERIMENT), ("suite", SUITE)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
