"""The size of functions and calls, everywhere but in kernels and at the boundaries of operators."""

import ast

from tests.package.sources import complexity, functions, is_kernel, is_operator, modules

MOST_LINES, MOST_BRANCHES, MOST_ARGUMENTS = 60, 15, 8


def outside_kernels():
    for module, tree in modules().items():
        for name, function in functions(tree):
            if not is_kernel(function):
                yield f"{module}.{name}", function


def test_functions_are_short():
    lengths = {name: function.end_lineno - function.lineno + 1 for name, function in outside_kernels()}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_functions_are_simple():
    found = {name: complexity(function) for name, function in outside_kernels()}
    assert {name: branches for name, branches in found.items() if branches > MOST_BRANCHES} == {}


def test_calls_have_few_positional_arguments():
    """Launches of kernels and calls of operators are exempt: torch and Triton want their arguments flat."""
    operators = {
        function.name for tree in modules().values() for _, function in functions(tree) if is_operator(function)
    }
    found = []
    for module, tree in modules().items():
        inside = {id(node) for _, function in functions(tree) if is_operator(function) for node in ast.walk(function)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or len(node.args) <= MOST_ARGUMENTS or id(node) in inside:
                continue
            name = ast.unparse(node.func).rpartition(".")[2]
            if not isinstance(node.func, ast.Subscript) and name not in {*operators, "apply", "save_for_backward"}:
                found.append(f"{module}:{node.lineno} {ast.unparse(node.func)} with {len(node.args)}")
    assert found == []
