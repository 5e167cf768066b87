"""The finished figures of an experiment, in one small JSON file; another machine can continue from it."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from refreshkv.config import RefreshConfig
from refreshkv.files import write_json
from refreshkv.reading import read_json
from refreshkv.settings import SettingsError, settings_from_dict, settings_to_dict
from refreshkv.train.config import RunConfig, current_names
from refreshkv.train.experiment.config import ExperimentConfig, Perplexity, Tasks
from refreshkv.train.experiment.jobs import Job, Report, base_is_given, base_model, base_name
from refreshkv.train.run_folder import FREE_TO_CHANGE, flat_settings

RESULTS_FILE, LOCK_FILE = "results.json", ".results.lock"
KINDS = ("perplexity", "tasks")
PARTS = 16
"""The file keeps losses as means over this many equal parts of the scored tokens."""
IMMATERIAL = {*FREE_TO_CHANGE, "batch_size"}
"""Settings that change how the work is done but not its results."""


class Results:
    """Figures by the names of their reports, in results.json."""

    def __init__(self, config: ExperimentConfig):
        """Raises `SettingsError` for figures of other settings, or of another base model than the experiment's."""
        self._config, self._path = config, Path(config.results, RESULTS_FILE)
        if self._path.with_name("tables.md").exists() and not self._path.exists():
            raise SettingsError(
                f"results={config.results} holds a tables.md that no experiment has written (no {RESULTS_FILE}): move "
                "it away, or choose another folder for results"
            )
        self.entries = self._read()
        for name, entry in self.entries.items():
            if self._is_about(entry) and _normal(entry["settings"]) != _normal(self._settings(entry)):
                raise SettingsError(
                    f"{self._path} has {name} with other settings than the experiment's: set them back, or choose "
                    "another folder for results and output"
                )
        for study in config.studies:
            self._check_base(study, digest(base_model(config, study)))

    def check_bases(self, jobs: list[Job]) -> None:
        """Raises `SettingsError` if a job would train a base model again that finished figures come from."""
        for study in self._config.studies:
            if any(job.name == base_name(study) for job in jobs) and self._bases(study):
                raise SettingsError(
                    f"{self._path} has figures of {study}, whose base model is not here: copy it to "
                    f"{base_model(self._config, study)}, or choose another folder for results"
                )

    def add(self, job: Job) -> None:
        """Adds the reports of a finished job to the file, beside those that other processes have added."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._path.with_name(LOCK_FILE)):
            self.entries |= self._read()
            for report in job.reports:
                entry = self._entry(report)
                self._check_base(report.study, entry["base model"])
                self._check_rows(entry)
                self.entries[report.name] = entry
            write_json(self._path, self.entries, indent=1)

    def _read(self) -> dict[str, dict[str, Any]]:
        if not os.path.lexists(self._path):
            return {}
        entries = read_json(self._path, "results")
        if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
            raise SettingsError(
                f"results: {self._path} does not hold an experiment's figures: move it away, or choose another folder"
            )
        return entries

    def _is_about(self, entry: dict[str, Any]) -> bool:
        """Whether the experiment still has the entry's study, arm, selection and kind of evaluation."""
        config, study = self._config, self._config.studies.get(entry["study"])
        if study is None or entry["arm"] not in config.arms or entry["selection"] not in config.selections:
            return False
        return getattr(study, entry["kind"]) is not None

    def _bases(self, study: str) -> set[str]:
        return {e["base model"] for e in self.entries.values() if e["study"] == study and e["base model"]}

    def _check_base(self, study: str, found: str | None) -> None:
        if found and self._bases(study) - {found}:
            raise SettingsError(
                f"{self._path} has figures of {study} from another base model than {base_model(self._config, study)}: "
                "gaps of different models do not compare; copy that one here, or choose another folder for results"
            )

    def _check_rows(self, entry: dict[str, Any]) -> None:
        others = {e.get("rows") for e in self.entries.values() if e["study"] == entry["study"]} - {None}
        if entry.get("rows") and others - {entry["rows"]}:
            raise SettingsError(
                f"{self._path} has figures of {entry['study']} on other rows: copy those here, or choose another "
                "folder for results"
            )

    def _entry(self, report: Report) -> dict[str, Any]:
        found = json.loads(report.path.read_text())
        entry = {name: getattr(report, name) for name in ("study", "arm", "seed", "selection", "kind")}
        entry["settings"] = self._settings(entry)
        entry["base model"] = digest(base_model(self._config, report.study))
        entry |= {name: found[name] for name in ("date", "hardware", "versions")}
        if report.kind == "perplexity":
            entry["rows"] = found["protocol"]["fingerprint"]
            entry["results"] = {result["name"]: _brief(result) for result in found["evaluation"]["results"]}
        else:
            entry["results"] = found["results"]
        return entry

    def _settings(self, entry: dict[str, Any]) -> dict[str, Any]:
        """All settings that a result depends on: the base's run, its own run and the evaluation, without folders."""
        config, study, arm, seed = self._config, entry["study"], entry["arm"], entry["seed"]
        settings: dict[str, Any] = {"base": _base_settings(config, study)}
        if seed is not None:
            settings["run"] = config.run_settings(study, arm, seed, "", "")
        settings["refresh"] = config.refresh(study, entry["selection"]).to_dict()
        settings[entry["kind"]] = vars(getattr(config.studies[study], entry["kind"]))
        return json.loads(json.dumps(settings))


def _is_entry(entry: Any) -> bool:
    """Whether a value of results.json has the parts that every entry has."""
    kinds = {"study": str, "arm": str, "selection": str, "kind": str, "settings": dict, "results": (dict, list)}
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), kind) for name, kind in kinds.items()):
        return False
    others = {"seed": (int, type(None)), "base model": (str, type(None)), "rows": (str, type(None))}
    return entry["kind"] in KINDS and all(isinstance(entry.get(name), kind) for name, kind in others.items())


def _base_settings(config: ExperimentConfig, study: str) -> Any:
    """The settings of the base's run and of the run before it; or the path of a given model."""
    if base_is_given(config, study):
        return str(base_model(config, study))
    start = config.studies[study].start
    start = None if start is None else _base_settings(config, start)
    return {"start": start, "run": config.base_settings(study, "" if start else None, "")}


def _normal(settings: Any) -> Any:
    """Settings with defaults filled in, without those in `IMMATERIAL`."""
    if not isinstance(settings, dict):
        return settings
    kinds = {"run": RunConfig, "refresh": RefreshConfig, "perplexity": Perplexity, "tasks": Tasks}
    normal = {}
    for name, values in settings.items():
        if name in kinds:
            values = current_names(values) if name == "run" else values
            values = flat_settings(settings_to_dict(settings_from_dict(kinds[name], values)))
            values = {key: value for key, value in values.items() if key not in IMMATERIAL}
        normal[name] = _normal(values) if name in ("base", "start") else values
    return normal


def digest(model: Path) -> str | None:
    """A hash of a model's weights; None if the folder has none."""
    files = sorted(model.glob("*.safetensors"))
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            while block := content.read(1 << 24):
                found.update(block)
    return found.hexdigest()[:32] if files else None


def _brief(result: dict[str, Any]) -> dict[str, Any]:
    losses, count = result["losses"], min(PARTS, len(result["losses"]))
    edges = [i * len(losses) // count for i in range(count + 1)]
    parts = [sum(losses[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    kept = {name: result[name] for name in ("perplexity", "loss", "standard_error", "effective_stride", "budget")}
    return {**kept, "losses in parts": [round(value, 5) for value in parts]}
