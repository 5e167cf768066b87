"""The log of a run: a progress bar, a line every `training.log_every` steps, metrics.jsonl, and trackers' curves."""

import json
import math
import os
import resource
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from refreshkv.files import write_text
from refreshkv.reading import LARGEST_REPORT, read_text
from refreshkv.settings import SettingsError
from refreshkv.train.config import RunConfig
from refreshkv.train.hub import BackgroundPush
from refreshkv.train.run_folder import METRICS_FILE
from refreshkv.train.trackers import Trackers


class RunLog:
    """The log of a run, which rank 0 writes; on other ranks all methods do nothing.

    Evaluations and checkpoints are uploaded, too, if `hub.repo` is set. start: step after which this process continues;
    the time that is left is estimated from the steps of this process.
    """

    def __init__(self, config: RunConfig, start: int, is_writer: bool):
        self.steps, self.every, self.is_writer = config.training.steps, config.training.log_every, is_writer
        self.started, self.start = time.perf_counter(), start
        if not is_writer:
            return
        output = Path(config.training.output)
        self.uploads = BackgroundPush(config.hub, output, self.say) if config.hub.repo else None
        self.metrics = _metrics_until(output / METRICS_FILE, start)
        self.trackers = Trackers(config, start)
        self.bar = tqdm(total=self.steps, initial=start, desc="training", unit="step", dynamic_ncols=True)

    def step(self, step: int, values: dict[str, float]) -> None:
        """Records a finished optimizer step. values: by readable name, NaN for what the step did not have."""
        if not self.is_writer:
            return
        known = {name: value for name, value in values.items() if not math.isnan(value)}
        self.metrics.write(json.dumps({"step": step, **known}) + "\n")
        self.metrics.flush()
        self.trackers.log(known, step)
        self.bar.update()
        self.bar.set_postfix_str(f"loss {values['loss']:.3f}")
        if step % self.every == 0 or step == self.steps:
            self.say(self._line(step, known))

    def evaluation(self, step: int, perplexities: dict[str, float], acceptance: float | None) -> None:
        """Records an evaluation. perplexities: by strategy; acceptance: of greedy drafts from the small cache."""
        if not self.is_writer:
            return
        accepted = {} if acceptance is None else {"acceptance": acceptance}
        self.metrics.write(json.dumps({"step": step, "evaluation": perplexities, **accepted}) + "\n")
        self.metrics.flush()
        self.trackers.log({f"perplexity/{name}": value for name, value in perplexities.items()} | accepted, step)
        found = [f"{name} {value:.3f}" for name, value in perplexities.items()]
        found += [f"acceptance {value:.1%}" for value in accepted.values()]
        self.say("  ".join([f"step {step}  perplexity", *found]))
        if self.uploads:
            self.uploads.metrics(step)

    def checkpoint(self, step: int, folder: Path) -> None:
        """Records a finished checkpoint."""
        if not self.is_writer:
            return
        self.say(f"step {step}  saved {folder}")
        if self.uploads:
            self.uploads.checkpoint(folder)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self.is_writer:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Waits for the uploads, and closes the progress bar and the files."""
        if self.is_writer:
            if self.uploads:
                self.uploads.close()
            self.bar.close()
            self.trackers.close()
            self.metrics.close()

    def _line(self, step: int, values: dict[str, float]) -> str:
        left = (time.perf_counter() - self.started) / (step - self.start) * (self.steps - step)
        shown = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        return f"step {step}/{self.steps}  {shown}  left {_duration(left)}"


def peak_memory() -> float:
    """Peak memory of this process in GB: the GPU's if there is one, else main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _metrics_until(path: Path, step: int):
    """Opens metrics.jsonl for appending, and removes the steps after `step` first: they will be taken again."""
    kept = []
    if os.path.lexists(path):
        for number, line in enumerate(read_text(path, "--resume", LARGEST_REPORT).splitlines(keepends=True), start=1):
            if line.endswith("\n") and _step_of(line, f"--resume: line {number} of {path}") <= step:
                kept.append(line)
    write_text(path, "".join(kept))
    return path.open("a")


def _step_of(line: str, where: str) -> int:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        step = None
    if not isinstance(step, int):
        raise SettingsError(f"{where} is no step's values: move the file away, and the curves begin anew")
    return step


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
