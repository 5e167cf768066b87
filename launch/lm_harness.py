"""The lm-evaluation-harness with the model `refreshkv`: tasks of the harness, under our strategies of decoding.

    refreshkv lm-eval --model refreshkv --model_args pretrained=DIR_OR_HUB_ID,strategy=select:2:4bit,budget=0.125 \\
        --tasks NAME,... [options of lm_eval]

The harness has no way for a package to bring a model along, so this command registers it and then is `lm_eval`, with
all of its commands and options. docs/evaluation.md lists what the model takes.
"""

import sys

from refreshkv import cli


def main(arguments: list[str]) -> None:
    from lm_eval.__main__ import cli_evaluate

    import refreshkv.evaluation.harness.model  # noqa: F401  # registers the model

    sys.argv = ["refreshkv lm-eval", *arguments]
    cli_evaluate()


if __name__ == "__main__":
    cli.run(main, extra="lm-eval")
