"""All tasks and groups of tasks, by name."""

import dataclasses
import difflib
from typing import Any

from refreshkv.data.tasks.chain_of_key import ChainOfKey
from refreshkv.data.tasks.countdown import Countdown
from refreshkv.data.tasks.family import Family
from refreshkv.data.tasks.html_table import HtmlTable
from refreshkv.data.tasks.longproc import RELEASED
from refreshkv.data.tasks.needles import Needles
from refreshkv.data.tasks.path_traversal import PathTraversal
from refreshkv.data.tasks.questions import Questions
from refreshkv.data.tasks.summaries import Meetings, Novels, Reports
from refreshkv.data.tasks.task import Task
from refreshkv.data.tasks.variables import VariableTracking
from refreshkv.data.tasks.word_counts import CommonWords, FrequentWords
from refreshkv.settings import SettingsError, settings_from_dict

TASKS: dict[str, tuple[type[Family], dict[str, Any]]] = {
    "chain_of_key": (ChainOfKey, {}),
    # RULER
    "niah_single_1": (Needles, {"haystack": "noise"}),
    "niah_single_2": (Needles, {"haystack": "essay"}),
    "niah_single_3": (Needles, {"haystack": "essay", "value_kind": "uuids"}),
    "niah_multikey_1": (Needles, {"haystack": "essay", "keys": 4}),
    "niah_multikey_2": (Needles, {"haystack": "needles"}),
    "niah_multikey_3": (Needles, {"haystack": "needles", "key_kind": "uuids", "value_kind": "uuids"}),
    "niah_multivalue": (Needles, {"haystack": "essay", "values": 4}),
    "niah_multiquery": (Needles, {"haystack": "essay", "queries": 4}),
    "vt": (VariableTracking, {}),
    "cwe": (CommonWords, {}),
    "fwe": (FrequentWords, {}),
    "qa_1": (Questions, {"source": "squad"}),
    "qa_2": (Questions, {"source": "hotpot"}),
    # LongProc
    "path_traversal": (PathTraversal, {}),
    "countdown": (Countdown, {}),
    "html_to_tsv": (HtmlTable, {}),
    # summaries
    "gov_report": (Reports, {}),
    "qmsum": (Meetings, {}),
    "novel_summary": (Novels, {}),
}
"""By name: a family, and the settings that make it this task. A user may change these too; every report states them."""

RULER = [
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
]
GROUPS = {
    "ruler": RULER,
    "ruler_essays": [name for name in RULER if TASKS[name][1].get("haystack") == "essay"],  # all of them read essays
}
"""Names that stand for several tasks."""


def build_task(name: str, values: dict[str, Any] | None = None) -> Task:
    """The task `name` with its settings changed by `values`; LongProc's own problems if `data` is among them.

    Raises `SettingsError` for a name or a setting that does not exist, and for values that cannot work.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        raise SettingsError(f"there is no task {name}" + (f"; did you mean {close[0]}?" if close else f": {_known()}"))
    family, preset = TASKS[name]
    if (values or {}).get("data") is not None and name in RELEASED:
        family = RELEASED[name]
    try:
        return Task(name, settings_from_dict(family, {**preset, **(values or {})}, prefix=""))
    except SettingsError as error:
        raise SettingsError(f"tasks.{name}: {error}") from None


def build_tasks(names: list[str], values: dict[str, dict[str, Any]] | None = None, **common: Any) -> list[Task]:
    """The named tasks, each once; a group's name such as `ruler` stands for its tasks.

    Args:
        values: settings by task or group, see `settings_by_task`.
        common: settings of all tasks, which `values` override.

    Raises `SettingsError` as `build_task` does, and for values of a task that is not among the names.
    """
    names = spelled_out(names)
    given = settings_by_task(values or {}, names)
    return [build_task(name, {**common, **given.get(name, {})}) for name in names]


def spelled_out(names: list[str]) -> list[str]:
    """The names with each group replaced by its tasks, each task once."""
    return list(dict.fromkeys(task for name in names for task in GROUPS.get(name, [name])))


def settings_by_task(values: dict[str, Any], names: list[str], whose: str = "the tasks") -> dict[str, dict[str, Any]]:
    """Settings by task or group, turned into settings by task among `names`.

    A group's settings go to those of its tasks that have them; a task's own override them. `whose` describes `names` in
    errors. Raises `SettingsError` for a task or group that is not among the names, and for a setting that no task has.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, settings in sorted(values.items(), key=lambda item: item[0] not in GROUPS):  # groups first
        if settings is not None and not isinstance(settings, dict):
            raise SettingsError(f"tasks.{name} must be a section with settings, {{}} for none, got {settings!r}")
        members = [task for task in GROUPS.get(name, [name]) if task in names]
        if not members:
            raise SettingsError(f"tasks.{name} has settings but is not among {whose}: {', '.join(names)}")
        for key, value in (settings or {}).items():
            takers = [task for task in members if name not in GROUPS or _has(task, key)]
            if not takers:
                raise SettingsError(f"tasks.{name}.{key}: none of these tasks has such a setting")
            for task in takers:
                found.setdefault(task, {})[key] = value
    return found


def _has(task: str, setting: str) -> bool:
    return setting in {field.name for field in dataclasses.fields(TASKS[task][0])}


def _known() -> str:
    return f"known are {', '.join(TASKS)}, and {', '.join(GROUPS)} for several of RULER's"
