"""The lm-evaluation-harness with the model `refreshkv`: tasks of the harness, under our strategies of decoding.

    refreshkv lm-eval --model refreshkv --model_args pretrained=DIR_OR_HUB_ID,strategy=select:2:4bit,budget=0.125 \\
        --tasks NAME,... [options of lm_eval]

The harness has no way for a package to bring a model along, so this command registers it and then is `lm_eval`, with
all of its commands and options. docs/evaluation.md lists what the model takes.
"""

import sys
import traceback

from refreshkv import cli
from refreshkv.settings import SettingsError


def main(arguments: list[str]) -> None:
    from lm_eval.__main__ import cli_evaluate

    import refreshkv.evaluation.harness.model  # noqa: F401  # registers the model

    sys.argv = ["refreshkv lm-eval", *arguments]
    try:
        cli_evaluate()
    except ValueError as error:
        if isinstance(error, SettingsError) or not is_raised_by_harness(error):
            raise
        raise SettingsError(f"lm_eval: {' '.join(str(error).split())}") from error


def is_raised_by_harness(error: Exception) -> bool:
    """Whether the harness refuses its own arguments with this error, such as a task that it does not know."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").startswith("lm_eval.")


if __name__ == "__main__":
    cli.run(main, extra="lm-eval")
