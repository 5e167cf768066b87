"""The scripts of `launch/` as modules of the tests' own process: starting one imports everything anew, for seconds."""

import importlib.util
from pathlib import Path
from types import ModuleType

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def load_script(name: str) -> ModuleType:
    """`launch/NAME.py`, read anew; its `main` takes what follows it on a command line."""
    spec = importlib.util.spec_from_file_location(f"launch_{name}", LAUNCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
