"""What `sweep --grid` does once its options are parsed: open, load, measure, write the report, say where it is."""

import argparse
from pathlib import Path

from datasets import Dataset

from refreshkv import enable
from refreshkv.data.rows import Rows
from refreshkv.evaluation.inputs import check_tokens, open_split, sequences_fingerprint
from refreshkv.evaluation.perplexity.evaluation import check_last_tokens
from refreshkv.evaluation.perplexity.losses import SequenceRecords
from refreshkv.evaluation.placing import load_placed
from refreshkv.evaluation.processes import ALONE, Processes
from refreshkv.evaluation.reports import ROWS_FILE, open_output
from refreshkv.evaluation.sweep.grid import load_grid
from refreshkv.evaluation.sweep.tradeoff import measure_tradeoff
from refreshkv.evaluation.sweep.tradeoff_report import (
    FILES,
    build_tradeoff_report,
    tradeoff_table,
    write_tradeoff_report,
)
from refreshkv.loading import model_folder, own_config
from refreshkv.options import chosen_origin
from refreshkv.settings import SettingsError


def sweep_grid(options: argparse.Namespace, command: str, processes: Processes = ALONE) -> str:
    """Measures a grid of strategies on one text or several; returns the text to print, recommendation included."""
    output = options.output or Path("reports", f"{Path(options.model).resolve().name}-sweep")
    strategies = load_grid(options.grid).build_strategies()
    opened = {folder: open_split(folder, options.split, options.rows) for folder in options.data}
    texts = _named(opened)
    for rows in texts.values():
        check_last_tokens(options.last_tokens, len(rows[0]["input_ids"]))
    path = model_folder(options.model, "--model")
    model = load_placed(path, options, processes)
    for rows, _ in opened.values():
        check_tokens(model, path, rows, chosen_origin(options))
    enable(model, own_config(model.config))
    folder = processes.from_first(lambda: open_output(output, FILES, options.overwrite, options.resume))

    records = SequenceRecords(folder / ROWS_FILE, processes)
    tradeoff = measure_tradeoff(
        model,
        texts,
        strategies,
        options.last_tokens,
        options.within,
        records,
        batch_size=options.batch_size,
        stop_after=options.stop_after,
    )

    settings = {
        "data": ", ".join(options.data),
        "split": options.split,
        "sequences": len(next(iter(texts.values()))),
        "grid": options.grid,
        "dtype": str(model.dtype).removeprefix("torch."),
        **chosen_origin(options).settings(),
    }
    fingerprints = {name: sequences_fingerprint(rows) for name, rows in texts.items()}
    report = build_tradeoff_report(tradeoff, options.model, settings, command, fingerprints)
    written = processes.from_first(lambda: write_tradeoff_report(folder, tradeoff, report))
    warnings = [f"warning: {text}" for text in next(iter(tradeoff.evaluations.values())).warnings]
    where = f"{output}: {', '.join(written)}"
    return "\n".join([tradeoff_table(tradeoff), *warnings, report["recommendation"]["text"], where])


def _named(opened: dict[str, tuple[Rows, Dataset]]) -> dict[str, Dataset]:
    """The sequences by the name of their folder. Raises `SettingsError` if two folders have one name, or if their
    sequences have different lengths."""
    texts = {Path(folder).absolute().name: split for folder, (_, split) in opened.items()}
    if len(texts) < len(opened):
        raise SettingsError(f"--data names two folders alike: {', '.join(opened)}; rename one")
    lengths = {len(split[0]["input_ids"]) for split in texts.values()}
    if len(lengths) > 1:
        raise SettingsError(f"--data: the sequences have different lengths, {sorted(lengths)}; sweep each alone")
    return texts
