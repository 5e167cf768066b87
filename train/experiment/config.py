"""The settings of an experiment: one YAML file, whose sections are the fields of `ExperimentConfig`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from refreshkv.config import RefreshConfig
from refreshkv.data.config import DataConfig
from refreshkv.data.tasks.registry import build_tasks
from refreshkv.evaluation.perplexity.evaluation import check_last_tokens
from refreshkv.evaluation.strategies import Strategy, build_strategies
from refreshkv.evaluation.sweep.grid import Grid, load_grid
from refreshkv.ranges import COUNT, SEED, Range, show, validate_numbers
from refreshkv.settings import SettingsError, settings_from_dict, validate_name
from refreshkv.train.config import RunConfig

UNTRAINED = "none"
"""The arm that is the untrained base model; every study has it."""
PLAIN = "plain"
"""The arm of ordinary continued training, if there is one; other arms' full attention is compared with its."""
Fragment = dict[str, Any]
"""Sections of a training run's settings, as in its YAML file."""


@dataclass
class Arm:
    """One way to continue a base model's training, and the selections to evaluate under."""

    selections: list[str]
    """Names of `ExperimentConfig.selections` to evaluate under. The arm trains with the first."""
    settings: Fragment | None = None
    """Settings of the arm's runs, on top of the study's. None: the arm is not trained."""
    beside: str | None = None
    """Another arm, such as the same training with all weights beside adapters: a table says which share of its gain
    this arm reaches. Needs `tradeoff`. None: no such table."""


@dataclass
class Perplexity:
    """Evaluation on a study's prepared sequences: launch/evaluate.py --data."""

    last_tokens: int = 512
    """Tokens scored in each sequence; the tokens before are the prompt."""
    rows: int = 128
    split: Literal["train", "validation", "test"] = "test"
    strides: list[int] = field(default_factory=lambda: [10, 50])
    threshold: float | None = None
    """Adds the similarity schedule with this threshold and the study's `refresh.stride`; None adds nothing."""
    batch_size: int = 4

    def __post_init__(self) -> None:
        ranges = {"last_tokens": COUNT, "rows": COUNT, "strides": COUNT, "threshold": Range(-1e6, 1e6)}
        validate_numbers(self, {**ranges, "batch_size": COUNT}, "perplexity.")


@dataclass
class Tasks:
    """Evaluation of generated answers: launch/evaluate.py --tasks."""

    names: list[str]
    length: int
    """Tokens of prompt and answer."""
    strategies: list[str] = field(default_factory=list)
    """As in --strategies, with each selection of an arm. Empty: those of `grid`."""
    grid: str | None = None
    """YAML file, or a name in configs/grids, whose strategies have selections of their own: each arm is then evaluated
    once."""
    values: dict[str, Fragment] = field(default_factory=dict)
    """Task -> settings, as tasks.NAME.key=value of launch/evaluate.py."""
    examples: int = 100
    batch_size: int = 20
    mix_tasks: bool = False
    """Whether a batch may hold examples of several tasks, as --mix-tasks."""
    compile: bool = True
    """Whether a GPU compiles the decoding steps, as --compile."""

    def __post_init__(self) -> None:
        validate_numbers(self, {"length": COUNT, "examples": COUNT, "batch_size": COUNT}, "tasks.")
        if bool(self.strategies) == bool(self.grid):
            raise SettingsError("tasks needs either strategies or a grid")
        if self.grid:
            self.build_grid(self.grid)

    def build_grid(self, name: str) -> list[Strategy]:
        """The strategies of the grid with this name."""
        return load_grid(name, "tasks.grid").build_strategies()


@dataclass
class Tradeoff:
    """Evaluation of a grid's strategies on several texts: launch/sweep.py --grid."""

    grid: str
    """YAML file, or a name in configs/grids."""
    data: list[str]
    """Folders of prepared sequences, one for each text."""
    rows: int = 64
    last_tokens: int = 512
    split: Literal["train", "validation", "test"] = "test"
    batch_size: int = 4

    def __post_init__(self) -> None:
        validate_numbers(self, {"rows": COUNT, "last_tokens": COUNT, "batch_size": COUNT}, "tradeoff.")
        if not self.data:
            raise SettingsError("tradeoff.data must name one or more folders of prepared sequences")
        self.read_grid().build_strategies()

    def read_grid(self) -> Grid:
        """The grid's file."""
        return load_grid(self.grid, "tradeoff.grid")


@dataclass
class Study:
    """One base model, and the arms that continue its training on the same tokens."""

    base: Fragment
    """How launch/train.py trains the base model, on top of `settings`. With model.path only, that model is the base."""
    continued: Fragment
    """Settings of all arms' runs, on top of `settings`; an arm's own come last."""
    arms: list[str]
    settings: Fragment = field(default_factory=dict)
    """Settings of all runs: data, budget, ..."""
    start: str | None = None
    """Another study, whose base model the training of this one's starts from."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Values of training.seed; each arm is trained once with each, so that all arms see the same data and draws."""
    perplexity: Perplexity | None = None
    tasks: Tasks | None = None
    tradeoff: Tradeoff | None = None

    def __post_init__(self) -> None:
        validate_numbers(self, {"seeds": SEED})
        for name in ("seeds", "arms"):
            values = getattr(self, name)
            if twice := [value for value in values if values.count(value) > 1]:
                raise SettingsError(f"{name} has {twice[0]} twice: each would be the same work")


@dataclass
class ExperimentConfig:
    """All settings of an experiment. Raises `SettingsError` for those that cannot work, before anything runs."""

    output: str
    """Folder for runs, models and logs."""
    results: str
    """Folder for finished figures, tables and plots; small, and enough to continue on another machine."""
    selections: dict[str, Any]
    """Name -> fields of `RefreshConfig`."""
    arms: dict[str, Any]
    """Name -> `Arm`."""
    studies: dict[str, Any]
    """Name -> `Study`."""
    settings: Fragment = field(default_factory=dict)
    """Settings of all runs of all studies."""

    def __post_init__(self) -> None:
        for setting in ("arms", "studies", "selections"):
            for name, value in getattr(self, setting).items():
                validate_name(name, setting)
                if not isinstance(value, dict):
                    raise SettingsError(f"{setting}.{name} must be a section with keys, got {show(value)}")
        for name in ("output", "results"):
            if not getattr(self, name):
                raise SettingsError(f"{name} must name a folder")
        self.arms = {name: settings_from_dict(Arm, arm, f"arms.{name}.") for name, arm in self.arms.items()}
        self.studies = {name: settings_from_dict(Study, one, f"studies.{name}.") for name, one in self.studies.items()}
        for name, arm in self.arms.items():
            if not arm.selections:
                raise SettingsError(f"arms.{name}.selections must name one or more of {', '.join(self.selections)}")
            for selection in arm.selections:
                _check_known(f"arms.{name}.selections", selection, self.selections)
            if arm.beside is not None:
                _check_known(f"arms.{name}.beside", arm.beside, self.arms)
        for name, study in self.studies.items():
            self._check_study(name, study)

    def _check_study(self, name: str, study: Study) -> None:
        if study.perplexity is None and study.tasks is None and study.tradeoff is None:
            raise SettingsError(f"studies.{name} evaluates nothing: set perplexity, tasks or tradeoff")
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
            beside = self.arms[arm].beside
            if beside is not None and (beside not in study.arms or study.tradeoff is None):
                raise SettingsError(
                    f"arms.{arm}.beside={beside} needs that arm and a tradeoff in studies.{name}: add both, or leave "
                    "beside out"
                )
            if self.arms[arm].settings is not None:
                self.run_settings(name, arm, study.seeds[0], "model", "run")
        self._check_models(name, study)
        if UNTRAINED not in study.arms:
            raise SettingsError(f"studies.{name}.arms must have {UNTRAINED}, which the others are compared with")
        self._check_evaluations(name, study)

    def _check_models(self, name: str, study: Study) -> None:
        arms = [self.arms[arm].settings for arm in study.arms]
        for part in (self.settings, study.settings, study.base, study.continued, *arms):
            model = (part or {}).get("model")
            for key in ("revision", "trust_remote_code"):
                if isinstance(model, dict) and key in model:
                    raise SettingsError(
                        f"studies.{name}: experiments take no model.{key}: name a folder whose model needs neither"
                    )

    def data(self, study: str) -> Fragment:
        """The `data` section of the study's runs."""
        data = merge(self.settings, self.studies[study].settings).get("data", {})
        if not isinstance(data, dict):
            raise SettingsError(f"studies.{study}.settings.data must be a section with keys, got {show(data)}")
        return data

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
        if study.tradeoff is not None:
            check_last_tokens(study.tradeoff.last_tokens, settings_from_dict(DataConfig, self.data(name)).row_length)
        if study.tasks is not None:
            build_tasks(study.tasks.names, study.tasks.values, length=study.tasks.length)
            # a grid has checked its own
            build_strategies(study.tasks.strategies, self.refresh(name, self.arms[study.arms[0]].selections[0]))

    def refresh(self, study: str, selection: str) -> RefreshConfig:
        """The study's budget and stride with the named selection."""
        merged = merge(self.settings, self.studies[study].settings, {"refresh": self.selections[selection]})
        return settings_from_dict(RefreshConfig, merged["refresh"], f"selections.{selection}.")

    def base_settings(self, study: str, start: str | None, output: str) -> Fragment:
        """The complete settings of the base model's run. start: folder of the model that it continues, if any."""
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
    """Merges settings section by section; later fragments override earlier ones."""
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
