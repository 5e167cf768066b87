"""The recorded result of all families' trials, and the tables made from it: `refreshkv models`, docs/models.md."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from refreshkv.families.tiny import families
from refreshkv.families.trial import Outcome
from refreshkv.tables import column_table

RECORD = Path(__file__).with_name("record.json")
"""Written by `refreshkv models --try all --record`."""
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
"""The page of a checkout."""

HEADINGS = {
    "passes": "Families that pass",
    "refused": "Families that are refused",
    "not tried": "Families without a tiny model",
    "fails": "Families that fail",
}

INTRODUCTION = """# Models

Every family in transformers' table of causal language models is tried on a tiny random model, in float64 on the CPU:
an ordinary call and a simulation with a budget beyond the text against the model's own attention, decoding token by
token against simulation (both schedules, selecting steps, left padding), `generate`, gradients, and a saved and
reloaded model. A family passes, or is refused with the reason. The checks are in `refreshkv/families/trial.py`;
another release of transformers is tried with

```bash
refreshkv models --try all               # or names of model types
```

This page is written by `refreshkv models --try all --record` and compared with the trials in continuous integration.
*Layers* are those of the tiny model: *full* attention is refreshed, *sliding* windows and *recurrent* states (linear
attention, convolutions) stay in transformers' own cache layers, *empty* ones cache nothing.

- Attention sinks and a softcap go through the kernels ([which of them ran where](method.md#limits)). With values of
  another size than the keys, plain PyTorch computes the attention, on GPUs too: right, and several times slower than
  the kernels. `refreshkv doctor` says which form computes what.
- A model with recurrent layers takes no prefix store, no sequence parallelism, and no steps back (assisted decoding):
  each is refused in one line.
"""


def make_record(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """The record of outcomes by family, with the versions that they hold for."""
    names = families()
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
        "families": {name: {"model": names[name], **outcome._asdict()} for name, outcome in sorted(outcomes.items())},
    }


def load_record() -> dict[str, Any]:
    """The record in the package."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def outcomes_of(record: dict[str, Any]) -> dict[str, Outcome]:
    """The outcomes in a record, by family."""
    return {
        name: Outcome(**{field: values[field] for field in Outcome._fields})
        for name, values in record["families"].items()
    }


def text_table(record: dict[str, Any]) -> str:
    """What `refreshkv models` prints: a line for each family."""
    lines = [
        (name, values["result"], values["reason"] or values["layers"]) for name, values in record["families"].items()
    ]
    return f"{column_table(lines, text_columns=3)}\n{summary(record)}"


def summary(record: dict[str, Any]) -> str:
    """One line: how many families pass, and which versions were tried."""
    results = [values["result"] for values in record["families"].values()]
    counts = ", ".join(f"{results.count(result)} {result}" for result in HEADINGS if result in results)
    return f"{counts} of {len(results)} families (transformers {record['transformers']}, torch {record['torch']})"


def markdown_page(record: dict[str, Any]) -> str:
    """docs/models.md."""
    parts = [INTRODUCTION, f"{summary(record)}."]
    for result, heading in HEADINGS.items():
        chosen = {name: values for name, values in record["families"].items() if values["result"] == result}
        if chosen:
            parts.append(f"\n## {heading}\n\n{_markdown_table(chosen, result)}")
    return "\n".join(parts) + "\n"


def _markdown_table(chosen: dict[str, dict[str, str]], result: str) -> str:
    last = "layers" if result == "passes" else "reason"
    lines = [f"| model type | class | {last} |", "|---|---|---|"]
    for name, values in chosen.items():
        cell = values[last].replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{name}` | {values['model']} | {cell} |")
    return "\n".join(lines)
