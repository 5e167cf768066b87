"""How our sources hand a cache to a model: under the name that the installed transformers knows."""

import ast

from tests.package.sources import ROOT, modules


def test_no_call_names_the_cache_as_one_release_does():
    """`past_key_values=` is `cache=` since transformers 5.24, which warns of the older name; `as_keyword` knows."""
    scripts = [file for folder in ("benchmarks", "examples") for file in sorted((ROOT / folder).glob("*.py"))]
    trees = {**modules(), **{str(file): ast.parse(file.read_text(encoding="utf-8")) for file in scripts}}
    calls = [(name, node) for name, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [
        f"{name}:{call.lineno}" for name, call in calls for given in call.keywords if given.arg == "past_key_values"
    ]
    assert named == [] and len(scripts) > 10
