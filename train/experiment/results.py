"""The finished figures of an experiment, in one small JSON file; another machine can continue from it."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from refreshkv.checksums import remembered
from refreshkv.config import RefreshConfig
from refreshkv.data.tasks.registry import build_tasks
from refreshkv.files import write_json
from refreshkv.identity import folder_identity
from refreshkv.reading import read_json, read_own_json
from refreshkv.settings import SettingsError, settings_from_dict, settings_to_dict
from refreshkv.train.config import RunConfig, current_names
from refreshkv.train.experiment.config import ExperimentConfig, Perplexity, Tasks, Tradeoff
from refreshkv.train.experiment.jobs import Job, Report, base_is_given, base_model, base_name
from refreshkv.train.run_folder import FREE_TO_CHANGE, flat_settings

RESULTS_FILE, LOCK_FILE = "results.json", ".results.lock"
PARTS = 16
"""The file keeps losses as means over this many equal parts of the scored tokens."""
IMMATERIAL = {*FREE_TO_CHANGE, "batch_size", "mix_tasks", "compile"}
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
            self._check_base(study, digest(base_model(config, study)), _rest(base_model(config, study)))

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
                self._check_base(report.study, entry["base model"], entry["base files"])
                self._check_rows(entry)
                self.entries[report.name] = entry
            write_json(self._path, self.entries, indent=1)

    def _read(self) -> dict[str, dict[str, Any]]:
        """The file's entries; {} if there is none. Raises `SettingsError` for a file with other content."""
        if not os.path.lexists(self._path):
            return {}
        try:
            entries = read_json(self._path, "results")
            for name, entry in entries.items():
                _validate_entry(name, entry)
            return entries
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split()).removeprefix("results: ") or type(error).__name__
            raise SettingsError(
                f"results: {self._path} holds no figures of an experiment ({reason}): restore it, or move it away to "
                "compute them anew"
            ) from None

    def _is_about(self, entry: dict[str, Any]) -> bool:
        """Whether the experiment still has the entry's study, arm, selection and kind of evaluation."""
        config, study = self._config, self._config.studies.get(entry["study"])
        if study is None or entry["arm"] not in config.arms or entry["selection"] not in config.selections:
            return False
        return getattr(study, entry["kind"]) is not None

    def _bases(self, study: str, part: str = "base model") -> set[str]:
        """The hashes of the base models that figures come from; earlier releases kept no "base files"."""
        return {e[part] for e in self.entries.values() if e["study"] == study and e.get(part)}

    def _check_base(self, study: str, found: str | None, files: str | None) -> None:
        """found, files: hashes of the base model's weights, and of its configuration and tokenizer; None without."""
        if (found and self._bases(study) - {found}) or (files and self._bases(study, "base files") - {files}):
            raise SettingsError(
                f"{self._path} has figures of {study} from another base model than {base_model(self._config, study)}: "
                "gaps of different models do not compare; copy that one here, or choose another folder for results"
            )

    def _check_rows(self, entry: dict[str, Any]) -> None:
        kind = (entry["study"], entry["kind"])  # a grid may be measured on other sequences
        others = {e.get("rows") for e in self.entries.values() if (e["study"], e["kind"]) == kind} - {None}
        if entry.get("rows") and others - {entry["rows"]}:
            raise SettingsError(
                f"{self._path} has figures of {entry['study']} on other rows: copy those here, or choose another "
                "folder for results"
            )

    def _entry(self, report: Report) -> dict[str, Any]:
        found = self._finished_report(report)
        entry = {name: getattr(report, name) for name in ("study", "arm", "seed", "selection", "kind")}
        entry["settings"] = self._settings(entry)
        entry["base model"] = digest(base_model(self._config, report.study))
        entry["base files"] = _rest(base_model(self._config, report.study))
        entry |= {name: found[name] for name in ("date", "hardware", "versions")}
        if report.kind == "tradeoff":
            entry["rows"] = " ".join(found["fingerprints"].values())
            entry["results"] = {"full attention": found["full attention"], "points": found["points"]}
        elif report.kind == "perplexity":
            entry["rows"] = found["protocol"]["fingerprint"]
            entry["results"] = {result["name"]: _brief(result) for result in found["evaluation"]["results"]}
        else:
            entry["results"] = found["results"]
        return entry

    def _finished_report(self, report: Report) -> dict[str, Any]:
        """The report of a finished evaluation. Raises `SettingsError` if it measured something else than the experiment
        now asks for, such as before its settings were changed."""
        try:
            found = read_own_json(report.path, "output")
            different = self._difference(report, found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
            raise SettingsError(
                f"output: {report.path} is not a report of launch/evaluate.py ({type(error).__name__}: {error}): "
                "remove its folder, and the experiment evaluates again"
            ) from None
        if different:
            raise SettingsError(
                f"output: {report.path} measured something else than the experiment's settings ask for ({different}): "
                "remove its folder, or choose another output"
            )
        return found

    def _difference(self, report: Report, found: dict[str, Any]) -> str | None:
        wanted = getattr(self._config.studies[report.study], report.kind)
        if report.kind == "tradeoff":
            settings = found["settings"]
            pairs = [("split", settings["split"], wanted.split), ("rows", settings["sequences"], wanted.rows)]
            pairs.append(("last tokens", found["last tokens"], wanted.last_tokens))
            names = [strategy.name for strategy in wanted.read_grid().build_strategies() if not strategy.is_full]
            pairs.append(("strategies", [point["name"] for point in found["points"]], names))
        elif report.kind == "tasks":
            labels = {label.removesuffix("-substitute"): entry["settings"] for label, entry in found["tasks"].items()}
            tasks = build_tasks(wanted.names, wanted.values, length=wanted.length)
            settings = {task.name: json.loads(json.dumps(task.settings())) for task in tasks}
            pairs = [("tasks", labels, settings), ("examples", found["settings"]["examples"], wanted.examples)]
            pairs.append(("scores", len(found["results"]), len(tasks) * len(found["strategies"])))  # all are there
        else:
            measured = found["protocol"]
            pairs = [(name, measured[name], getattr(wanted, name)) for name in ("split", "rows")]
            pairs.append(("last tokens", measured["last tokens"], wanted.last_tokens))
        return next((f"{name}: {there} there, {here} here" for name, there, here in pairs if there != here), None)

    def _settings(self, entry: dict[str, Any]) -> dict[str, Any]:
        """All settings that a result depends on: the base's run, its own run and the evaluation, without folders."""
        config, study, arm, seed = self._config, entry["study"], entry["arm"], entry["seed"]
        settings: dict[str, Any] = {"base": _base_settings(config, study)}
        if seed is not None:
            settings["run"] = config.run_settings(study, arm, seed, "", "")
        settings["refresh"] = config.refresh(study, entry["selection"]).to_dict()
        settings[entry["kind"]] = vars(getattr(config.studies[study], entry["kind"]))
        if entry["kind"] == "tradeoff":
            settings["tradeoff"] = _tradeoff_settings(config.studies[study].tradeoff)
        if (tasks := getattr(config.studies[study], entry["kind"])) and isinstance(tasks, Tasks) and tasks.grid:
            settings["grid"] = {one.name: one.settings for one in tasks.build_grid(tasks.grid)}
        return json.loads(json.dumps(settings))


def _tradeoff_settings(tradeoff: Tradeoff | None) -> dict[str, Any]:
    """What a grid's figures depend on: the grid's content in place of its name, and texts without their folders."""
    assert tradeoff is not None
    kept = {name: value for name, value in vars(tradeoff).items() if name not in IMMATERIAL}
    return {**kept, "grid": vars(tradeoff.read_grid()), "data": [Path(name).name for name in tradeoff.data]}


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
    return remembered("sha256 of all", files, lambda: _sha256(files)) if files else None


def _sha256(files: list[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            while block := content.read(1 << 24):
                found.update(block)
    return found.hexdigest()[:32]


def _rest(model: Path) -> str | None:
    """A hash of a model's configuration, without names and paths, and of its tokenizer; None without weights."""
    found = folder_identity(model)
    return None if found is None else found["rest"][:32]


def _validate_entry(name: str, entry: dict[str, Any]) -> None:
    """Raises an error for an entry of results.json that lacks a key or has another kind of value."""
    kinds = {"study": str, "arm": str, "selection": str, "kind": str, "settings": dict}
    kinds["results"] = list if entry["kind"] == "tasks" else dict
    for key, kind in kinds.items():
        if not isinstance(entry[key], kind):
            raise ValueError(f"{key} of {name} is {entry[key]!r}")
    if entry["kind"] not in ("perplexity", "tasks", "tradeoff"):
        raise ValueError(f"kind of {name} is {entry['kind']!r}")
    for key in ("base model", "seed"):
        if key not in entry:
            raise KeyError(key)


def _brief(result: dict[str, Any]) -> dict[str, Any]:
    losses, count = result["losses"], min(PARTS, len(result["losses"]))
    edges = [i * len(losses) // count for i in range(count + 1)]
    parts = [sum(losses[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    kept = {name: result[name] for name in ("perplexity", "loss", "standard_error", "effective_stride", "budget")}
    return {**kept, "losses in parts": [round(value, 5) for value in parts]}
