"""What breaks a job costs nothing: requests to stop, dead and hanging ranks, full disks, damaged checkpoints."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from refreshkv.train.faults import FAILED
from refreshkv.train.manifest import MANIFEST_FILE, find_damage, write_manifest
from refreshkv.train.run_folder import finished_checkpoints
from refreshkv.train.stop_request import STOPPED
from tests.helpers.jobs import ROOT, free_port, kill_job, make_rows, read_metrics, run_settings, start_job, write_config
from tests.helpers.marks import slow_unless
from tests.helpers.ranks import Ranks, run_script

STEPS, SAVE_EVERY = 24, 8
VALUES = ("loss", "loss full", "loss partial", "grad norm")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("rows"))


def start(rows, output, *arguments, ranks=2, limit=None, **training):
    settings = run_settings(rows, output, training={"steps": STEPS, "save_every": SAVE_EVERY, **training})
    arguments = ["--config", str(write_config(settings)), *arguments]
    return Ranks(ranks, output.with_name(f"{output.name}.txt"), run_limited, limit, arguments)


def run_limited(limit, arguments):
    """launch/train.py, where files of more than `limit` bytes cannot be written: a full disk."""
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run_script(arguments)


def finish(rows, output, *arguments, **training):
    ranks = start(rows, output, *arguments, **training)
    assert ranks.wait() == [0, 0], ranks.printed
    return ranks.printed


def losses(output):
    return {step: [values.get(name) for name in VALUES] for step, values in read_metrics(output).items()}


@pytest.fixture(scope="module")
def straight(rows, tmp_path_factory):
    """A run that nothing interrupts."""
    output = tmp_path_factory.mktemp("straight") / "run"
    finish(rows, output)
    assert sorted(losses(output)) == list(range(1, STEPS + 1))
    return output


def copy_of(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    return tmp_path / "run"


def wait_until(true, ranks, seconds=120):
    end = time.monotonic() + seconds
    while not true() and any(process.is_alive() for process in ranks.processes):
        assert time.monotonic() < end, ranks.printed
        time.sleep(0.002)


def steps_taken(output):
    metrics = output / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def errors(ranks):
    return [line for line in ranks.printed.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_to_stop_saves_and_leaves(rows, straight, tmp_path, number):
    """One rank is told; all stop after the same step."""
    output = tmp_path / "run"
    ranks = start(rows, output, save_every=1000)
    wait_until(lambda: steps_taken(output) >= 2, ranks)
    ranks.signal(1, number)
    assert ranks.wait(60) == [STOPPED, STOPPED], ranks.printed
    assert f"{number.name}: saved and stopped after step" in ranks.printed and not errors(ranks)
    last = max(losses(output))
    assert [folder.name for folder in finished_checkpoints(output)] == [f"step-{last:07d}"]
    if number == signal.SIGUSR1:
        return  # what follows is the same
    printed = finish(rows, output, "--resume")
    assert f"continuing after step {last}" in printed and losses(output) == losses(straight)


def test_a_killed_rank_ends_the_job(rows, tmp_path):
    output = tmp_path / "run"
    ranks = start(rows, output, timeout=30, steps=5000, save_every=2)
    wait_until(lambda: len(finished_checkpoints(output)) > 0, ranks)
    ranks.signal(0, signal.SIGKILL)
    began = time.monotonic()
    assert ranks.wait(40) == [-signal.SIGKILL, FAILED], ranks.printed
    assert time.monotonic() - began < 30
    found = errors(ranks)
    assert len(found) == 1 and "another process of the job" in found[0] and "--resume" in found[0], ranks.printed
    assert str(finished_checkpoints(output)[-1]) in found[0]
    assert "Traceback" not in ranks.printed


def test_a_hanging_rank_ends_the_job_in_time(rows, tmp_path):
    output = tmp_path / "run"
    timeout = 15  # more than any part of the start takes on a busy machine
    ranks = start(rows, output, timeout=timeout, steps=5000, save_every=2)
    wait_until(lambda: steps_taken(output) >= 3, ranks)
    ranks.signal(1, signal.SIGSTOP)
    began = time.monotonic()
    ranks.processes[0].join(2 * timeout)
    assert ranks.processes[0].exitcode == FAILED and time.monotonic() - began < timeout + 10, ranks.printed
    ranks.kill()
    found = errors(ranks)
    assert len(found) == 1 and "training.timeout" in found[0] and "step-" in found[0], ranks.printed
    assert (output / "failure.txt").read_text().startswith("error: ")


def test_a_full_disk_ends_the_job_and_leaves_the_last_good_checkpoint(rows, straight, tmp_path):
    output = copy_of(straight, tmp_path)
    shutil.rmtree(output / "checkpoints" / "step-0000024")
    ranks = start(rows, output, "--resume", limit=60_000)
    assert set(ranks.wait(60)) == {FAILED}, ranks.printed
    found = errors(ranks)
    assert len(found) == 1 and "checkpoint of step 24 cannot be written" in found[0] and "step-0000016" in found[0]
    assert [folder.name for folder in (output / "checkpoints").glob("step-*")] == ["step-0000016"]
    finish(rows, output, "--resume")
    assert losses(output) == losses(straight)


@pytest.mark.parametrize(
    "damage", slow_unless(["shorter", "changed", "gone"], ["shorter", "changed", "gone", "no manifest"])
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(rows, straight, tmp_path, damage):
    output = copy_of(straight, tmp_path)
    newest = output / "checkpoints" / "step-0000024"
    file = next(newest.glob("*optim_states.pt"))
    content = bytearray(file.read_bytes())
    if damage == "shorter":
        file.write_bytes(content[:-10])
    elif damage == "changed":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "gone":
        file.unlink()
    else:
        file = newest / MANIFEST_FILE
        file.unlink()
    assert file.name in find_damage(newest)
    if damage in ("changed", "gone"):
        return  # what follows is the same
    printed = finish(rows, output, "--resume")
    warned = [line for line in printed.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1 and str(newest) in warned[0] and file.name in warned[0], printed
    assert "continuing after step 16" in printed and losses(output) == losses(straight)
    assert (output / "checkpoints" / "step-0000024.damaged").is_dir() and find_damage(newest) is None


def test_nothing_is_thrown_away_when_all_checkpoints_are_damaged(rows, straight, tmp_path):
    output = copy_of(straight, tmp_path)
    for checkpoint in finished_checkpoints(output):
        (checkpoint / MANIFEST_FILE).write_text("{")
    ranks = start(rows, output, "--resume")
    assert ranks.wait() == [2, 2], ranks.printed
    assert len(errors(ranks)) == 1 and "no good checkpoint is left" in errors(ranks)[0]
    assert len(finished_checkpoints(output)) == 2 and losses(output) == losses(straight)


def test_a_manifest_covers_every_file(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "a.pt").write_bytes(b"abc")
    (tmp_path / "model" / "config.json").write_text("{}")
    write_manifest(tmp_path)
    files = json.loads((tmp_path / MANIFEST_FILE).read_text())["files"]
    assert sorted(files) == ["a.pt", "model/config.json"] and files["a.pt"]["bytes"] == 3
    assert find_damage(tmp_path) is None
    (tmp_path / "model" / "config.json").write_text("[]")
    assert "checksum of config.json" in find_damage(tmp_path)


def interrupt(kind, ranks, output, draw):
    """Breaks a running job in one of four ways, at a random moment."""
    if kind == "while writing":
        wait_until(lambda: any((output / "checkpoints").glob("*.partial")), ranks)
        time.sleep(draw.random() * 0.05)
    else:
        before, more = steps_taken(output), draw.randint(0, 2)
        wait_until(lambda: steps_taken(output) >= before + more, ranks)
    if kind == "SIGTERM":
        ranks.signal(draw.randint(0, 1), signal.SIGTERM)
    elif kind == "one killed":
        ranks.processes[draw.randint(0, 1)].kill()
    else:
        ranks.kill()
    ranks.wait(60)


@pytest.mark.parametrize("kinds", [["while writing", "one killed"], pytest.param(None, marks=pytest.mark.slow)])
def test_interrupted_runs_repeat_the_uninterrupted_one(rows, tmp_path, kinds):
    """Never a step twice with other losses, never one skipped, whatever broke it when."""
    seed = int(os.environ.get("REFRESHKV_SEED", random.randrange(10**6)))
    draw = random.Random(seed)
    kinds = kinds or [draw.choice(["while writing", "one killed", "all killed", "SIGTERM"]) for _ in range(10)]
    steps = 4 * len(kinds) + 4
    finish(rows, tmp_path / "straight", steps=steps, save_every=2)
    expected, output = losses(tmp_path / "straight"), tmp_path / "run"
    for number, kind in enumerate(kinds):
        ranks = start(rows, output, *(["--resume"] if number else []), steps=steps, timeout=15, save_every=2)
        interrupt(kind, ranks, output, draw)
        assert "Traceback" not in ranks.printed, ranks.printed
        found = losses(output) if steps_taken(output) else {}
        assert found == {step: expected[step] for step in found}, f"REFRESHKV_SEED={seed}, {kinds[: number + 1]}"
        assert sorted(found) == list(range(1, len(found) + 1))
    finish(rows, output, "--resume", steps=steps, save_every=2)
    assert losses(output) == expected, f"REFRESHKV_SEED={seed}, {kinds}"


@pytest.mark.slow
def test_the_launcher_ends_all_ranks(rows, tmp_path):
    """DeepSpeed's launcher, one rank killed: the rest of the job is gone within a minute."""
    output = tmp_path / "run"
    job = start_job(run_settings(rows, output, training={"steps": 5000, "save_every": 2, "timeout": 30}))
    try:
        end = time.monotonic() + 120
        while not finished_checkpoints(output) and time.monotonic() < end:
            time.sleep(0.05)
        victim = next(pid for pid in ranks_of(job.pid))
        os.kill(victim, signal.SIGKILL)
        printed, _ = job.communicate(timeout=60)
    finally:
        kill_job(job)
    assert job.returncode != 0
    assert sum(line.startswith("error: ") for line in printed.splitlines()) == 1, printed


def ranks_of(launcher):
    """Process ids of the ranks below a launcher."""
    import psutil

    below = psutil.Process(launcher).children(recursive=True)
    return [child.pid for child in below if any("--local_rank" in part for part in child.cmdline())]


@pytest.mark.slow
def test_two_machines_without_ssh(rows, tmp_path):
    """Two launchers on this machine, as if each were on its own, two ranks each; one dies, and all end."""
    (tmp_path / "hostfile").write_text("first slots=2\nsecond slots=2\n")
    settings = run_settings(rows, tmp_path / "run", training={"steps": 4, "save_every": 2, "timeout": 30})
    nodes = start_nodes(tmp_path, settings)
    printed = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4]

    settings["training"] |= {"steps": 5000, "output": str(tmp_path / "killed")}
    nodes = start_nodes(tmp_path, settings)
    try:
        end = time.monotonic() + 120
        while not finished_checkpoints(tmp_path / "killed") and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(ranks_of(nodes[1].pid)[0], signal.SIGKILL)
        printed = [node.communicate(timeout=90)[0] for node in nodes]
    finally:
        for node in nodes:
            kill_job(node)
    assert all(node.returncode for node in nodes), printed
    assert sum(line.startswith("error: ") for text in printed for line in text.splitlines()) == 1, printed


def start_nodes(folder, settings):
    """`deepspeed --no_ssh` for each of two machines of a hostfile."""
    config, port = write_config(settings), str(free_port())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(folder / "hostfile"), "--no_ssh"]
    command += ["--master_addr", "127.0.0.1", "--master_port", port]
    script = [str(ROOT / "launch" / "train.py"), "--config", str(config)]
    return [
        subprocess.Popen(
            [*command, "--node_rank", str(node), *script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
        for node in range(2)
    ]
