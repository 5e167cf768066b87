"""Which module imports which: no circles, arrows in one direction, and no package that a command does not need."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

from packaging.requirements import Requirement

from refreshkv.cli import EXTRAS
from tests.package.sources import ROOT, circles, imports

LAYERS = {
    "ops": {"ops"},
    "core": {"ops", "core"},
    "prefix": {"ops", "core", "prefix"},
    "data": {"ops", "core", "data"},
    "evaluation": {"ops", "core", "prefix", "data", "evaluation"},
    "train": {"ops", "core", "prefix", "data", "evaluation", "train"},
    "launch": {"ops", "core", "prefix", "data", "evaluation", "train", "launch"},
}
"""Part of the package -> the parts that it may import. `core` is what stands in no folder named here."""


def layer(module):
    part = module.partition(".")[2].partition(".")[0]
    return "launch" if part == "__main__" else part if part in LAYERS else "core"


def test_there_are_no_circles():
    assert circles(imports()) == []


def test_imports_point_in_one_direction():
    wrong = [
        f"{importer} imports {imported}"
        for importer, names in imports().items()
        for imported in sorted(names)
        if layer(imported) not in LAYERS[layer(importer)]
    ]
    assert wrong == []


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_help_imports_nothing_heavy():
    code = "import sys; sys.argv = ['refreshkv', '--help']\n"
    code += "from refreshkv.launch.command import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'transformers', 'deepspeed', 'datasets') if name in sys.modules])"
    lines = run_python(code).splitlines()
    assert lines[-1] == "[]"
    for command in ("prepare", "train", "evaluate", "sweep", "experiment", "export", "generate", "doctor"):
        assert any(line.startswith(f"  {command} ") for line in lines)


def required(names):
    """The distributions with these names, and all that they need, extras left out."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            needs = [Requirement(line) for line in requires(name) or ()]
        except PackageNotFoundError:  # a need of another platform
            continue
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def test_every_module_comes_with_the_package_or_is_known_to_come_with_an_extra():
    """So that a missing one is an error of one line that names the extra."""
    core = required(["refreshkv"])
    known = {module for modules in EXTRAS.values() for module in modules}
    distributions, unknown = packages_distributions(), {}
    for folder in ("refreshkv", "train", "data", "evaluation", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            for module in third_party(path) - known:
                names = {name.lower().replace("_", "-") for name in distributions.get(module, ())}
                if not names & core:
                    unknown[module] = path.relative_to(ROOT).as_posix()
    unknown.pop("mlflow", None)  # validated by its setting, in no extra
    unknown.pop("axolotl", None)  # loads its plugin itself, in no extra
    unknown.pop("kvpress", None)  # refused in one line by the harness, in no extra: it asks for an older transformers
    assert unknown == {}


def third_party(path):
    """Names of the modules of other packages that a file imports."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.add(node.module)
    return {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"refreshkv"}


BLOCKED = """
import json, sys
for name in ("deepspeed", "tensorboard", "matplotlib"):
    sys.modules[name] = None  # an import raises ModuleNotFoundError, and find_spec finds nothing

import refreshkv, refreshkv.evaluation
{snippet}
from refreshkv.launch.command import main

def command(*arguments):
    sys.argv = ["refreshkv", *arguments]
    try:
        main()
    except SystemExit as end:
        print("exit code", end.code)

with open("text.jsonl", "w") as file:  # of many documents some fall into each split, whatever is in them
    for number in range(40):
        print(json.dumps({{"text": f"{{number}} " + open("{root}/CHANGELOG.md").read()}}), file=file)
command(
    "prepare", "data.folder=rows", "data.path=json", "data.data_files=text.jsonl", "data.row_length=96",
    "data.tokenizer={root}/base/python-4m",
)
model = ("--model", "{root}/base/python-4m", "--dtype", "float32", "--budget", "16")
command("evaluate", *model, "--data", "rows", "--split", "{split}", "--rows", "2", "--last-tokens", "32")
few = ("--strategies", "full,refresh:10", "--task-length", "512", "--examples", "1")
command("evaluate", *model, "--tasks", "niah_single_1", *few, "--output", "tasks")
command("train", "--config", "quickstart")
"""


def test_inference_and_evaluation_need_neither_deepspeed_nor_tensorboard_nor_matplotlib(tmp_path):
    """One process: README's snippet, and `refreshkv evaluate` of the base model on sequences and on a task."""
    readme = ROOT.joinpath("README.md").read_text()
    snippet = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "generate(" in block)
    snippet, changed = re.subn(r'^name = ".*?"', f'name = "{ROOT}/base/python-4m"', snippet, flags=re.MULTILINE)
    assert changed == 1
    code = BLOCKED.format(snippet=snippet, root=ROOT, split="train")
    done = run_python(code, tmp_path, check=False)
    assert done.stdout.count("exit code 0") == 3 and done.stdout.count("exit code 2") == 1, done.stdout + done.stderr
    assert "error: deepspeed is not installed: pip install 'refreshkv[train]'" in done.stderr


def run_python(code, folder=None, check=True):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    if not check:
        return done
    assert done.returncode == 0, done.stderr
    return done.stdout
