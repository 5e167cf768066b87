"""The jobs of an experiment: the scripts of launch/ that each one runs, and the jobs that it waits for."""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml

from refreshkv.data.config import DataConfig
from refreshkv.data.folder import INFO_FILE
from refreshkv.files import write_text
from refreshkv.reading import read_own_json
from refreshkv.settings import SettingsError, settings_from_dict, settings_to_dict
from refreshkv.train.checkpoint_reader import is_trained
from refreshkv.train.config import RunConfig
from refreshkv.train.experiment.config import ExperimentConfig, Fragment, Tradeoff, merge
from refreshkv.train.export_folder import is_export
from refreshkv.train.run_folder import FREE_TO_CHANGE, RUN_FILE, changed_setting, flat_settings, read_run


@dataclass(frozen=True)
class Command:
    """One script to run, unless its result exists."""

    script: str
    """Name of a file in launch/."""
    arguments: list[str]
    made: Path
    """The result: exists if and only if the command has finished, unless `is_made` looks closer."""
    config: tuple[Path, Fragment] | None = None
    """The script's --config: the YAML file to write, and its content."""
    begun: Path | None = None
    """Exists if and only if the command was started before: it is then continued with --resume."""
    micro_batches: int = 1
    """Micro-batches of a step, which the job's devices can share, each the same number."""
    serves: Path | None = None
    """Result of a later command; once it exists, this command is not needed."""
    is_made: Callable[[Path], bool] = Path.exists
    """Whether the result is there, whole, and made with these settings."""

    @property
    def finished(self) -> bool:
        return (self.serves is not None and self.serves.exists()) or self.is_made(self.made)

    def validate_begun(self) -> None:
        """Raises `SettingsError` if the command is a run that was begun with other settings than those of now."""
        if self.config is None or self.begun is None or not self.begun.is_file():
            return
        wanted = settings_from_dict(RunConfig, self.config[1])
        # the base model may lie elsewhere now; `Results` compares its weights
        changed = changed_setting(read_run(self.begun.parent), wanted, {*FREE_TO_CHANGE, "model.path"})
        if changed:
            name, before, now = changed
            raise SettingsError(
                f"{self.begun.parent} was begun with {name}={before!r}, the experiment has {now!r}: set it back, or "
                "choose another output"
            )

    def devices(self, available: list[str]) -> list[str]:
        """The devices to run on: as many of the available ones as divide the micro-batches evenly."""
        return available[: max((n for n in range(1, len(available) + 1) if self.micro_batches % n == 0), default=0)]

    def line(self, launch: Path) -> list[str]:
        """The command line, with the scripts in the folder `launch`. Writes the config file."""
        arguments = list(self.arguments)
        if self.config is not None:
            path, settings = self.config
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, yaml.safe_dump(settings, sort_keys=False))
            arguments += ["--config", str(path)]
        if self.begun is not None and self.begun.exists():
            arguments.append("--resume")
        return [sys.executable, str(launch / self.script), *arguments]


@dataclass(frozen=True)
class Report:
    """The file of one evaluation, and the model and selection that it evaluates."""

    path: Path
    study: str
    arm: str
    seed: int | None
    selection: str
    kind: str
    """perplexity, tasks or tradeoff."""

    @property
    def name(self) -> str:
        return report_name(self.study, self.arm, self.seed, self.selection, self.kind)


def report_name(study: str, arm: str, seed: int | None, selection: str, kind: str) -> str:
    return "/".join(str(part) for part in (study, arm, seed, selection, kind) if part is not None)


@dataclass(frozen=True)
class Job:
    """Commands that run one after another, on devices of their own."""

    name: str
    commands: list[Command]
    needs: list[str] = field(default_factory=list)
    """Names of the jobs that must be done first."""
    reports: list[Report] = field(default_factory=list)
    devices: Literal["none", "one", "all"] = "one"
    """How many devices the job takes."""

    @property
    def finished(self) -> bool:
        return all(command.finished for command in self.commands)

    @property
    def names(self) -> set[str]:
        """Names of the job's reports."""
        return {report.name for report in self.reports}


def validate_runs(jobs: list[Job]) -> None:
    """Raises `SettingsError` if a run of one of the jobs was begun with other settings."""
    for command in [command for job in jobs for command in job.commands]:
        command.validate_begun()


def plan(config: ExperimentConfig, known: set[str]) -> list[Job]:
    """The jobs that are left: those with reports whose names are not in `known`, after the jobs that they need.

    A base model is trained only if one of these jobs, or another base model, needs it.
    """
    evaluated = {study: [p for p in _study(config, study) if not known >= p.names] for study in config.studies}
    bases = {study: _base(config, study) for study in _in_order(config)}
    rows = {study: _rows(config, study) for study in config.studies}
    needed = _needed([job for jobs in evaluated.values() for job in jobs], list(bases.values()), list(rows.values()))
    jobs: dict[str, Job] = {}
    for study in _in_order(config):
        first = [job for job in (rows[study], bases[study]) if _is_left(job, needed)]
        jobs |= {job.name: job for job in [*first, *evaluated[study]]}
    _validate_finished(jobs.values(), [*rows.values(), *bases.values()])
    return [replace(job, needs=[need for need in job.needs if need in jobs]) for job in jobs.values()]


def _validate_finished(jobs: Iterable[Job], needed: list[Job]) -> None:
    """Raises `SettingsError` if a finished run or prepared rows, which would be used again, have other settings than
    the experiment's. needed: jobs that are left out of `jobs` because they have finished."""
    for job in [*jobs, *needed]:
        for command in job.commands:
            if command.config is not None and command.made.exists():
                different = _difference(command, command.config[1])
                if different:
                    raise SettingsError(
                        f"{command.made} was made with other settings than the experiment's ({different}): set them "
                        "back, or choose another folder"
                    )


def _difference(command: Command, settings: Fragment) -> str | None:
    """The first setting that what the command made has otherwise. Paths are not compared: folders may be moved."""
    if command.script == "train.py":
        if not (command.made / RUN_FILE).is_file():
            return None  # no checkpoint: exporting it says so
        there = flat_settings(settings_to_dict(read_run(command.made)))
        here = flat_settings(settings_to_dict(settings_from_dict(RunConfig, settings)))
        free = {*FREE_TO_CHANGE, "model.path"}
    else:
        there = _prepared_settings(command.made)
        here = settings_to_dict(settings_from_dict(DataConfig, settings["data"]))
        free = {"folder", "streaming", "data_files", "tokenizer"}
    names = sorted((there.keys() | here.keys()) - free) if there else []
    return next(
        (f"{n}: {there.get(n)!r} there, {here.get(n)!r} here" for n in names if there.get(n) != here.get(n)), None
    )


def _prepared_settings(info: Path) -> dict[str, Any]:
    """The settings in a rows.json; {} if they cannot be read: opening the rows then raises the error.

    Settings that an earlier release did not have are given their defaults.
    """
    try:
        settings = read_own_json(info, "data.folder")["data"]
        return settings_to_dict(DataConfig()) | settings if isinstance(settings, dict) else {}
    except (ValueError, KeyError, TypeError):
        return {}


def _needed(evaluated: list[Job], bases: list[Job], rows: list[Job]) -> set[str]:
    """Names of the jobs that the evaluations need, and of those that needed jobs need in turn.

    bases: each after the one that it starts from.
    """
    needed = {need for job in evaluated for need in job.needs}
    for base in reversed(bases):
        if _is_left(base, needed):
            needed |= set(base.needs)
    return needed | {need for job in rows if _is_left(job, needed) for need in job.needs}


def _is_left(job: Job, needed: set[str]) -> bool:
    """Whether the job is among the needed ones and has not finished."""
    return job.name in needed and not job.finished


def _in_order(config: ExperimentConfig) -> list[str]:
    """The studies, each after the study that it starts from."""
    ordered: list[str] = []
    while len(ordered) < len(config.studies):
        ready = [n for n, s in config.studies.items() if n not in ordered and s.start in (None, *ordered)]
        ordered.append(ready[0])
    return ordered


def _study(config: ExperimentConfig, study: str) -> list[Job]:
    jobs = []
    for arm in config.studies[study].arms:
        trained = config.arms[arm].settings is not None
        for seed in config.studies[study].seeds if trained else [None]:
            jobs.append(_arm(config, study, arm, seed))
    return jobs


def _arm(config: ExperimentConfig, study: str, arm: str, seed: int | None) -> Job:
    base = base_model(config, study)
    folder = Path(config.output, study, arm if seed is None else f"{arm}-{seed}")
    commands, model = [], base
    if seed is not None:
        model = folder / "model"
        settings = config.run_settings(study, arm, seed, str(base), str(folder / "run"))
        commands += _train_and_export(settings, model, divided=False)
    reports = []
    for selection in config.arms[arm].selections:
        for kind in ("perplexity", "tasks"):
            if _is_evaluated(config, study, arm, selection, kind):
                commands.append(_evaluate(config, study, selection, kind, model, folder / f"{kind}-{selection}"))
                reports.append(Report(commands[-1].made, study, arm, seed, selection, kind))
    if (tradeoff := config.studies[study].tradeoff) is not None:  # its grid has selections of its own
        commands.append(_sweep(tradeoff, model, folder / "tradeoff"))
        reports.append(Report(commands[-1].made, study, arm, seed, config.arms[arm].selections[0], "tradeoff"))
    needs = [base_name(study), rows_name(config.data(study)["folder"])]
    return Job("/".join(folder.parts[-2:]), commands, needs, reports)


def _is_evaluated(config: ExperimentConfig, study: str, arm: str, selection: str, kind: str) -> bool:
    """Whether an arm is evaluated under a selection. kind: perplexity or tasks, which have one report under the first
    selection if a grid names others."""
    wanted = getattr(config.studies[study], kind)
    is_first = selection == config.arms[arm].selections[0]
    return wanted is not None and (is_first or getattr(wanted, "grid", None) is None)


def _base(config: ExperimentConfig, study: str) -> Job:
    """Trains and exports a study's base model; has no commands for a model given by its path."""
    name, needs = base_name(study), [rows_name(config.data(study)["folder"])]
    if base_is_given(config, study):
        return Job(name, [])
    start = config.studies[study].start
    if start is not None:
        needs.append(base_name(start))
    run = Path(config.output, study, "base", "run")
    path = None if start is None else str(base_model(config, start))
    commands = _train_and_export(config.base_settings(study, path, str(run)), base_model(config, study), True)
    return Job(name, commands, needs, devices="all")


def base_name(study: str) -> str:
    """Name of the job that trains the study's base model."""
    return f"{study}/base"


def base_is_given(config: ExperimentConfig, study: str) -> bool:
    return set(config.studies[study].base) == {"model"} and "path" in config.studies[study].base["model"]


def base_model(config: ExperimentConfig, study: str) -> Path:
    """Folder of a study's base model."""
    if base_is_given(config, study):
        return Path(config.studies[study].base["model"]["path"])
    return Path(config.output, study, "base", "model")


def _rows(config: ExperimentConfig, study: str) -> Job:
    """Prepares a study's sequences, after those whose tokenizer they use."""
    data = config.data(study)
    folder, refresh = Path(data["folder"]), merge(config.settings, config.studies[study].settings).get("refresh", {})
    path = Path(config.output, f"rows-{folder.name}.yaml")
    command = Command("prepare.py", [], folder / INFO_FILE, (path, {"data": data, "refresh": refresh}))
    tokenizer = Path(data.get("tokenizer") or "")
    others = {config.data(other)["folder"] for other in config.studies} - {data["folder"]}
    needs = [rows_name(other) for other in sorted(others) if Path(other) in tokenizer.parents]
    return Job(rows_name(data["folder"]), [command], needs, devices="none")


def rows_name(folder: str) -> str:
    return f"rows {folder}"


def _train_and_export(settings: Fragment, model: Path, divided: bool) -> list[Command]:
    run, config = Path(settings["training"]["output"]), settings_from_dict(RunConfig, settings)
    training = config.training
    last = run / "checkpoints" / f"step-{training.steps:07d}"
    parts = training.global_batch // training.micro_batch if divided else 1
    path = run.with_name(f"{run.name}.yaml")
    return [
        Command(
            "train.py",
            [],
            last,
            (path, settings),
            run / RUN_FILE,
            parts,
            serves=model,
            is_made=partial(is_trained, config),
        ),
        Command("export.py", [str(last), str(model)], model, is_made=is_export),
    ]


def _sweep(settings: Tradeoff, model: Path, folder: Path) -> Command:
    """Evaluates a model on the grid of a study."""
    arguments = ["--model", str(model), "--output", str(folder), "--grid", settings.grid]
    for data in settings.data:
        arguments += ["--data", data]
    arguments += ["--rows", str(settings.rows), "--split", settings.split]
    arguments += ["--last-tokens", str(settings.last_tokens), "--batch-size", str(settings.batch_size)]
    return Command("sweep.py", arguments, folder / "tradeoff.json", begun=folder)


def _evaluate(config: ExperimentConfig, study: str, selection: str, kind: str, model: Path, folder: Path) -> Command:
    settings, values = getattr(config.studies[study], kind), config.refresh(study, selection).to_dict()
    if kind == "perplexity":
        values["threshold"] = settings.threshold  # of the schedule to evaluate; the arm may train with another
    refresh = [f"refresh.{key}={json.dumps(value)}" for key, value in values.items()]
    arguments = ["--model", str(model), "--output", str(folder)]
    arguments += ["--batch-size", str(settings.batch_size)]
    if kind == "perplexity":
        arguments += ["--data", config.data(study)["folder"], "--rows", str(settings.rows)]
        arguments += ["--split", settings.split]
        arguments += ["--last-tokens", str(settings.last_tokens), "--strides", ",".join(map(str, settings.strides))]
        return Command("evaluate.py", [*arguments, *refresh], folder / "report.json", begun=folder)
    arguments += ["--tasks", ",".join(settings.names), "--task-length", str(settings.length)]
    arguments += ["--examples", str(settings.examples)]
    arguments += ["--mix-tasks"] if settings.mix_tasks else []
    arguments += [] if settings.compile else ["--no-compile"]
    if settings.grid:
        arguments, refresh = [*arguments, "--grid", settings.grid], []
    else:
        arguments += ["--strategies", ",".join(settings.strategies)]
    own = [f"tasks.{n}.{k}={json.dumps(v)}" for n, task in settings.values.items() for k, v in task.items()]
    return Command("evaluate.py", [*arguments, *refresh, *own], folder / "tasks.json", begun=folder)
