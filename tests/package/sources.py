"""The project's source files as modules, and what their syntax trees say about imports, functions and calls."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("data", "train", "evaluation", "launch")
"""Folders of the top level that symbolic links make packages of refreshkv."""


@cache
def modules() -> dict[str, ast.Module]:
    """Module name -> syntax tree of every module of the package."""
    files = {file: file for file in ROOT.joinpath("refreshkv").rglob("*.py")}
    files = {file: ("refreshkv", *file.relative_to(ROOT / "refreshkv").parts) for file in files}
    files = {file: parts for file, parts in files.items() if parts[1] not in LINKED}
    for folder in LINKED:
        files |= {file: ("refreshkv", *file.relative_to(ROOT).parts) for file in ROOT.joinpath(folder).rglob("*.py")}
    found = {}
    for file, parts in sorted(files.items()):
        name = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        found[name] = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    return found


@cache
def imports() -> dict[str, set[str]]:
    """Module name -> the modules of the package that it imports, those inside its functions included."""
    return {name: set(_imported(name, tree)) - {name} for name, tree in modules().items()}


def _imported(importer: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules())
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer} has a relative import"
            for alias in node.names:
                if f"{node.module}.{alias.name}" in modules():
                    yield f"{node.module}.{alias.name}"
                elif node.module in modules():
                    yield node.module


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of nodes that reach each other (strongly connected components of more than one node)."""
    reached = {node: _reachable(graph, node) for node in graph}
    groups = {frozenset(other for other in reached[node] if node in reached[other]) for node in graph}
    return sorted(sorted(group) for group in groups if group)


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found, waiting = set(), list(graph[start])
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += graph[node]
    return found


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions and methods of a module, with the names of the classes and functions around them."""
    waiting: list[tuple[str, ast.AST]] = [("", tree)]
    while waiting:
        prefix, node = waiting.pop()
        for child in ast.iter_child_nodes(node):
            name = f"{prefix}{child.name}." if isinstance(child, (ast.FunctionDef, ast.ClassDef)) else prefix
            if isinstance(child, ast.FunctionDef):
                yield name.removesuffix("."), child
            waiting.append((name, child))


def is_operator(function: ast.FunctionDef) -> bool:
    """Whether a decorator makes the function a Triton kernel or (part of) an operator of torch."""
    marks = ("jit", "custom_op", "triton_op", "register_fake", "register_autograd", "register_kernel", "impl")
    names = (ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in function.decorator_list)
    return any(name.rpartition(".")[2] in marks for name in names)


def is_kernel(function: ast.FunctionDef) -> bool:
    """Whether the function is a Triton kernel, or a function of one."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def complexity(function: ast.FunctionDef) -> int:
    """McCabe's number of a function, as ruff's C901 counts it: 1, and 1 for each branch; nested functions included."""
    count = 1
    for node in ast.walk(function):
        if isinstance(node, (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.comprehension)):
            count += 1
        elif isinstance(node, ast.Match):
            count += len(node.cases)
        elif isinstance(node, (ast.FunctionDef, ast.Lambda)) and node is not function:
            count += isinstance(node, ast.FunctionDef)
    return count
