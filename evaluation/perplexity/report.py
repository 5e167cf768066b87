"""The report of a perplexity: a table for the terminal, and report.json, report.md, report.png in a folder."""

import os
from pathlib import Path
from typing import Any

from refreshkv import tables
from refreshkv.config import NEVER
from refreshkv.evaluation.perplexity.results import Evaluation, Result, gap_closed
from refreshkv.evaluation.reports import ROWS_FILE, drawn, provenance
from refreshkv.evaluation.strategies import Strategy
from refreshkv.files import write_bytes, write_json, write_text
from refreshkv.ranges import show
from refreshkv.reading import read_json
from refreshkv.settings import SettingsError

NAMES = ("report.json", "report.md", "report.png")
FILES = (*NAMES, ROWS_FILE)
"""All that an evaluation on sequences writes into its folder."""
LAYOUT = 1
"""Version of report.json's layout."""


def protocol(
    fingerprint: str, split: str, rows: int, row_length: int, last_tokens: int, strategies: list[Strategy]
) -> dict[str, Any]:
    """What two evaluations must share so that their figures compare, as plain values.

    fingerprint: the prepared sequences' hash. rows: how many of them were taken, which also says which ones.
    """
    return {
        "fingerprint": fingerprint,
        "split": split,
        "rows": rows,
        "row length": row_length,
        "last tokens": last_tokens,
        "strategies": {item.name: item.settings or None for item in strategies},
    }


def check_comparable(before: dict[str, Any], measured: dict[str, Any], folder: str | Path) -> None:
    """Raises `SettingsError` that names the first difference of a protocol from that of the report in `folder`."""
    earlier = before["protocol"]
    for key, value in measured.items():
        if earlier.get(key) != value:
            difference = _difference(key, earlier.get(key), value)
            raise SettingsError(f"--compare {folder} measured something else: {difference}; evaluate both the same way")


def build_report(
    evaluation: Evaluation,
    measured: dict[str, Any],
    model: str,
    settings: dict[str, Any],
    command: str,
    before: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of report.json, as plain values.

    Args:
        measured: the evaluation's `protocol`.
        model: folder or hub id.
        settings: further settings by name, such as dtype and batch size.
        command: the command line.
        before: an earlier report to compare with.
    """
    report = {
        "layout": LAYOUT,
        "model": model,
        "protocol": measured,
        "settings": settings,
        **provenance(command),
        "evaluation": evaluation.to_dict(),
    }
    if before is not None:
        report["before"] = {key: before[key] for key in ("model", "date", "settings", "evaluation")}
        report["gap_closed"] = gap_closed(Evaluation.from_dict(before["evaluation"]), evaluation)
    return report


def text_table(report: dict[str, Any]) -> str:
    """The strategies as aligned columns for a terminal, with the report's warnings below."""
    header, *lines = _cells(report)
    heads = [[cell.rpartition(" ")[0] for cell in header], [cell.rpartition(" ")[2] for cell in header]]
    lines = heads + lines
    table = tables.column_table(lines)
    return "\n".join([table, *_notes(report), *(f"warning: {text}" for text in report["evaluation"]["warnings"])])


def markdown_table(report: dict[str, Any]) -> str:
    """The strategies as a markdown table, for report.md and model cards."""
    return tables.markdown_table(_cells(report))


def write_report(folder: str | Path, report: dict[str, Any]) -> list[str]:
    """Writes report.json, report.md and, if matplotlib is installed, report.png; returns the names of those written."""
    folder = Path(folder)
    figure = drawn("report.png", lambda: _draw(report))
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", _markdown(report, has_figure=figure is not None))
    if figure is None:
        return list(NAMES[:2])
    write_bytes(folder / "report.png", figure)
    return list(NAMES)


def _draw(report: dict[str, Any]) -> bytes:
    from refreshkv.evaluation.perplexity.figure import draw  # needs matplotlib

    return draw(*_evaluations(report))


def load_report(folder: str | Path, setting: str = "--compare") -> dict[str, Any]:
    """The report that `write_report` left in `folder`. Raises `SettingsError` if there is none that can be read.

    setting: the option that names the folder, for the error.
    """
    path = Path(folder, "report.json")
    if not os.path.lexists(path):
        raise SettingsError(f"{setting}: {folder} holds no report.json: run launch/evaluate.py with --output {folder}")
    try:
        report = read_json(path, setting)
        if report["layout"] != LAYOUT:
            raise ValueError(f"layout {report['layout']}, this version reads {LAYOUT}")
        _validate_report(report)
        if report.get("before") is not None:
            _validate_report(report["before"], has_protocol=False)
        return report
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()).removeprefix(f"{setting}: ")
        raise SettingsError(
            f"{setting}: {path} is not a report of launch/evaluate.py ({reason}); evaluate anew"
        ) from error


def _validate_report(report: Any, has_protocol: bool = True) -> None:
    """Raises `ValueError` for a report with values of another kind than those that are read from it."""
    kinds = {"model": str, "date": str, "settings": dict, "evaluation": dict}
    kinds |= {"protocol": dict} if has_protocol else {}
    for name, kind in kinds.items():
        if not isinstance(report[name], kind):
            raise ValueError(f"{name} is {show(report[name])}")
    evaluation = Evaluation.from_dict(report["evaluation"])
    if not all(result.losses for result in [evaluation.full, *evaluation.results]):
        raise ValueError("a result has no losses")
    if not has_protocol:
        return
    strategies = report["protocol"]["strategies"]
    if not isinstance(strategies, dict) or not all(isinstance(own, dict | None) for own in strategies.values()):
        raise ValueError(f"strategies are {show(strategies)}")
    if {result.name for result in evaluation.results} != {*strategies}:
        raise ValueError("its results are not those of its protocol's strategies")
    if not isinstance(report["protocol"].get("split"), str):
        raise ValueError("its protocol names no split")


def _evaluations(report: dict[str, Any]) -> tuple[Evaluation, Evaluation | None]:
    """The report's evaluation, and the earlier one that it is compared with, if any."""
    before = report.get("before")
    return Evaluation.from_dict(report["evaluation"]), before and Evaluation.from_dict(before["evaluation"])


def _cells(report: dict[str, Any]) -> list[list[str]]:
    """The table's cells: a header, and a line for each strategy."""
    after, before = _evaluations(report)
    if before is None:
        header = ["strategy", "K", "stride", "perplexity", "ratio to full", "gap to full", "effective stride"]
        header += _step_headings(after)
        lines = [[*_setting(r), *_figures(after, r), *_steps(after, r)] for r in after.results]
        if any(result.seconds is not None for result in after.results):
            header += ["prompt seconds", "decoding seconds", "cache MiB"]
            lines = [[*line, *_costs(result)] for line, result in zip(lines, after.results, strict=True)]
        return [header, *lines]
    header = ["strategy", "K", "stride"]
    header += [f"{name} {when}" for name in ("perplexity", "ratio", "gap") for when in ("before", "after")]
    header += ["gap closed", "effective stride", *_step_headings(after)]
    lines, earlier = [], {result.name: result for result in before.results}
    for new in after.results:
        old = earlier[new.name]
        pairs = zip(_figures(before, old), _figures(after, new), strict=True)
        figures = [cell for pair in pairs for cell in pair]
        closed = report["gap_closed"].get(new.name)
        share = "-" if closed is None else f"{closed:.1%}"
        lines.append([*_setting(new), *figures, share, *_steps(after, new)])
    return [header, *lines]


def _setting(result: Result) -> list[str]:
    if result.config is None:
        return [result.name, "-" if result.is_full else f"{result.budget:,}", "-"]
    stride = "never" if result.config.stride == NEVER else str(result.config.stride)
    return [result.name, f"{result.budget:,}", stride]


def _figures(evaluation: Evaluation, result: Result) -> list[str]:
    gap = None if result.is_full else evaluation.gap(result)
    return [_number(result.perplexity), _number(evaluation.ratio(result)), _number(gap)]


def _selects(evaluation: Evaluation) -> bool:
    """Whether a strategy has selecting steps."""
    return any(result.selecting_strides for result in evaluation.results)


def _has_shares(evaluation: Evaluation) -> bool:
    """Whether a strategy has bytes read; reports of earlier versions have none."""
    return any(result.share_read is not None for result in evaluation.results)


def _step_headings(evaluation: Evaluation) -> list[str]:
    """Headings of `_steps` after the first."""
    selecting = ["effective select stride"] if _selects(evaluation) else []
    return selecting + (["bytes read", "greedy agreement"] if _has_shares(evaluation) else [])


def _steps(evaluation: Evaluation, result: Result) -> list[str]:
    """How often a step is full and selecting, what a step reads, how often the most likely token is the same."""
    cells = [_number(result.effective_stride, 1)]
    if _selects(evaluation):
        cells.append(_number(result.selecting_stride, 1))
    if _has_shares(evaluation):
        cells += [_percent(result.share_read), _percent(None if result.is_full else result.agreement)]
    return cells


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _costs(result: Result) -> list[str]:
    held = result.cache_bytes and result.cache_bytes / 2**20
    return [_number(result.prompt_seconds, 2), _number(result.seconds, 2), _number(held, 2)]


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _notes(report: dict[str, Any]) -> list[str]:
    """What the table shows, in up to three lines."""
    evaluation, _ = _evaluations(report)
    prompt = evaluation.row_length - evaluation.last_tokens
    notes = [
        f"perplexity of the last {evaluation.last_tokens:,} tokens after a prompt of {prompt:,}, "
        f"{evaluation.rows:,} rows of the {report['protocol']['split']} split"
    ]
    if evaluation.full.standard_error is not None:
        error = evaluation.full.standard_error * evaluation.full.perplexity
        notes.append(
            f"full attention's standard error over rows: {error:.3f}; all strategies saw the same rows, so gaps "
            "usually vary less than that"
        )
    if any(result.seconds is not None for result in evaluation.results):
        notes.append("seconds and MiB are of one row decoded token by token; - where one pass gave the same losses")
    return notes


def _markdown(report: dict[str, Any], has_figure: bool) -> str:
    after, before = _evaluations(report)
    title = f"# {report['model']}" + (f", compared with {report['before']['model']}" if before else "")
    notes = [f"{note[0].upper()}{note[1:]}." for note in _notes(report)]
    parts = [title, markdown_table(report), *notes, *(f"**Warning:** {text}." for text in after.warnings)]
    parts.append(
        "K: tokens in the small cache. Stride: steps between two decision steps. Effective stride: steps per full "
        "step; effective select stride: steps per selecting step. Gap: perplexity less full attention's of the same "
        "model. Bytes read: keys and values that a decoding step reads, of those that full attention reads. Greedy "
        "agreement: scored positions whose most likely token is full attention's."
    )
    parts += ["![Ratio to full attention, and effective stride per layer](report.png)"] if has_figure else []
    parts += ["## Settings", _list(report)]
    return "\n\n".join([*parts, f"```\n{report['command']}\n```"]) + "\n"


def _list(report: dict[str, Any]) -> str:
    measured = {key: value for key, value in report["protocol"].items() if key != "strategies"}
    settings = {**measured, **report["settings"], "hardware": report["hardware"], "date": report["date"]}
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join(f"- {key}: {_plain(value)}" for key, value in {**settings, "versions": versions}.items())


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return str("none" if value is None else value)


def _difference(key: str, there: Any, here: Any) -> str:
    if key != "strategies" or not isinstance(there, dict):
        return f"{key} {there} there, {here} here"
    if set(there) != set(here):
        return f"strategies {', '.join(there)} there, {', '.join(here)} here"
    for name, config in here.items():
        if config != there[name]:
            options = [option for option in config if config[option] != there[name].get(option)]
            return f"{name} with " + " and ".join(f"{o} {there[name].get(o)} there, {config[o]} here" for o in options)
    raise AssertionError("called for protocols that do not differ")
