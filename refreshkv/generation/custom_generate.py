"""Writes `custom_generate/` into a model's folder: the code that `generate()` needs, for users without this package.

    AutoModelForCausalLM.from_pretrained(NAME, trust_remote_code=True).generate(**inputs)

transformers then runs `custom_generate/generate.py` instead of the model's own `generate`. It copies the files that
this one imports, but supports no packages among them. So each module becomes one file with rewritten imports: for
instance, `refreshkv.cache.layer` becomes `cache_layer.py`. Each export writes the files again from the installed
package. A name can be registered only once in torch's and transformers' registries, so registered names contain a hash
of the sources: models of several releases can be used in one process, also beside the package.
"""

import ast
import hashlib
from functools import lru_cache
from pathlib import Path

import refreshkv
from refreshkv.settings import SettingsError

ROOT = Path(refreshkv.__file__).parent
FOLDER = "custom_generate"
ENTRY = "refreshkv.generation.generate"
REQUIREMENTS = "torch>=2.11\ntransformers>=5.17\n"
"""Packages that transformers requires in the user's environment before it runs the code."""
HEADER = "# Made by refreshkv {version} of {module}, sources {stamp}: changes are lost with the next export."
LICENCE = "# SPDX-License-Identifier: Apache-2.0"
OPTIONAL = "triton"
"""A package that transformers must not ask for: only kernels on GPUs import it."""

GENERATE = '''"""generate() of this model: decodes from a small KV cache that is chosen anew every few tokens.

The other files here are parts of refreshkv. Its settings for this model stand under "refreshkv" in config.json.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # transformers copies the files that are named here; each is imported when it is needed
{imports}

STAMP = "{name}"
"""Models with the same sources share what the first one imported."""


def generate(inputs: Any = None, generation_config: Any = None, *, model: Any, **settings: Any) -> Any:
    """Takes the arguments of the model's own `generate`, and returns what it returns."""
    if STAMP not in sys.modules:
        sys.modules[STAMP] = importlib.import_module(".{entry}", __package__)
    return sys.modules[STAMP].generate(model, inputs, generation_config, **settings)
'''


def write_custom_generate(model_folder: str | Path) -> Path:
    """Writes `custom_generate/` into a model's folder, in the place of an earlier one, and returns its path.

    The model's config.json has to hold its schedule under "refreshkv", as every export does. Raises `SettingsError` if
    there is a `custom_generate/` that another program made.
    """
    folder = Path(model_folder) / FOLDER
    earlier = folder / "generate.py"
    if folder.exists() and (not earlier.is_file() or not is_ours(earlier)):
        raise SettingsError(f"{folder} is there already and not made by refreshkv: move it away")
    folder.mkdir(exist_ok=True)
    for file in folder.glob("*.py"):
        if is_ours(file):
            file.unlink()
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def is_ours(file: Path) -> bool:
    """Whether a file begins with our header."""
    return file.is_file() and file.read_text(encoding="utf-8", errors="replace").startswith(HEADER.partition("{")[0])


@lru_cache(maxsize=1)
def files() -> dict[str, str]:
    """File name -> text of everything in `custom_generate/`."""
    sources = needed_modules()
    stamp = sources_stamp(sources)
    name = f"refreshkv_{stamp}"
    found = {f"{flat(module)}.py": rewritten(module, text, name) for module, text in sources.items()}
    imports = "\n".join(f"    from .{flat(module)} import *" for module in sorted(sources))
    found["generate.py"] = GENERATE.format(imports=imports, name=name, entry=flat(ENTRY))
    modules = {f"{flat(module)}.py": module for module in sources} | {"generate.py": FOLDER}
    for file, text in found.items():
        header = HEADER.format(version=refreshkv.__version__, module=modules[file], stamp=stamp)
        found[file] = f"{header}\n{LICENCE}\n{text}"
    return {**found, "requirements.txt": REQUIREMENTS}


def sources_stamp(sources: dict[str, str]) -> str:
    """12 hexadecimal digits that identify these sources."""
    text = "\0".join(f"{module}\0{sources[module]}" for module in sorted(sources))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def needed_modules() -> dict[str, str]:
    """Name -> text of the modules that `ENTRY` imports, also within functions, and what these import."""
    found: dict[str, str] = {}
    waiting = [ENTRY]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = source_file(module).read_text(encoding="utf-8")
            waiting += [name for node in own_imports(ast.parse(found[module])) for name in imported(node)]
    return found


def source_file(module: str) -> Path:
    """The file of a module of this package."""
    path = ROOT.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def own_imports(tree: ast.Module) -> list[ast.ImportFrom]:
    """The statements that import from this package."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    return [node for node in nodes if (node.module or "").partition(".")[0] == "refreshkv"]


def imported(node: ast.ImportFrom) -> list[str]:
    """The modules that an import statement of ours names."""
    return sorted({_module_of(node, alias.name)[0] for alias in node.names})


def _module_of(node: ast.ImportFrom, name: str) -> tuple[str, bool]:
    """The module that `from node.module import name` needs, and whether the name is this module itself."""
    assert node.module is not None
    inner = f"{node.module}.{name}"
    is_module = source_file(inner).is_file()
    return (inner, True) if is_module else (node.module, False)


def flat(module: str) -> str:
    """The name of a module's file, without its ending."""
    return module.partition(".")[2].replace(".", "_")


def rewritten(module: str, text: str, name: str) -> str:
    """The text of a module as a file among the others, with names registered under `name` instead of "refreshkv"."""
    lines = text.splitlines()
    for node in sorted(own_imports(ast.parse(text)), key=lambda node: node.lineno, reverse=True):
        _replace(lines, node, _relative_imports(node))
    return _renamed(module, "\n".join(_guarded(lines)) + "\n", name)


def _relative_imports(node: ast.ImportFrom) -> list[str]:
    """The statements that import the same names from the files beside this one."""
    names: dict[str, list[str]] = {}
    for alias in node.names:
        module, is_module = _module_of(node, alias.name)
        if is_module:
            source, name, target = ".", flat(module), alias.asname or alias.name
        else:
            source, name, target = f".{flat(module)}", alias.name, alias.asname
        names.setdefault(source, []).append(f"{name} as {target}" if target else name)
    return [f"from {source} import {', '.join(imported)}" for source, imported in names.items()]


def _replace(lines: list[str], node: ast.ImportFrom, statements: list[str]) -> None:
    """Replaces one statement by others, and keeps its indentation and the comment behind it."""
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    indentation, comment = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
    new = [indentation + statement for statement in statements]
    new[0] += comment
    lines[first : last + 1] = new


def _guarded(lines: list[str]) -> list[str]:
    """The lines with imports of `OPTIONAL` in a `try` block, where transformers does not look for requirements."""
    found = []
    for line in lines:
        is_optional = line.startswith((f"import {OPTIONAL}", f"from {OPTIONAL}"))
        found += ["try:", f"    {line}", "except ImportError:", "    raise"] if is_optional else [line]
    return found


def _renamed(module: str, text: str, name: str) -> str:
    """The text with the names of operators and of the attention under `name`."""
    text = text.replace('"refreshkv::', f'"{name}::')
    if module == "refreshkv.attention.model_call":
        before = text
        text = text.replace('\nNAME = "refreshkv"\n', f'\nNAME = "{name}"\n')
        assert text != before, "the attention's name stands elsewhere"
    return text
