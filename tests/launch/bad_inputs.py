"""A table of bad inputs, one a line, over all commands. `tests/launch/test_bad_inputs.py` walks it.

Each line starts from the world of `tests/launch/world.py`, in a copy of its own. FILES says what is changed there
first, WORDS what the one line of the error must contain: the setting or the file, and the way out.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Change = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """One bad input."""

    name: str
    command: str
    """What follows `refreshkv`, words separated by spaces."""
    words: tuple[str, ...]
    """Each stands in the last line on standard error (with `code=0`: in what is printed); a|b is one of the two."""
    files: dict[str, str | bytes | Change] = field(default_factory=dict)
    """Path -> its new content, or what is done with it."""
    code: int = 2
    """Exit code."""
    stdin: str | None = None
    """File that standard input reads."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of `CommandServer.run`: environment, stdout, file_bytes, read_only, mounted_bytes."""
    is_sample: bool = False
    """Whether the fast tests have it."""


# ---- what is done with files


def gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def folder(path: Path) -> None:
    if path.exists():
        gone(path)
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link(target: str) -> Change:
    def change(path: Path) -> None:
        if path.exists():
            gone(path)
        path.symlink_to(target)

    return change


def loop(path: Path) -> None:
    link(path.name)(path)


def big(size: int, character: bytes = b"a") -> Change:
    """A line of `size` bytes, of which only the first 20 MB take room on the disk."""

    def change(path: Path) -> None:
        with path.open("wb") as file:
            file.write(character * min(size, 20 << 20))
            file.truncate(size)

    return change


def cut(size: int) -> Change:
    """Keeps the first bytes."""
    return lambda path: os.truncate(path, size)


def edited(**values: Any) -> Change:
    """Sets values of a JSON or YAML file; `a__b` is b in the section a, and `gone` removes a key."""

    def change(path: Path) -> None:
        is_json = path.suffix == ".json"
        content = json.loads(path.read_text()) if is_json else yaml.safe_load(path.read_text())
        for name, value in values.items():
            *sections, key = name.split("__")
            target = content
            for section in sections:
                target = target[section]
            if value is gone:
                del target[key]
            else:
                target[key] = value
        path.write_text(json.dumps(content) if is_json else yaml.safe_dump(content, sort_keys=False))

    return change


def weights(change_tensors: Callable[[dict[str, Any]], None]) -> Change:
    """Changes the tensors of a safetensors file."""

    def change(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        change_tensors(tensors)
        save_file(tensors, path, {"format": "pt"})

    return change


@weights
def nan_weights(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"].fill_(float("nan"))


@weights
def missing_weights(tensors: dict[str, Any]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


@weights
def other_shape(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:7].clone()


def large_ids(path: Path) -> None:
    """Prepared sequences with a token that the model does not have, while rows.json says otherwise."""
    import pyarrow as pa

    with pa.OSFile(str(path), "rb") as file:
        table = pa.ipc.open_stream(file).read_all()
    ids = table["input_ids"].combine_chunks()
    values = pa.array([1_000_000, *ids.values.to_pylist()[1:]], pa.int32())
    column = pa.FixedSizeListArray.from_arrays(values, ids.type.list_size)
    changed = table.set_column(0, table.schema.field(0), column)
    with pa.ipc.new_stream(str(path), changed.schema) as stream:
        stream.write_table(changed)


def checkpoint(path: Path) -> None:
    """The files that tell a checkpoint of training from a model."""
    path.mkdir()
    for name in ("manifest.json", "state.json"):
        (path / name).write_text("{}")


def broken_ids(path: Path) -> None:
    """A tokenizer that gives tokens which the model does not have."""
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: number + 5000 for token, number in vocabulary.items()}
    content["added_tokens"] = [{**token, "id": token["id"] + 5000} for token in content["added_tokens"]]
    path.write_text(json.dumps(content))


# ---- the commands, on good inputs

GENERATE = "generate --model model --prompt-file prompt.txt --max-new-tokens 4"
SHOW = "show model --prompt-file prompt.txt --max-new-tokens 4"
STDIN = "generate --model model --prompt-file - --max-new-tokens 4"
EVALUATE = "evaluate --model model --data rows --rows 2 --last-tokens 8 --output new"
TASKS = "evaluate --model model --tasks niah_single_1 --task-length 500 --examples 1 --output new --strategies full"
SUITE = "evaluate --suite suite.yaml --model model --output new"
SWEEP = "sweep --model model --data rows --rows 2 --last-tokens 8 --split test --thresholds 0.5 --output new"
PREPARE = "prepare --config run.yaml data.folder=new"
TRAIN = "train --config run.yaml training.output=new"
DRY = "train --config run.yaml --dry-run"
RESUME = "train --config run.yaml --resume training.steps=2"
EXPORT = "export run new"
EXPERIMENT = "experiment --config experiment.yaml --dry-run"
FETCH = "fetch smollm2-135m --output"
LATIN = "ein Ger\xfccht \xfcber B\xe4ume".encode("latin-1")
CHECKPOINT = "run/checkpoints/step-0000002"


def cases() -> list[Case]:
    """The whole table."""
    found = [
        *_prompts(),
        *_texts_of_settings(),
        *_outputs(),
        *_disks(),
        *_streams(),
        *_numbers(),
        *_models(),
        *_sequences(),
        *_training(),
        *_earlier_work(),
        *_experiments(),
        *_commands(),
        *_pages(),
        *_placing(),
        *_chats(),
        *_harness(),
        *_special_files(),
    ]
    assert len({case.name for case in found}) == len(found)
    return found


def _pages() -> Iterator[Case]:
    """What `show` is given."""
    there = {"page.html": "mine"}
    yield Case("show: the file is there", SHOW, ("--output page.html", "--overwrite"), there, is_sample=True)
    yield Case("show: a folder in place of the file", f"{SHOW} --output rows", ("--output rows", "name a file"))
    yield Case("show: no such folder", f"{SHOW} --output new/page.html", ("--output", "new", "make it first"))
    yield Case("show: no model", SHOW.replace("show model", "show nowhere"), ("MODEL", "nowhere"))
    yield Case("show: no tokens", f"{SHOW} --max-new-tokens 0", ("--max-new-tokens",))
    yield Case("show: unknown setting", f"{SHOW} refresh.strides=2", ("strides",))


def _placing() -> Iterator[Case]:
    """Several processes, and models over several GPUs."""
    one_of_two = {"environment": {"RANK": "0", "WORLD_SIZE": "2"}}
    yield Case("evaluate: no address of the others", EVALUATE, ("MASTER_ADDR", "torchrun"), settings=one_of_two)
    both = f"{EVALUATE} --device cpu --device-map auto"
    yield Case("evaluate: a device and a device map", both, ("--device ", "--device-map"))


CHAT = "chat model --max-new-tokens 4"


def _chats() -> Iterator[Case]:
    """What a user types, and the template that a tokenizer brings along."""
    template = "model/chat_template.jinja"
    good: dict[str, Any] = {template: "{% for m in messages %}{{ m.content }} {% endfor %}", "in": "word01 word02\n"}
    yield Case("chat: no template", CHAT, ("chat template",), {"in": "a\n"}, stdin="in")
    for what, content in {
        "is broken": "{% for",
        "refuses": "{{ raise_exception('no users') }}",
        "names nothing": "{{ nothing.there }}",
        "counts too far": "{% for i in range(1000000000) %}x{% endfor %}",
        "writes nothing": "{# nothing #}",
        "is a pipe": pipe,
    }.items():
        words = ("MODEL", "template")
        yield Case(f"chat: the template {what}", CHAT, words, {**good, template: content}, stdin="in")
    for locale in ("C", "C.UTF-8"):
        files, settings = {**good, "in": LATIN + b"\n"}, {"environment": {"LC_ALL": locale}}
        words = ("standard input", "UTF-8")
        yield Case(f"chat: not UTF-8, LC_ALL={locale}", CHAT, words, files, stdin="in", settings=settings)
    yield Case("chat: --system not UTF-8", f"{CHAT} --system \udcfcber", ("--system", "UTF-8"), good, stdin="in")
    yield Case("chat: --context 0", f"{CHAT} --context 0", ("--context",), good, stdin="in")
    yield Case("chat: a long context", f"{CHAT} --context 100000", ("--context", "512"), good, stdin="in")
    chat = f"{TASKS} tasks.niah_single_1.chat=true"
    for what, content in {"is broken": "{% for", "writes nothing": "{# #}", "leaves out the prompt": "hello"}.items():
        yield Case(f"evaluate: the chat template {what}", chat, ("niah_single_1.chat", "template"), {template: content})


def _harness() -> Iterator[Case]:
    """The lm-evaluation-harness' own command line, and its arguments for our model."""
    task = {
        "task": "t",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "task.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
    }
    line = {"text": "word01 word02 word03 word04", "choices": [" word01", " word02"], "label": 0}
    files = {"own": folder, "own/t.yaml": yaml.safe_dump(task), "task.jsonl": json.dumps(line) + "\n"}
    command = "lm-eval --model refreshkv --tasks t --include_path own --device cpu --model_args "
    lm_eval = f"{command}pretrained=model"
    tensors = "model/model.safetensors"
    yield Case("lm-eval: no such task", lm_eval.replace("--tasks t", "--tasks u"), ("lm_eval", "u"), files)
    yield Case("lm-eval: no model is named", f"{command}strategy=full", ("--model_args", "pretrained"), files)
    yield Case("lm-eval: no such model", f"{command}pretrained=nowhere", ("pretrained", "nowhere"), files)
    yield Case("lm-eval: an unknown argument", f"{lm_eval},nonesuch=3", ("--model_args", "nonesuch"), files)
    yield Case("lm-eval: missing weights", lm_eval, ("pretrained", "up_proj"), {**files, tensors: missing_weights})
    yield Case("lm-eval: NaN weights", lm_eval, ("pretrained", "norm"), {**files, tensors: nan_weights})


def _special_files() -> Iterator[Case]:
    """Named pipes in the place of files of earlier work, and look-ahead queries that are none."""
    for name in ("state.json", "run.yaml", "manifest.json", "mp_rank_00_model_states.pt", "model/config.json"):
        words = ("CHECKPOINT", name.rpartition("/")[2], "pipe", "step-0000001")
        yield Case(f"export: {name} of a checkpoint is a pipe", EXPORT, words, {f"{CHECKPOINT}/{name}": pipe})
    taken = {"out": folder, "out/config.json": pipe}
    yield Case("export: the folder's config.json is a pipe", "export run out --overwrite", ("OUT",), taken)
    for name, content in {"run.json": pipe, ".training": pipe, "metrics.jsonl": pipe}.items():
        more = f"{RESUME} training.save_every=1"
        yield Case(f"resume: {name} of a run is a pipe", more, (name, "pipe"), {f"run/{name}": content})
    report = {"report/report.json": pipe, "report/rows.jsonl": pipe}
    yield Case("evaluate: the report is a pipe", EVALUATE.replace("new", "report --overwrite"), ("--output",), report)
    page = f"{SHOW} --output page.html --overwrite"
    yield Case("show: the page is a pipe", page, ("--output", "page.html", "pipe"), {"page.html": pipe})
    announced = edited(refreshkv_look_ahead={"queries": 2, "rank": 4})
    for what, content in {"missing": None, "text": "x" * 100, "a folder": folder, "a pipe": pipe}.items():
        files = {"model/config.json": announced}
        files |= {} if content is None else {"model/look_ahead.safetensors": content}
        yield Case(f"generate: look-ahead queries are {what}", GENERATE, ("look_ahead.safetensors",), files)


def _prompts() -> Iterator[Case]:
    """The text to continue."""
    prompt = "--prompt-file"
    yield Case("prompt not UTF-8", GENERATE, (prompt, "prompt.txt", "UTF-8"), {"prompt.txt": LATIN}, is_sample=True)
    for locale in ("C", "C.UTF-8", "POSIX"):
        yield Case(
            f"standard input not UTF-8, LC_ALL={locale}",
            STDIN,
            (prompt, "standard input", "UTF-8"),
            {"in": LATIN},
            stdin="in",
            settings={"environment": {"LC_ALL": locale}},
        )
    yield Case("standard input UTF-16", STDIN, (prompt, "UTF-8"), {"in": "a few words".encode("utf-16")}, stdin="in")
    yield Case("standard input is empty", STDIN, (prompt, "empty"))
    yield Case("prompt missing", GENERATE, (prompt, "no file"), {"prompt.txt": gone})
    yield Case("prompt empty", GENERATE, (prompt, "empty"), {"prompt.txt": ""})
    yield Case("prompt of spaces", GENERATE, (prompt, "empty"), {"prompt.txt": " \n\t \n"})
    yield Case("prompt is a folder", GENERATE, (prompt, "folder"), {"prompt.txt": folder})
    yield Case("prompt is a pipe without a writer", GENERATE, (prompt, "pipe"), {"prompt.txt": pipe})
    yield Case("prompt is a loop of links", GENERATE, (prompt, "prompt.txt"), {"prompt.txt": loop}, is_sample=True)
    yield Case("prompt is a dangling link", GENERATE, (prompt, "prompt.txt"), {"prompt.txt": link("nowhere")})
    yield Case("prompt below a file", GENERATE.replace("prompt.txt", "run.yaml/p"), (prompt, "run.yaml/p"))
    yield Case("prompt is a device", GENERATE.replace("prompt.txt", "/dev/zero"), (prompt, "/dev/zero"))
    yield Case("prompt's name is too long", GENERATE.replace("prompt.txt", "p" * 300), (prompt, "p" * 300))
    yield Case("prompt is one line of 300 MB", GENERATE, (prompt, "MB"), {"prompt.txt": big(300 << 20)})
    yield Case("standard input is a line of 300 MB", STDIN, (prompt, "MB"), {"in": big(300 << 20)}, stdin="in")
    yield Case("prompt is one line of 20 MB", GENERATE, ("max_position_embeddings",), {"prompt.txt": big(20 << 20)})
    yield Case("prompt is 20 MB of spaces", GENERATE, ("empty",), {"prompt.txt": big(20 << 20, b" ")})
    yield Case("prompt too long for the model", GENERATE, ("512",), {"prompt.txt": "word " * 2000})
    yield Case("prompt of null bytes", GENERATE, ("tokens",), {"prompt.txt": b"\0" * 20}, code=0)


def _texts_of_settings() -> Iterator[Case]:
    """YAML and JSON files."""
    per_command = {
        "prepare": (PREPARE, "run.yaml", "--config"),
        "train": (TRAIN, "run.yaml", "--config"),
        "experiment": (EXPERIMENT, "experiment.yaml", "--config"),
        "suite": (SUITE, "suite.yaml", "--suite"),
        "fetch": ("fetch source.yaml --output new", "source.yaml", "NAME"),
    }
    bad: dict[str, tuple[Any, str]] = {
        "not UTF-8": (b"title: " + LATIN, "UTF-8"),
        "not YAML": ("a: [1, 2", "YAML"),
        "a list": ("- 1\n- 2\n", "sections"),
        "recursive": ("a: &a\n  b: *a\n", "itself"),
        "with a key twice": ("training: {steps: 1}\ntraining: {steps: 2}\n", "twice"),
        "with a key twice inside": ("training:\n  steps: 1\n  steps: 2\n", "twice"),
        "with a foreign tag": ("a: !!python/object/apply:os.system ['true']\n", "YAML"),
        "nested 10,000 deep": ("a: " + "[" * 10_000, "YAML"),
        "of aliases of aliases": (_aliases(), "aliases"),
        "two documents": ("a: 1\n---\nb: 2\n", "YAML"),
        "a pipe without a writer": (pipe, "pipe"),
        "a folder": (folder, "folder"),
        "a loop of links": (loop, "links"),
        "of 100 MB": (big(100 << 20), "MB"),
        "a list as a key": ("? [1, 2]\n: 3\n", "YAML"),
        "with a date as a key": ("2020-01-01: 3\n", "2020-01-01"),
    }
    for name, (command, file, setting) in per_command.items():
        for what, (content, word) in bad.items():
            is_all = name == "train" or what in ("not UTF-8", "recursive", "with a key twice", "a folder")
            is_sample = name == "train" and what in ("recursive", "with a key twice")
            if is_all or what == "a pipe without a writer":
                words = (word,) if "date" in what else (setting, word)
                yield Case(f"{name}: {file} is {what}", command, words, {file: content}, is_sample=is_sample)
    for name, word in {"experiment": "missing", "suite": "missing", "fetch": "section"}.items():
        command, file, _ = per_command[name]
        yield Case(f"{name}: {file} is empty", command, (word,), {file: ""})
    for what, content in {
        "empty": "",
        "not UTF-8": LATIN,
        "not JSON": "{",
        "a list": "[]",
        "nested": "[" * 100_000,
        "a folder": folder,
        "a pipe": pipe,
    }.items():
        command = f"{DRY} training.deepspeed=ds.json"
        yield Case(
            f"train: DeepSpeed's JSON is {what}", command, ("training.deepspeed", "ds.json"), {"ds.json": content}
        )
    for what, content in {
        "zero_optimization is a number": {"zero_optimization": 3},
        "the stage is text": {"zero_optimization": {"stage": "two"}},
        "the stage is 7": {"zero_optimization": {"stage": 7}},
        "offload is text": {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
    }.items():
        files = {"ds.json": json.dumps(content)}
        words = ("training.deepspeed", "zero_optimization")
        yield Case(f"train: DeepSpeed's {what}", f"{TRAIN} training.deepspeed=ds.json", words, files)
    yield Case(
        "evaluate: template not UTF-8",
        f"{TASKS} tasks.niah_single_1.template_file=t.yaml",
        ("t.yaml", "UTF-8"),
        {"t.yaml": LATIN},
    )
    yield Case(
        "evaluate: template is a pipe",
        f"{TASKS} tasks.niah_single_1.template_file=t.yaml",
        ("t.yaml", "pipe"),
        {"t.yaml": pipe},
    )
    yield Case(
        "evaluate: template twice",
        f"{TASKS} tasks.niah_single_1.template_file=t.yaml",
        ("t.yaml", "twice"),
        {"t.yaml": "prompt: a\nprompt: b\n"},
    )
    yield Case("override recursive", f"{DRY} model.scratch=&a{{model_type:*a}}", ("model.scratch",))
    yield Case(
        "override twice", f"{DRY} training={{steps:1,steps:2}}".replace(":", ": ").replace("{ ", "{"), ("training",)
    )


def _aliases() -> str:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    return "\n".join(lines)


OUTPUTS = {
    "prepare": ("prepare --config run.yaml data.folder={}", "data.folder"),
    "train": ("train --config run.yaml training.output={}", "training.output"),
    "export": ("export run {}", "OUT"),
    "evaluate": (EVALUATE.replace("new", "{}"), "--output"),
    "tasks": (TASKS.replace("new", "{}"), "--output"),
    "suite": (SUITE.replace("new", "{}"), "--output"),
    "sweep": (SWEEP.replace("new", "{}"), "--output"),
    "experiment": ("experiment --config experiment.yaml output={}", "output"),
    "experiment's results": ("experiment --config experiment.yaml output=new results={}", "results"),
    "store": (f"{GENERATE} --prefix-store {{}}", "--prefix-store"),
    "fetch": (f"{FETCH} {{}}", "--output"),
}
"""Every folder that a command writes: the command, and how errors name the folder."""

OUTPUTS_FOR_ALL = ("prepare", "train", "evaluate", "store")
"""Commands that are given every kind of folder; the others share their checks."""


def _outputs() -> Iterator[Case]:
    """Folders that cannot be made, or that hold other things."""
    places: dict[str, tuple[str, dict[str, Any]]] = {
        "a file": ("prompt.txt", {}),
        "below a file": ("prompt.txt/below/it", {}),
        "a loop of links": ("loop", {"loop": loop}),
        "below a loop of links": ("loop/below", {"loop": loop}),
        "a dangling link into nowhere": ("dangling", {"dangling": link("/proc/refreshkv/new")}),
        "in /proc": ("/proc/refreshkv/new", {}),
        "a long name": ("n" * 300, {}),
        "a device": ("/dev/null", {}),
        "a pipe": ("pipe", {"pipe": pipe}),
    }
    for name, (command, setting) in OUTPUTS.items():
        for what, (place, files) in places.items():
            if what in ("a long name", "a device", "a pipe", "below a loop of links") and name not in OUTPUTS_FOR_ALL:
                continue
            yield Case(
                f"{name}: the output is {what}",
                command.format(place),
                (setting,),
                files,
                is_sample=name == "prepare" and what in ("below a file", "a loop of links"),
            )
    yield Case(
        "prepare: the folder holds other files",
        "prepare --config run.yaml --overwrite data.folder=run",
        ("data.folder",),
    )
    yield Case(
        "train: the folder holds other files",
        "train --config run.yaml --overwrite training.output=rows",
        ("training.output",),
    )
    yield Case("export: the folder holds other files", "export run rows --overwrite", ("OUT",))
    yield Case("evaluate: the folder holds a report", EVALUATE.replace("new", "report"), ("--output", "--overwrite"))
    yield Case("sweep: the folder holds a sweep", SWEEP.replace("new", "sweep"), ("--output", "--overwrite"))
    yield Case("suite: the folder holds a suite", SUITE.replace("new", "table"), ("--output", "--overwrite"))
    yield Case("generate: the store is another folder", f"{GENERATE} --prefix-store rows", ("--prefix-store",))


def _disks() -> Iterator[Case]:
    """Full disks: no file may grow beyond a size; a small disk; a disk that nothing may be written to."""
    writers = {
        "prepare": PREPARE,
        "train": TRAIN,
        "export": EXPORT,
        "evaluate": EVALUATE,
        "tasks": TASKS,
        "suite": SUITE,
        "sweep": SWEEP,
        "store": f"{GENERATE} --prefix-store new",
        "experiment": "experiment --config experiment.yaml output=new results=new2",
    }
    for name, command in writers.items():
        for size in (0, 40, 500, 3000):
            if (size > 0 and name == "experiment") or (size == 3000 and name != "train"):
                continue  # an experiment's jobs are processes of their own; other commands write less
            yield Case(
                f"{name}: no file may have more than {size} bytes",
                command,
                ("full|File too large",),
                code=3 if size == 3000 else 2,
                settings={"file_bytes": size},
            )
        if name != "experiment":
            yield Case(
                f"{name}: a disk of 8 kB",
                command.replace(" new", " small/new").replace("=new", "=small/new"),
                ("full|No space left",),
                {"small": folder},
                code=3 if name == "train" else 2,
                settings={"mounted_bytes": ("small", 8192)},
            )
        yield Case(
            f"{name}: a disk that is read-only",
            command,
            ("ead-only",),
            settings={"read_only": "."},
        )


def _streams() -> Iterator[Case]:
    """Standard output that cannot be written to, and encodings that lack a character."""
    for name, command in {
        "generate": GENERATE,
        "prepare": PREPARE,
        "evaluate": EVALUATE,
        "sweep": SWEEP,
        "export": EXPORT,
        "dry run": DRY,
        "experiment": EXPERIMENT,
        "doctor": "doctor",
        "help": "--help",
        "help of generate": "generate --help",
    }.items():
        yield Case(
            f"{name}: standard output is a full disk",
            command,
            ("standard output", "full"),
            settings={"stdout": "/dev/full"},
        )
    ascii_only = {"environment": {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}}
    yield Case(
        "generate: ASCII output", GENERATE, ("tokens",), {"prompt.txt": "ein Ger\xfccht"}, code=0, settings=ascii_only
    )
    yield Case("evaluate: ASCII output", f"{EVALUATE} --model b\xe4r", ("--model",), settings=ascii_only)
    yield Case("generate: a byte order mark", GENERATE, ("tokens",), {"prompt.txt": b"\xef\xbb\xbfa few words"}, code=0)
    yield Case("train: RANK without WORLD_SIZE", TRAIN, ("RANK", "WORLD_SIZE"), settings={"environment": {"RANK": "0"}})
    for name, value in {"RANK": "a", "WORLD_SIZE": "two"}.items():
        environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", name: value}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        yield Case(f"train: {name}={value}", TRAIN, (name, value), settings={"environment": environment})
    environment = {
        "RANK": "5",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29512",
    }
    yield Case("train: RANK beyond WORLD_SIZE", TRAIN, ("RANK", "WORLD_SIZE"), settings={"environment": environment})
    yield Case(
        "train: WORLD_SIZE without RANK", TRAIN, ("RANK", "WORLD_SIZE"), settings={"environment": {"WORLD_SIZE": "2"}}
    )
    missing = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    yield Case(
        "train: no MASTER_ADDR", f"{TRAIN} training.global_batch=8", ("MASTER_ADDR",), settings={"environment": missing}
    )
    yield Case("dry run: WORLD_SIZE=two", DRY, ("WORLD_SIZE",), settings={"environment": {"WORLD_SIZE": "two"}})
    yield Case("evaluate: output named in Latin-1", EVALUATE.replace("new", "n\udcfc"), ("report.md",), code=0)
    yield Case("model named in Latin-1", f"{GENERATE} --model \udcfcber", ("--model",), settings=ascii_only)


HUGE, HUGER, FINITE = "9223372036854775808", "1" + "0" * 400, "1e300"


def _numbers() -> Iterator[Case]:
    """Numbers outside their range."""
    options = {
        f"{GENERATE} --sample": {
            "--seed": ("-1", "4294967296", HUGE, HUGER, "1.5", "x"),
            "--temperature": ("1e-300", "-1", "0", "inf", "nan", FINITE),
            "--top-p": ("0", "-1", "nan", "2", "1e-300"),
        },
        GENERATE: {
            "--max-new-tokens": ("0", "-1", HUGE, HUGER),
            "--device": ("meta", "tpu", "cuda:99", "cuda:" + HUGER),
        },
        f"{GENERATE} --prefix-store new": {"--prefix-store-gb": ("0", "-1", "inf", "nan", FINITE)},
        f"{GENERATE} x": {},
        EVALUATE: {
            "--rows": ("0", "-1", HUGE, HUGER),
            "--last-tokens": ("0", "-1", "48", HUGE, HUGER),
            "--batch-size": ("0", "-1", HUGER),
            "--strides": ("0", "-1", HUGE, HUGER, "a", "5,,6"),
            "--budget": ("0", "-1", "nan", "inf", HUGE, FINITE, "x", "200%", "nan%", "1e-400"),
            "--threshold": ("nan", "inf", "x"),
            "--strategies": (
                f"full,refresh:{HUGE}",
                "full,refresh:0",
                "full,similarity:5:nan",
                "full,snapkv:0",
                f"full,streaming:{HUGE}",
                "full,full",
                "",
                f"full,snapkv:{HUGE}",
                "full,select:0",
            ),
            "--device": ("meta",),
        },
        TASKS: {
            "--examples": ("0", "-1", HUGER),
            "--task-length": ("0", "-1", "5", HUGE, HUGER),
            "--batch-size": ("0",),
        },
        f"{TASKS} --prefix-store new2": {"--prefix-store-gb": ("0", "inf", "nan", FINITE)},
        SWEEP: {
            "--thresholds": ("nan", "inf", "2", "", "a", "0.5,,0.6"),
            "--keep": ("0", "-1", "2", "nan"),
            "--rows": ("0", HUGE),
            "--last-tokens": ("0", "-5"),
            "--strides": ("0", HUGE),
        },
        "experiment --config experiment.yaml": {"--minutes": ("0", "-1", "nan"), "--jobs": ("0", "-1", HUGE)},
        DRY: {"--ranks": ("0", "-1", HUGE), "--gpu-memory": ("0", "-1", "nan", "inf")},
    }
    sample = {("--seed", "-1"), ("--temperature", "1e-300")}
    for command, ranges in options.items():
        for option, values in ranges.items():
            for value in values:
                if value == HUGER and option not in ("--seed", "--last-tokens", "--device"):
                    continue  # the same parser
                name = f"{command.split()[0]} {'--tasks ' if '--tasks' in command else ''}{option} {value[:20]}"
                word = option[2:].partition("-")[0]
                yield Case(name, f"{command} {option}={value}", (word,), is_sample=(option, value) in sample)
    for override, values in {
        "refresh.budget": ("0", "-1", ".nan", ".inf", HUGE, HUGER, "[1]"),
        "refresh.stride": ("0", "-1", HUGE, HUGER, "1.5", "true"),
        "refresh.threshold": (".nan", ".inf"),
        "refresh.pool_kernel": ("0", "2", HUGE),
        "refresh.observation_window": ("0", HUGE),
        "refresh.recent_window": ("-1", HUGE),
        "refresh.sink_tokens": ("-1", HUGE),
        "refresh.select_stride": ("0", HUGE),
    }.items():
        for value in values:
            if value == HUGER and override != "refresh.stride":
                continue
            command = f"{GENERATE} {override}={value}"
            yield Case(f"generate {override}={value[:20]}", command, (override.partition(".")[2],))
    for setting, values in {
        "training.seed": ("-1", "4294967296", HUGE, HUGER, "1.5"),
        "training.steps": ("0", "-1", HUGE, HUGER),
        "training.global_batch": ("0", "3", HUGE, HUGER, "1000000"),
        "training.micro_batch": ("0", HUGE),
        "training.learning_rate": ("-1", ".nan", ".inf", FINITE),
        "training.weight_decay": ("-1", ".nan", ".inf", FINITE),
        "training.warmup_steps": ("-1", HUGE),
        "training.betas": ("[0.9]", "[-1, 0.9]", "[0.9, 1.0]", "[0.9, 1e300]", "[.nan, 0.9]", "[.inf, 0.9]"),
        "training.max_grad_norm": ("-1", ".nan", ".inf"),
        "training.timeout": ("0", "-1", ".inf", FINITE, ".nan"),
        "training.log_every": ("0", HUGE),
        "training.save_every": ("0", HUGE),
        "training.evaluate_every": ("-1", HUGE),
        "training.evaluate_rows": ("0", "-1", HUGE),
        "training.evaluate_tokens": ("0", "48", HUGE),
        "training.keep_checkpoints": ("0", HUGE),
        "training.activation_checkpointing": ("-1", ".nan", "2"),
        "simulation.stride": ("0", "[]", HUGE, HUGER),
        "simulation.prompt_length": ("0", "-1", "48", HUGE, "[30, 8]", "[1, 2, 3]"),
        "simulation.threshold": (".nan", ".inf"),
        "simulation.chunks": ("0", "[]", "[2, 0]", HUGE),
        "simulation.plain_share": ("-1", "1", ".nan"),
        "distillation.weight": ("-1", ".nan", ".inf", FINITE),
        "parallel.sequence": ("0", "3", HUGE),
        "data.row_length": ("1", "-1", HUGE, HUGER),
    }.items():
        for value in values:
            if value == HUGER and setting not in ("training.seed", "simulation.stride"):
                continue
            both = (f"training.evaluate_every=1 {setting}", setting)[
                "evaluate" not in setting or setting.endswith("every")
            ]
            command = f"{TRAIN} {both}={value.replace(' ', '')}"
            words = (setting.partition(".")[2].replace("prompt_length", "prompt_length"),)
            sample = (setting, value) in {("training.betas", "[0.9, 1e300]"), ("training.seed", "-1")}
            yield Case(f"train {setting}={value[:20]}", command, words, is_sample=sample)
    for setting, values in {
        "data.row_length": ("1", "-1", HUGE, HUGER, "10000000"),
        "data.max_documents": ("0", "-1", HUGE),
        "data.max_train_rows": ("0", HUGE),
        "data.train_vocabulary": ("1", "-1", HUGE, HUGER),
        "data.task_examples": ("0", HUGE),
    }.items():
        for value in values:
            yield Case(f"prepare {setting}={value[:20]}", f"{PREPARE} {setting}={value}", (setting,))


MODELS_FOR_ALL = (
    "missing",
    "with a config not UTF-8",
    "of 10^9 layers",
    "with cut weights",
    "with missing weights",
    "with NaN weights",
    "with a schedule of text",
)
"""Broken models that every command is given; `generate` is given all."""


def _models() -> Iterator[Case]:
    """Models that are missing, broken or larger than any machine."""
    config, tensors, tokenizer = "model/config.json", "model/model.safetensors", "model/tokenizer.json"
    ends = {"model/generation_config.json": '{"eos_token_id": "x"}'}
    yield Case("generate: the last token is text", GENERATE, ("--model", "eos_token_id"), ends)
    users = {"generate": GENERATE, "evaluate": EVALUATE, "tasks": TASKS, "sweep": SWEEP, "suite": SUITE}
    for name, command in {**users, "show": SHOW, "chat": CHAT}.items():
        setting = "MODEL" if name in ("show", "chat") else "--model"
        words = (f"error: {setting}: step holds checkpoints of training", "launch/export.py step OUT")
        given, is_early = command.replace(" model ", " step "), name in ("generate", "show", "chat")
        yield Case(f"{name}: a checkpoint for a model", given, words, {"step": checkpoint}, is_sample=is_early)
    trains = f"{TRAIN} model.scratch=null model.path=model data.tokenizer=model data.train_vocabulary=null"
    bad: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
        "missing": (("model",), {"model": gone}),
        "an empty folder": (("model",), {"model": folder}),
        "a file": (("model",), {"model": lambda path: (gone(path), path.write_text("x"))}),
        "without a config": (("model",), {config: gone}),
        "with an empty config": (("model",), {config: ""}),
        "with a config that is a list": (("model",), {config: "[]"}),
        "with a config not UTF-8": (("model",), {config: LATIN}),
        "of an unknown type": (("model",), {config: edited(model_type="nonesuch")}),
        "with a type that is a number": (("model",), {config: edited(model_type=3)}),
        "with text for layers": (("model",), {config: edited(num_hidden_layers="two")}),
        "with -1 layers": (("model",), {config: edited(num_hidden_layers=-1)}),
        "of 10^9 layers": (("model", "num_hidden_layers"), {config: edited(num_hidden_layers=10**9)}),
        "of 10^15 words": (("model", "vocab_size"), {config: edited(vocab_size=10**15)}),
        "of a hidden size of 10^9": (("model", "hidden_size"), {config: edited(hidden_size=10**9)}),
        "with 0 heads": (("model",), {config: edited(num_attention_heads=0)}),
        "with heads that do not divide": (("model",), {config: edited(num_key_value_heads=3)}),
        "without weights": (("model",), {tensors: gone}),
        "with empty weights": (("model",), {tensors: ""}),
        "with cut weights": (("model",), {tensors: cut(3000)}),
        "with missing weights": (("model", "lacks"), {tensors: missing_weights}),
        "with a weight of another shape": (("model",), {tensors: other_shape}),
        "with NaN weights": (("model", "finite"), {tensors: nan_weights}),
        "with a schedule of text": (("refreshkv",), {config: edited(refreshkv="x")}),
        "with an unknown schedule": (("refreshkv",), {config: edited(refreshkv={"budgett": 1})}),
        "with a wrong budget": (("budget",), {config: edited(refreshkv={"budget": -1})}),
    }
    for name, command in {**users, "train": trains}.items():
        for what, (words, files) in bad.items():
            if name != "generate" and what not in MODELS_FOR_ALL:
                continue
            if name in ("suite", "train") and "refreshkv" in words:
                continue  # these take no schedule from the model
            yield Case(f"{name}: a model {what}", command, words, files)
    for what, change in {"missing": gone, "empty": "", "not UTF-8": LATIN, "a list": "[]", "a folder": folder}.items():
        for name in ("generate", "tasks"):
            yield Case(f"{name}: tokenizer.json is {what}", users[name], ("--model", "tokenizer"), {tokenizer: change})
    for name in ("generate", "tasks"):
        words = ("--model", "token")
        yield Case(f"{name}: a tokenizer with ids beyond the model's", users[name], words, {tokenizer: broken_ids})
    yield Case(
        "prepare: a tokenizer that is missing",
        f"{PREPARE} data.train_vocabulary=null data.tokenizer=none",
        ("data.tokenizer",),
    )
    yield Case(
        "prepare: a broken tokenizer",
        f"{PREPARE} data.train_vocabulary=null data.tokenizer=model",
        ("data.tokenizer",),
        {tokenizer: "{}"},
    )
    yield Case("a GGUF file that is empty", f"{GENERATE} --model x.gguf", ("--model",), {"x.gguf": ""})
    yield Case("a GGUF file of text", f"{GENERATE} --model x.gguf", ("--model",), {"x.gguf": "GGUF" + "x" * 100})
    yield Case("a model's name that is empty", f"{GENERATE} --model=", ("--model",))
    yield Case("a model's name with dots", f"{GENERATE} --model ../../..", ("--model",))
    for setting, value in {
        "num_hidden_layers": "1000000000",
        "vocab_size": "1000000000000000",
        "hidden_size": "1000000000",
        "intermediate_size": "1000000000000",
        "num_attention_heads": "0",
        "num_key_value_heads": "3",
        "max_position_embeddings": "-1",
        "head_dim": "0",
    }.items():
        for name, command in {"train": TRAIN, "dry run": DRY}.items():
            words = ("model.scratch",)
            yield Case(f"{name}: model.scratch.{setting}={value}", f"{command} model.scratch.{setting}={value}", words)
    for setting, value in {
        "hidden_size": "x",
        "num_hidden_layers": "-1",
        "vocab_size": "0",
        "hidden_act": "nonesuch",
        "rope_theta": "x",
        "num_hidden_layers.a": "1",
        "model_type": "3",
        "model_type ": "bert",
        "model_type  ": "t5",
    }.items():
        setting = setting.strip()
        command = f"{DRY} model.scratch.{setting}={value}"
        yield Case(f"dry run: model.scratch.{setting}={value}", command, ("model",))


SEQUENCES_FOR_ALL = ("missing", "with an empty rows.json", "without a fingerprint", "with a cut Arrow file")
"""Broken sequences that every command is given; `evaluate` is given all, `train` all with a broken rows.json."""


def _sequences() -> Iterator[Case]:
    """Prepared sequences, and the documents that they are made of."""
    users = {"evaluate": EVALUATE, "sweep": SWEEP, "suite": SUITE, "train": TRAIN}
    bad: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
        "missing": (("rows",), {"rows": gone}),
        "a file": (("rows",), {"rows": lambda path: (gone(path), path.write_text("x"))}),
        "a loop of links": (("rows",), {"rows": loop}),
        "without rows.json": (("rows",), {"rows/rows.json": gone}),
        "with an empty rows.json": (("rows", "prepare"), {"rows/rows.json": ""}),
        "with a rows.json not UTF-8": (("rows", "prepare"), {"rows/rows.json": LATIN}),
        "with a rows.json that is a list": (("rows", "prepare"), {"rows/rows.json": "[]"}),
        "with a nested rows.json": (("rows", "prepare"), {"rows/rows.json": "[" * 100_000}),
        "with a rows.json that is a pipe": (("rows",), {"rows/rows.json": pipe}),
        "without a fingerprint": (("rows", "prepare"), {"rows/rows.json": edited(fingerprint=gone)}),
        "without a largest id": (("rows", "prepare"), {"rows/rows.json": edited(largest_token_id=gone)}),
        "without a vocabulary size": (("rows", "prepare"), {"rows/rows.json": edited(vocabulary_size=gone)}),
        "without data": (("rows", "prepare"), {"rows/rows.json": edited(data=gone)}),
        "without a row length": (("rows", "prepare"), {"rows/rows.json": edited(data__row_length=gone)}),
        "with a row length of text": (("rows", "prepare"), {"rows/rows.json": edited(data__row_length="x")}),
        "with a largest id of text": (("rows", "prepare"), {"rows/rows.json": edited(largest_token_id="x")}),
        "without splits": (("rows", "prepare"), {"rows/rows.json": edited(splits=gone)}),
        "with a foreign split": (("rows", "prepare"), {"rows/rows.json": edited(splits__test=[])}),
        "with an empty Arrow file": (("rows", "prepare"), {"rows/test/data-00000-of-00001.arrow": ""}),
        "with a cut Arrow file": (("rows", "prepare"), {"rows/train/data-00000-of-00001.arrow": cut(900)}),
        "without an Arrow file": (("rows", "prepare"), {"rows/test/data-00000-of-00001.arrow": gone}),
        "with a broken state.json": (("rows", "prepare"), {"rows/test/state.json": "{"}),
        "with a broken dataset_dict.json": (("rows", "prepare"), {"rows/dataset_dict.json": "[]"}),
    }
    for name, command in users.items():
        for what, (words, files) in bad.items():
            is_read = name == "evaluate" or (name == "train" and "rows/rows.json" in files)
            if not is_read and what not in SEQUENCES_FOR_ALL:
                continue
            yield Case(
                f"{name}: sequences {what}",
                command,
                words,
                files,
            )
    for name, split in {"evaluate": "test", "sweep": "test", "suite": "test", "train": "train"}.items():
        files = {f"rows/{split}/data-00000-of-00001.arrow": large_ids}
        yield Case(f"{name}: token ids beyond the vocabulary", users[name], ("rows",), files)
    documents: dict[str, tuple[Any, str]] = {
        "missing": (gone, "data_files"),
        "empty": ("", "data_files"),
        "not UTF-8": (b'{"text": "' + LATIN + b'"}\n', "data_files"),
        "not JSON": ("{x\n", "data_files"),
        "a list": ("[1, 2]\n", "data"),
        "without the column": ('{"words": "a"}\n', "text_column"),
        "with numbers": ('{"text": 3}\n{"text": 4}\n', "text_column"),
        "with lists": ('{"text": ["a"]}\n', "text_column"),
        "a folder": (folder, "data_files"),
        "a pipe": (pipe, "data_files"),
        "a loop of links": (loop, "data_files"),
        "too short": ('{"text": "a"}\n', "data"),
    }
    for what, (content, word) in documents.items():
        yield Case(f"prepare: documents {what}", PREPARE, (word,), {"texts.jsonl": content})
    text = "prepare --config run.yaml data.folder=new data.path=text data.data_files=t.txt"
    for what, content in {"not UTF-8": LATIN * 100, "a pipe": pipe, "empty": ""}.items():
        yield Case(f"prepare: a text file {what}", text, ("data_files",), {"t.txt": content})
    parquet = "prepare --config run.yaml data.folder=new data.path=parquet data.data_files=t.parquet"
    yield Case("prepare: a parquet file of text", parquet, ("data_files",), {"t.parquet": "x" * 100})
    yield Case("prepare: no such builder", f"{PREPARE} data.path=nonesuch", ("data.path",))
    yield Case("prepare: no such split", f"{PREPARE} data.split=nonesuch", ("data.split",))
    yield Case("prepare: a file as path", f"{PREPARE} data.path=texts.jsonl", ("data.path",))
    tasks = "prepare --config run.yaml data.folder=new data.path=tasks data.data_files=null "
    tasks += "data.train_vocabulary=null data.tokenizer=model data.row_length=500"
    yield Case("prepare: no task", tasks, ("data.tasks",))
    yield Case("prepare: an unknown task", f"{tasks} data.tasks.nonesuch={{}}", ("nonesuch",))
    yield Case(
        "prepare: a task's setting of text", f"{tasks} data.tasks.chain_of_key.max_new_tokens=x", ("max_new_tokens",)
    )
    questions = TASKS.replace("niah_single_1", "qa_1") + " tasks.qa_1.data_files=q.json"
    for what, content in {
        "missing": None,
        "not UTF-8": LATIN,
        "not JSON": "{",
        "a list": "[]",
        "a folder": folder,
        "a pipe": pipe,
        "nested": "[" * 100_000,
    }.items():
        files = {} if content is None else {"q.json": content}
        yield Case(f"evaluate: questions {what}", questions, ("q.json",), files)


def _training() -> Iterator[Case]:
    """Runs that cannot begin."""
    yield Case("train: an unknown setting", f"{TRAIN} training.stepps=1", ("training.stepps", "training.steps"))
    yield Case("train: no such DeepSpeed file", f"{TRAIN} training.deepspeed=nonesuch", ("training.deepspeed",))
    yield Case("train: text for a number", f"{TRAIN} training.steps=many", ("training.steps",))
    yield Case("train: a section for a number", f"{TRAIN} training.steps.a=1", ("training.steps",))
    yield Case("train: an override without =", f"{TRAIN} training.steps", ("training.steps",))
    yield Case("train: --resume and --overwrite", f"{TRAIN} --resume --overwrite", ("--resume",))
    yield Case("train: no such config", "train --config nonesuch", ("--config", "nonesuch"))
    yield Case("train: no such scratch model", f"{DRY} model.scratch.model_type=nonesuch", ("model_type",))
    yield Case(
        "train: learning rate too large", f"{TRAIN} training.learning_rate=1e30 training.steps=6", ("learning_rate",)
    )
    yield Case("train: liger on a CPU", f"{TRAIN} training.kernels=liger", ("training.kernels",))
    yield Case(
        "train: flash attention on a CPU", f"{TRAIN} model.prompt_attention=flash_attention_2", ("prompt_attention",)
    )
    yield Case(
        "train: resume without a run",
        f"{TRAIN} --resume",
        ("no run", "training.output"),
        {"new": lambda p: (p.mkdir(), (p / "x").write_text(""))},
    )
    yield Case("train: 10^9 ranks", f"{DRY} --ranks 1000000000", ("--ranks",))
    yield Case("train: the data's folder is a number", f"{TRAIN} data.folder=3", ("data.folder",))
    yield Case("train: an unknown schedule", f"{TRAIN} training.lr_schedule=nonesuch", ("training.lr_schedule",))
    yield Case(
        "train: a schedule with more arguments",
        f"{TRAIN} training.lr_schedule=reduce_lr_on_plateau",
        ("training.lr_schedule",),
    )
    yield Case(
        "train: a schedule with a minimum",
        f"{TRAIN} training.lr_schedule=cosine_with_min_lr",
        ("training.lr_schedule",),
    )
    yield Case(
        "train: a schedule of phases", f"{TRAIN} training.lr_schedule=warmup_stable_decay", ("training.lr_schedule",)
    )
    yield Case("train: a null in the output", f'{TRAIN} training.output="a\\0b"', ("training.output",))


def _earlier_work() -> Iterator[Case]:
    """Files of earlier work that are broken, and work of another kind."""
    resume = "train --config run.yaml --resume"
    for what, content in {
        "empty": "",
        "not YAML": "{",
        "not UTF-8": LATIN,
        "a list": "[]",
        "recursive": "a: &a\n  b: *a\n",
        "a folder": folder,
        "a pipe": pipe,
    }.items():
        yield Case(f"resume: run.yaml is {what}", resume, ("run.yaml",), {"run/run.yaml": content})
        yield Case(f"export: run.yaml is {what}", EXPORT, ("run.yaml",), {f"{CHECKPOINT}/run.yaml": content})
    for what, content in {
        "empty": "",
        "not JSON": "{",
        "a list": "[]",
        "without a step": edited(step=gone),
        "with text for a step": edited(step="x"),
        "a folder": folder,
        "with a foreign key": edited(x=1),
    }.items():
        yield Case(
            f"export: state.json is {what}", EXPORT, ("state.json|CHECKPOINT",), {f"{CHECKPOINT}/state.json": content}
        )
    for what, content in {
        "not JSON": "{\n",
        "numbers": "3\n",
        "without a step": '{"loss": 1}\n',
        "with text for a step": '{"step": "x"}\n',
        "not UTF-8": LATIN + b"\n",
        "a folder": folder,
        "a pipe": pipe,
    }.items():
        more = f"{resume} training.save_every=1"
        yield Case(f"resume: metrics.jsonl is {what}", more, ("metrics.jsonl",), {"run/metrics.jsonl": content})
    yield Case("export: no checkpoint", "export rows new", ("CHECKPOINT",))
    yield Case("export: a file", "export prompt.txt new", ("CHECKPOINT",))
    yield Case("export: missing", "export nonesuch new", ("CHECKPOINT",))
    yield Case("export: a loop of links", "export loop new", ("CHECKPOINT",), {"loop": loop})
    yield Case("export: a report that is none", f"{EXPORT} --report rows", ("--report",))
    yield Case("export: a report of a list", f"{EXPORT} --report report", ("--report",), {"report/report.json": "[]"})
    yield Case(
        "export: a cut weight file",
        EXPORT,
        ("mp_rank_00_model_states.pt|CHECKPOINT",),
        {f"{CHECKPOINT}/mp_rank_00_model_states.pt": cut(5000)},
    )
    yield Case("export: a broken model config", EXPORT, ("config.json",), {f"{CHECKPOINT}/model/config.json": "{"})
    compare = EVALUATE + " --compare report"
    changes: dict[str, Any] = {
        "missing": gone,
        "empty": "",
        "a list": "[]",
        "not UTF-8": LATIN,
        "nested": "[" * 100_000,
        "a pipe": pipe,
        "a folder": folder,
        "without a protocol": edited(protocol=gone),
        "with a protocol of text": edited(protocol="x"),
        "with a protocol of null": edited(protocol=None),
        "with settings of text": edited(settings=3),
        "without a model": edited(model=gone),
        "with a model of a list": edited(model=[1]),
        "without a date": edited(date=gone),
        "with an evaluation of text": edited(evaluation="x"),
        "with results of text": edited(evaluation__results="x"),
        "with no results": edited(evaluation__results=[]),
        "with results of numbers": edited(evaluation__results=[1, 2]),
        "with rows of text": edited(evaluation__rows="x"),
        "with warnings of numbers": edited(evaluation__warnings=3),
        "of another layout": edited(layout="x"),
    }
    for what, change in changes.items():
        yield Case(f"compare: report.json is {what}", compare, ("report",), {"report/report.json": change})
    for field_name in ("losses", "name", "config", "budget", "standard_error"):
        for value in ("x", None, [], {"a": 1}):
            if value is None and field_name in ("config", "budget", "standard_error"):
                continue

            def change(path: Path, field_name: str = field_name, value: Any = value) -> None:
                content = json.loads(path.read_text())
                content["evaluation"]["results"][1][field_name] = value
                path.write_text(json.dumps(content))

            yield Case(
                f"compare: a result's {field_name} is {value}", compare, ("report",), {"report/report.json": change}
            )
    for name, command, file in (
        ("evaluate", EVALUATE.replace("new", "report"), "report/rows.jsonl"),
        ("tasks", TASKS.replace("new", "scores"), "scores/examples.jsonl"),
        ("sweep", SWEEP.replace("new", "sweep"), "sweep/rows.jsonl"),
        ("suite", SUITE.replace("new", "table"), "table/rows.jsonl"),
    ):
        for what, content in {
            "not JSON": "{\n",
            "numbers": "3\n",
            "foreign": '{"a": 1}\n',
            "not UTF-8": LATIN + b"\n",
            "a folder": folder,
            "a pipe": pipe,
            "nested": "[" * 100_000 + "\n",
        }.items():
            if name in ("sweep", "suite") and what not in ("numbers", "not UTF-8"):
                continue  # the same reader
            yield Case(f"{name} --resume: {file} is {what}", f"{command} --resume", (file,), {file: content})
    for what, content in {"not JSON": "{", "a list": "[]", "not UTF-8": LATIN, "a folder": folder}.items():
        yield Case(
            f"store: store.json is {what}",
            f"{GENERATE} --prefix-store store",
            ("--prefix-store",),
            {"store/store.json": content},
        )


def _experiments() -> Iterator[Case]:
    """Experiments: their settings and their results."""
    run = "experiment --config experiment.yaml --dry-run"
    results: dict[str, Any] = {
        "empty": "",
        "not JSON": "{",
        "a list": "[1]",
        "not UTF-8": LATIN,
        "of numbers": '{"a": 1}',
        "of empty entries": '{"a": {}}',
        "a folder": folder,
        "a pipe": pipe,
        "nested": "[" * 100_000,
        "of a foreign study": '{"a": {"study": "small", "arm": "none", "selection": "paper", "kind": "perplexity"}}',
        "of a list for a study": '{"a": {"study": [], "arm": "none", "selection": "paper", "kind": "perplexity"}}',
        "of a foreign kind": '{"a": {"study": "small", "arm": "none", "selection": "paper", "kind": "x"}}',
    }
    for what, content in results.items():
        files = {"results": folder, "results/results.json": content}
        yield Case(f"experiment: results.json is {what}", run, ("results.json",), files, is_sample=what == "of numbers")
    changes: dict[str, dict[str, Any]] = {
        "an arm of text": {"arms__whole": "x"},
        "arms of a list": {"arms": [1]},
        "studies of text": {"studies": "x"},
        "a study of null": {"studies__small": None},
        "selections of a list": {"selections": ["a"]},
        "a selection of text": {"selections__paper": "x"},
        "seeds of text": {"studies__small__seeds": ["x"]},
        "a negative seed": {"studies__small__seeds": [-1]},
        "a huge seed": {"studies__small__seeds": [2**64]},
        "no seeds": {"studies__small__seeds": []},
        "a seed twice": {"studies__small__seeds": [1, 1]},
        "an arm twice": {"studies__small__arms": ["none", "whole", "whole"]},
        "an arm that is a path": {
            "arms__../../x": {"selections": ["paper"], "settings": {}},
            "studies__small__arms": ["none", "../../x"],
        },
        "a selection that is a path": {"selections__../x": {}, "arms__whole__selections": ["../x"]},
        "a study that is a path": {"studies__../x": {}},
        "batch size 0": {"studies__small__perplexity__batch_size": 0},
        "no rows": {"studies__small__perplexity__rows": 0},
        "huge strides": {"studies__small__perplexity__strides": [2**64]},
        "a threshold of NaN": {"studies__small__perplexity__threshold": float("nan")},
        "too many last tokens": {"studies__small__perplexity__last_tokens": 48},
        "nothing to evaluate": {"studies__small__perplexity": None},
        "settings of text": {"settings": "x"},
        "settings of a number inside": {"studies__small__settings__data": 3},
        "an empty output": {"output": ""},
        "a base of text": {"studies__small__base": "x"},
        "a start that is itself": {"studies__small__start": "small"},
    }
    for what, change in changes.items():
        yield Case(f"experiment: {what}", run, (), {"experiment.yaml": edited(**change)})
    yield Case("experiment: nothing is called so", f"{run} --only nonesuch", ("--only",))


def _commands() -> Iterator[Case]:
    """The command line itself, suites, and packages to fetch."""
    yield Case("no such command", "nonesuch", ("nonesuch", "generate"), is_sample=True)
    yield Case("a command that is a path", "../train", ("../train",))
    yield Case("generate: no such option", f"{GENERATE} --nonesuch", ("--nonesuch",))
    yield Case("generate: an unknown setting", f"{GENERATE} refresh.nonesuch=1", ("refresh.nonesuch",))
    yield Case("doctor: an argument", "doctor x", ("x",))
    yield Case("models: no such family", "models --try nonesuch", ("--try", "nonesuch"))
    yield Case("models: a record of nothing", "models --record", ("--record", "--try all"))
    yield Case("evaluate: no such suite", f"{SUITE} --suite nonesuch", ("--suite",))
    yield Case("evaluate: no such strategy", f"{EVALUATE} --strategies nonesuch", ("--strategies",))
    yield Case("evaluate: no such task", TASKS.replace("niah_single_1", "nonesuch"), ("nonesuch",))
    yield Case("evaluate: a tasks value of text", f"{TASKS} tasks.niah_single_1=x", ("tasks.niah_single_1",))
    yield Case("evaluate: a task that is not there", f"{TASKS} tasks.vt.length=3", ("tasks.vt",))
    yield Case("evaluate: a corpus without a folder", f"{SUITE} --corpus words=", ("--corpus",))
    yield Case("evaluate: an unknown corpus", f"{SUITE} --corpus nonesuch=rows", ("nonesuch",))
    yield Case("evaluate: without nothing", f"{SUITE} --without nonesuch", ("nonesuch",))
    for what, change in {
        "columns of a list": {"columns": [1]},
        "rows of text": {"rows": "x"},
        "numbers of a list": {"paper__numbers": [1]},
        "no such strategy": {"rows__full__strategy": "nonesuch"},
        "a corpus of null": {"corpora__words": None},
        "rows of 0": {"corpora__words__rows": 0},
        "last tokens of -1": {"corpora__words__last_tokens": -1},
        "a budget of text": {"rows__ours__refresh": {"budget": "x"}},
        "a huge stride": {"rows__ours__refresh": {"stride": 2**64}},
        "a number as a name": {"rows__3": {"strategy": "full"}, "title": 3},
    }.items():
        yield Case(f"suite: {what}", SUITE, ("suite.yaml",), {"suite.yaml": edited(**change)})
    yield Case("fetch: no such name", "fetch nonesuch", ("nonesuch",))
    yield Case("fetch: a name that is a path", "fetch ../models/smollm2-135m", ("../models",))
    model = {"package": "p", "version": "1", "file": "f", "sha256": "x", "licence": "l"}
    for what, content in {
        "neither": {},
        "both": {"model": model, "texts": {"packages": []}},
        "text": {"model": "x"},
        "packages of text": {"texts": {"packages": "x"}},
    }.items():
        yield Case(f"fetch: {what}", "fetch s.yaml --output new", (), {"s.yaml": yaml.safe_dump(content) or "{}"})
