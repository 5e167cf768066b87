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

WITH_IMAGE = "+image"
"""Follows a family's name where its prompt had an image."""

IMAGES = """
## Prompts with an image

The text decoder of a model that reads images refreshes like any other; an image's tokens belong to the prompt. These
families were given a prompt with an image (`refreshkv/families/images.py`). With a budget beyond the text those that
pass generate what they generate by their own attention, with a small one what the simulation predicts. Others were
tried with text.

"""

INTRODUCTION = """# Models

Every family in transformers' tables of causal language models, and of models that read images and text, is tried on a
tiny random model with text alone, in float64 on the CPU: an ordinary call and a simulation with a budget beyond the
text against the model's own attention, decoding token by token against simulation (both schedules, selecting steps,
left padding), `generate`, gradients, and a saved and reloaded model. A family passes, or is refused with the reason.
The checks are in `refreshkv/families/trial.py`; another release of transformers is tried with

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
- A model with sliding-window layers decodes without compilation, so that a step takes the time of its launches.
- `refreshkv train` computes the loss from the output layer, and refuses families with more between decoder and logits
  than a linear layer and a softcap: a dense layer (BERT and its kin, ModernBERT), or a multiplier (Cohere, Granite,
  Falcon-H1). `simulate` in a trainer of your own uses the model's loss.
- MLA (DeepSeek, Kimi) caches one compressed vector a token instead of keys and values, and is refused: a small cache
  would need a selection by compressed keys, and kernels that attend to them with the projections absorbed.

Checkpoints with quantized weights decode with refreshing, as far as transformers loads them (`pytest
tests/test_quantized.py`, on CPUs; none was tried on a GPU):

| weights | here |
|---|---|
| nf4, int8 of bitsandbytes | decode as they are |
| int8, float8 of torchao | decode as they are (tried with torchao 0.18, which the tests do not install) |
| FP8 in blocks (DeepSeek, Qwen) | decode; without a GPU that computes with them they become ordinary weights |
| AWQ, GPTQ | not tried, for want of their packages: without them loading is refused, and the package is named |
"""


def make_record(outcomes: Mapping[str, Outcome], images: Mapping[str, Outcome]) -> dict[str, Any]:
    """The record of outcomes by family, of text and of prompts with an image, with the versions that they hold for."""
    names = families()

    def by_family(results: Mapping[str, Outcome]) -> dict[str, dict[str, str]]:
        return {name: {"model": names[name], **outcome._asdict()} for name, outcome in sorted(results.items())}

    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
        "families": by_family(outcomes),
        "images": by_family(images),
    }


def load_record() -> dict[str, Any]:
    """The record in the package."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def outcomes_of(record: dict[str, Any], what: str = "families") -> dict[str, Outcome]:
    """The outcomes in a record, by family; what: "families" for those of text, or "images"."""
    return {
        name: Outcome(**{field: values[field] for field in Outcome._fields}) for name, values in record[what].items()
    }


def text_table(record: dict[str, Any]) -> str:
    """What `refreshkv models` prints: a line for each family, and one for each that was given images."""
    lines = [
        (name + ending, values["result"], values["reason"] or values["layers"])
        for what, ending in (("families", ""), ("images", WITH_IMAGE))
        for name, values in record[what].items()
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
    parts.append(IMAGES + _markdown_table(record["images"], "images"))
    return "\n".join(parts) + "\n"


def _markdown_table(chosen: dict[str, dict[str, str]], result: str) -> str:
    last = {"passes": "layers", "images": "result"}.get(result, "reason")
    lines = [f"| model type | class | {last} |", "|---|---|---|"]
    for name, values in chosen.items():
        reason = values["reason"] and f": {values['reason']}"
        cell = values["result"] + reason if result == "images" else values[last]
        cell = cell.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{name}` | {values['model']} | {cell} |")
    return "\n".join(lines)
