"""The model card of an exported checkpoint: what it is, how it was trained, what that changed, how to use it."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml

from refreshkv import __version__, tables
from refreshkv.config import NEVER
from refreshkv.data.config import DataConfig
from refreshkv.data.folder import INFO_FILE
from refreshkv.evaluation.perplexity.report import load_report, markdown_table
from refreshkv.reading import read_own_json
from refreshkv.train.config import RunConfig
from refreshkv.train.run_folder import State

TAGS = ["refreshkv", "kv-cache", "long-context"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

SHOWN_TRAINING = (
    "dtype",
    "global_batch",
    "learning_rate",
    "lr_schedule",
    "warmup_steps",
    "weight_decay",
    "betas",
    "max_grad_norm",
    "seed",
)
"""Settings of `training` that the weights depend on. The others name folders, or decide when to log and to save."""

INTRODUCTION = """\
# {name}

{origin} for decoding from a small KV cache that is chosen anew every few tokens (RefreshKV). The
schedule is saved in `config.json` under `refreshkv`. With `trust_remote_code=True` transformers decodes with it, by the
code in `custom_generate/`; without, it is an ordinary transformers model with full attention."""

USAGE = """\
## Usage

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{name}"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", trust_remote_code=True)

inputs = tokenizer("The text to go on with", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens={new_tokens})
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

`trust_remote_code=True` runs the code in `custom_generate/`, which refreshkv {version} put there. With refreshkv
installed the same is `refreshkv.generate(AutoModelForCausalLM.from_pretrained(name{code}), **inputs)`, and no code
{other} is run. A server with OpenAI's interface: `transformers serve --trust-remote-code {name}`."""

ADAPTER_USAGE = """\
## Usage

These are adapters: they need their base model, {base}.

```python
import refreshkv
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

name = "{name}"
tokenizer = AutoTokenizer.from_pretrained(name)
base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto"{how})
model = PeftModel.from_pretrained(base, name).get_base_model()
refresh = refreshkv.RefreshConfig.from_dict(AutoConfig.from_pretrained(name).refreshkv)

inputs = tokenizer("The text to go on with", return_tensors="pt")
output = refreshkv.generate(model, **inputs, refresh=refresh, max_new_tokens={new_tokens})
print(tokenizer.decode(output[0], skip_special_tokens=True))
```"""

CITATION = """\
## Citation

```bibtex
@inproceedings{xu2025refreshkv,
  title = {RefreshKV: Updating Small KV Cache During Long-form Generation},
  author = {Xu, Fangyuan and Goyal, Tanya and Choi, Eunsol},
  booktitle = {Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics
               (Volume 1: Long Papers)},
  pages = {24878--24893},
  year = {2025},
  doi = {10.18653/v1/2025.acl-long.1211}
}
```"""


def model_card(
    run: RunConfig, state: State, name: str, report: str | Path | None = None, is_adapter: bool = False
) -> str:
    """The README.md of a checkpoint's model: markdown with the Hub's front matter.

    Args:
        run, state: the checkpoint's settings, and how far it came.
        name: the model's name, which the usage example gives to `from_pretrained`.
        report: folder of an evaluation whose table the card shows; None for no table.
        is_adapter: the card is of adapters alone.

    Raises `SettingsError` if that folder holds no report.
    """
    trained = f"Trained, from {_base(run)}," if run.model.path and _is_hub_id(run.model.path) else "Trained"
    parts = [_front_matter(run, is_adapter), INTRODUCTION.format(name=name, origin=trained)]
    if report is not None:
        parts.append(_evaluation(load_report(report, "--report")))
    parts += [_settings(run, state), _data(run, state)]
    usage = ADAPTER_USAGE if is_adapter else USAGE
    base = run.model.path if run.model.path and _is_hub_id(run.model.path) else "BASE"
    new_tokens = min(256, run.data.row_length // 2)
    how = "".join(f", {name}={value!r}" for name, value in run.model.origin.settings().items())
    own = run.model.trust_remote_code
    code, other = (", trust_remote_code=True", "but the model's own") if own else ("", "of the model's")
    parts.append(
        usage.format(name=name, base=base, how=how, code=code, other=other, version=__version__, new_tokens=new_tokens)
    )
    return "\n\n".join([*parts, CITATION]) + "\n"


def _front_matter(run: RunConfig, is_adapter: bool) -> str:
    library = "peft" if is_adapter else "transformers"
    values: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": TAGS}
    if run.model.path and _is_hub_id(run.model.path):
        values["base_model"] = run.model.path
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _base(run: RunConfig) -> str:
    """The Hub id of the model that was trained further, and the revision that was asked for."""
    return f"{run.model.path}" + (f" (revision {run.model.revision})" if run.model.revision else "")


def _is_hub_id(path: str) -> bool:
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def _evaluation(report: dict[str, Any]) -> str:
    measured = report["protocol"]
    warnings = [f"**Warning:** {text}." for text in report["evaluation"]["warnings"]]
    return "\n\n".join(
        [
            "## Evaluation",
            markdown_table(report),
            *warnings,
            f"Perplexity of the last {measured['last tokens']:,} tokens of {measured['rows']:,} rows of "
            f"{measured['row length']:,} tokens ({measured['split']} split). K: tokens in the small cache. Stride: "
            "steps between two decision steps. Ratio and gap: to full attention of the same model. Bytes read: keys "
            "and values that a decoding step reads, of those that full attention reads.",
        ]
    )


def _settings(run: RunConfig, state: State) -> str:
    training = {key: getattr(run.training, key) for key in SHOWN_TRAINING}
    if run.training.adapter is not None:
        training |= {f"adapter {name}": value for name, value in dataclasses.asdict(run.training.adapter).items()}
    if run.model.quantization is not None:
        training["base model's weights"] = run.model.quantization
    steps = {"steps": f"{state.step:,} of {run.training.steps:,}", "row_length": run.data.row_length}
    parallel = {"ranks": state.world_size, "ZeRO stage": state.zero_stage}
    simulation = dataclasses.asdict(run.simulation)
    if run.simulation.pattern != "whole":
        del simulation["prompt_length"], simulation["select_stride"], simulation["budget"]
    if run.simulation.pattern == "off":
        simulation = {"pattern": "off"}
    return "\n\n".join(
        [
            "## Settings",
            "Schedule and selection, the defaults when generating:",
            _table({key: _never(value) for key, value in run.refresh.to_dict().items()}),
            "Simulated in training:",
            _table({key: _never(value) for key, value in simulation.items()}),
            "Training:",
            _table({**steps, **training, **parallel}),
        ]
    )


def _never(value: Any) -> Any:
    if isinstance(value, list):
        return [_never(item) for item in value]
    return "never" if value == NEVER else value


def _data(run: RunConfig, state: State) -> str:
    values = {
        "source": _source(run.data),
        "rows trained on": f"{state.step * run.training.global_batch:,} of {run.data.row_length:,} tokens",
        "tokens trained on": f"{state.tokens:,}",
    }
    splits = _prepared_splits(run.data.folder, state.rows)
    if splits:
        values["rows prepared"] = ", ".join(f"{counts['rows']:,} {split}" for split, counts in splits.items())
    return f"## Data\n\n{_table(values)}"


def _source(data: DataConfig) -> str:
    """The source of the data, without the folders of the machine that read it."""
    path = data.path if _is_hub_id(data.path) else Path(data.path).name
    extras = [
        data.name,
        ", ".join(data.tasks or ()),
        _file_names(data.data_files),
        f"split {data.split}" if path != data.path or data.name else None,
    ]
    return ", ".join([path, *(extra for extra in extras if extra)])


def _file_names(files: Any) -> str | None:
    if files is None:
        return None
    if isinstance(files, dict):
        return ", ".join(f"{split}: {_file_names(of_split)}" for split, of_split in files.items())
    return ", ".join(Path(file).name for file in ([files] if isinstance(files, str) else files))


def _prepared_splits(folder: str, fingerprint: str) -> dict[str, dict[str, int]] | None:
    """Counts of the prepared rows per split; None if the rows are gone, or are not those of this run."""
    try:
        info = read_own_json(Path(folder).expanduser() / INFO_FILE, "data.folder")
        return info["splits"] if info["fingerprint"] == fingerprint else None
    except (ValueError, KeyError, TypeError):
        return None


def _table(values: dict[str, Any]) -> str:
    lines = [(key, _plain(value)) for key, value in values.items()]
    return tables.markdown_table([("setting", "value"), *lines], text_columns=2)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return "none" if value is None else str(value)
