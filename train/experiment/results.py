"""The finished figures of an experiment: one small JSON file that grows; it is enough to go on elsewhere."""

import json
import os
from pathlib import Path
from typing import Any

from refreshkv.settings import SettingsError
from refreshkv.train.experiment.config import ExperimentConfig
from refreshkv.train.experiment.pieces import Piece, Report, base_model

RESULTS_FILE = "results.json"
PARTS = 16
"""The scored tokens' losses are kept as means over so many equal parts."""


class Results:
    """Figures by the names of their reports."""

    def __init__(self, config: ExperimentConfig):
        self._config, self._path = config, Path(config.results, RESULTS_FILE)
        self.entries: dict[str, dict[str, Any]] = json.loads(self._path.read_text()) if self._path.exists() else {}
        for name, entry in self.entries.items():
            study, arm, *rest = name.split("/")
            if study in config.studies and arm in config.arms and entry["settings"] != self._settings(entry):
                raise SettingsError(
                    f"{self._path} has {name} with other settings than the experiment's: set them back, or choose "
                    "another folder for results and output"
                )

    def add(self, piece: Piece) -> None:
        """Takes in the reports of a finished piece; they are on disk when this returns."""
        for report in piece.reports:
            self.entries[report.name] = self._entry(report)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps(self.entries, indent=1) + "\n")
        os.replace(temporary, self._path)

    def _entry(self, report: Report) -> dict[str, Any]:
        found = json.loads(report.path.read_text())
        entry = {name: getattr(report, name) for name in ("study", "arm", "seed", "selection", "kind")}
        entry["settings"] = self._settings(entry)
        entry |= {name: found[name] for name in ("date", "hardware", "versions")}
        if report.kind == "perplexity":
            entry["rows"] = found["protocol"]["fingerprint"]
            entry["results"] = {result["name"]: _brief(result) for result in found["evaluation"]["results"]}
        else:
            entry["results"] = found["results"]
        return entry

    def _settings(self, entry: dict[str, Any]) -> dict[str, Any]:
        """All that a result depends on: the base's run, its own, and the evaluation; without the names of folders."""
        config, study, arm, seed = self._config, entry["study"], entry["arm"], entry["seed"]
        settings: dict[str, Any] = {"base": _base_settings(config, study)}
        if seed is not None:
            settings["run"] = config.run_settings(study, arm, seed, "", "")
        settings["refresh"] = config.refresh(study, entry["selection"]).to_dict()
        settings[entry["kind"]] = vars(getattr(config.studies[study], entry["kind"]))
        return json.loads(json.dumps(settings))


def _base_settings(config: ExperimentConfig, study: str) -> Any:
    one = config.studies[study]
    if set(one.base) == {"model"} and "path" in one.base["model"]:
        return str(base_model(config, study))
    start = None if one.start is None else _base_settings(config, one.start)
    return [start, config.base_settings(study, "" if start else None, "")]


def _brief(result: dict[str, Any]) -> dict[str, Any]:
    losses, count = result["losses"], min(PARTS, len(result["losses"]))
    edges = [i * len(losses) // count for i in range(count + 1)]
    parts = [sum(losses[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    kept = {name: result[name] for name in ("perplexity", "loss", "standard_error", "effective_stride", "budget")}
    return {**kept, "losses in parts": [round(value, 5) for value in parts]}
