"""What an experiment compares: one YAML file, its sections the fields of `ExperimentConfig`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from refreshkv.config import RefreshConfig
from refreshkv.data.config import DataConfig
from refreshkv.data.tasks.registry import build_tasks
from refreshkv.evaluation.perplexity import check_last_tokens
from refreshkv.evaluation.strategies import build_decodings
from refreshkv.settings import SettingsError, settings_from_dict
from refreshkv.train.config import RunConfig

UNTRAINED = "none"
"""The arm that is the base model itself; every study has it."""
Fragment = dict[str, Any]
"""Some sections of a run's settings, as in its YAML file."""


@dataclass
class Arm:
    """One way to continue a base model's training, and how its models are evaluated."""

    selections: list[str]
    """Names of `ExperimentConfig.selections` to evaluate under. The first one is also what the arm trains with."""
    settings: Fragment | None = None
    """Settings of its runs, beside the study's. None: not trained."""


@dataclass
class Perplexity:
    """Evaluation on the rows of a study: launch/evaluate.py --data."""

    last_tokens: int = 512
    """Tokens scored per row; all before them is the prompt."""
    rows: int = 128
    split: Literal["train", "validation", "test"] = "test"
    strides: list[int] = field(default_factory=lambda: [10, 50])
    threshold: float | None = None
    """Also the similarity schedule, with this threshold and `refresh.stride` of the study's settings."""
    batch_size: int = 4


@dataclass
class Tasks:
    """Evaluation by generated answers: launch/evaluate.py --tasks."""

    names: list[str]
    length: int
    """Tokens of prompt and answer."""
    strategies: list[str]
    values: dict[str, Fragment] = field(default_factory=dict)
    """Settings of single tasks, as tasks.NAME.key of launch/evaluate.py."""
    examples: int = 100
    batch_size: int = 20


@dataclass
class Study:
    """One base model, and the arms that continue its training on the same tokens."""

    base: Fragment
    """How the base model is trained (launch/train.py), beside `settings`. Only model.path: it is taken as it is."""
    continued: Fragment
    """How all arms are trained, beside `settings` and their own."""
    arms: list[str]
    settings: Fragment = field(default_factory=dict)
    """Settings of all runs: rows, budget, ..."""
    start: str | None = None
    """Another study whose base model is where this one's starts."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Each arm is trained once with each: training.seed, so the same rows and draws in all arms."""
    perplexity: Perplexity | None = None
    tasks: Tasks | None = None


@dataclass
class ExperimentConfig:
    """Everything an experiment depends on. Raises `SettingsError` for what cannot work, before anything is run."""

    output: str
    """Folder of runs, models and logs."""
    results: str
    """Folder of the finished figures, their table and plot; small, and all that is needed to go on elsewhere."""
    selections: dict[str, Any]
    """Name -> fields of `RefreshConfig`."""
    arms: dict[str, Any]
    """Name -> `Arm`."""
    studies: dict[str, Any]
    """Name -> `Study`."""
    settings: Fragment = field(default_factory=dict)
    """Settings of all runs of all studies."""

    def __post_init__(self) -> None:
        self.arms = {name: settings_from_dict(Arm, arm, f"arms.{name}.") for name, arm in self.arms.items()}
        self.studies = {name: settings_from_dict(Study, one, f"studies.{name}.") for name, one in self.studies.items()}
        for name, arm in self.arms.items():
            if not arm.selections:
                raise SettingsError(f"arms.{name}.selections must name one or more of {', '.join(self.selections)}")
            for selection in arm.selections:
                _check_known(f"arms.{name}.selections", selection, self.selections)
        for name, study in self.studies.items():
            self._check_study(name, study)

    def _check_study(self, name: str, study: Study) -> None:
        if study.perplexity is None and study.tasks is None:
            raise SettingsError(f"studies.{name} evaluates nothing: set perplexity or tasks")
        if not study.seeds:
            raise SettingsError(f"studies.{name}.seeds must hold one or more numbers")
        self._check_data(name)
        passed = [name]
        while (start := self.studies[passed[-1]].start) is not None:
            _check_known(f"studies.{passed[-1]}.start", start, self.studies)
            if start in passed:
                raise SettingsError(f"studies.{passed[-1]}.start comes back to {start}: one study must start anew")
            passed.append(start)
        for arm in study.arms:
            _check_known(f"studies.{name}.arms", arm, self.arms)
            if self.arms[arm].settings is not None:
                self.run_settings(name, arm, study.seeds[0], "model", "run")
        if UNTRAINED not in study.arms:
            raise SettingsError(f"studies.{name}.arms must have {UNTRAINED}, which the others are compared with")
        self._check_evaluations(name, study)

    def data(self, study: str) -> Fragment:
        """The `data` section of the study's runs."""
        return merge(self.settings, self.studies[study].settings).get("data", {})

    def _check_data(self, name: str) -> None:
        data = self.data(name)
        if "folder" not in data:
            raise SettingsError(f"studies.{name}.settings.data.folder must name the folder of its rows")
        settings_from_dict(DataConfig, data, f"studies.{name}.settings.data.")
        for other in self.studies:
            if self.data(other).get("folder") == data["folder"] and self.data(other) != data:
                raise SettingsError(f"studies.{name} and {other} have other settings of the same {data['folder']}")
        for part in ("base", "continued"):
            if "data" in getattr(self.studies[name], part):
                raise SettingsError(f"studies.{name}.{part}.data: put it into settings, which all its runs share")

    def _check_evaluations(self, name: str, study: Study) -> None:
        if study.perplexity is not None:
            length = settings_from_dict(DataConfig, self.data(name)).row_length
            check_last_tokens(study.perplexity.last_tokens, length)
        if study.tasks is not None:
            build_tasks(study.tasks.names, study.tasks.values, length=study.tasks.length)
            build_decodings(study.tasks.strategies, self.refresh(name, self.arms[study.arms[0]].selections[0]))

    def refresh(self, study: str, selection: str) -> RefreshConfig:
        """The study's budget and stride with the selection named."""
        merged = merge(self.settings, self.studies[study].settings, {"refresh": self.selections[selection]})
        return settings_from_dict(RefreshConfig, merged["refresh"], f"selections.{selection}.")

    def base_settings(self, study: str, start: str | None, output: str) -> Fragment:
        """The complete settings of the base model's run. start: folder of the model that it goes on from, if any."""
        settings = merge(self.settings, self.studies[study].settings, self.studies[study].base)
        path = {} if start is None else {"model": {"path": start}}
        return _checked(merge(settings, path, {"training": {"output": output}, "simulation": {"pattern": "off"}}))

    def run_settings(self, study: str, arm: str, seed: int, base: str, output: str) -> Fragment:
        """The complete settings of one run. base: folder of the base model."""
        refresh = {"refresh": self.refresh(study, self.arms[arm].selections[0]).to_dict()}
        own = {"model": {"path": base}, "training": {"output": output, "seed": seed}}
        fragments = [self.studies[study].settings, self.studies[study].continued, refresh, self.arms[arm].settings, own]
        return _checked(merge(self.settings, *fragments))


def merge(*fragments: Fragment | None) -> Fragment:
    """One set of settings; later ones win, section by section."""
    merged: Fragment = {}
    for fragment in fragments:
        for key, value in (fragment or {}).items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merge(merged[key], value) if both else value
    return merged


def _checked(settings: Fragment) -> Fragment:
    settings_from_dict(RunConfig, settings)
    return settings


def _check_known(setting: str, name: str, known: dict[str, Any]) -> None:
    if name not in known:
        raise SettingsError(f"{setting}: there is no {name!r}; known here: {', '.join(known)}")
