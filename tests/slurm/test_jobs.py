"""Job files of `tiltune launch --backend slurm` on a real SLURM: what is saved, what goes back into the queue, and what does not.

`pytest -m slurm -n 2`. Runs that go on end byte-equal to the one that nobody stopped.
"""

from __future__ import annotations

import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.slurm

SLOW = """import os, time
time.sleep(float(os.environ.get("SLOW_IMPORT", "0")))
def slow(x):
    time.sleep(0.25)
    return -x.flatten(1).mean(1)
"""
STEPS = 60
TRAINING = shlex.split(
    "train digits --energy slow.py:slow --steps 5 --warm-start none --soft-value-updates 0 --forward-rows 0 --population-size 16"
    " --batch-size 8 --checkpoint-every 10 --threads 1 --out run --updates"
)


def tiltune(folder: Path, *words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "tiltune", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def filled(folder: Path) -> Path:
    (folder / "slow.py").write_text(SLOW)
    return folder


def left(folder: Path) -> dict[str, bytes]:
    """Metrics and weights of the run in ``folder``."""
    run = folder / "run"
    return {str(file.relative_to(run)): file.read_bytes() for file in (run / "metrics.jsonl", *run.glob("policy/*.safetensors"))}


def unstopped(folder: Path, updates: int) -> dict[str, bytes]:
    """What two processes that nobody stops leave."""
    tiltune(filled(folder), "launch", "--cpu", "--nproc", "2", "--", *TRAINING, str(updates))
    found = left(folder)
    assert len(found) > 1 and found["metrics.jsonl"].count(b"\n") == updates
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return unstopped(tmp_path_factory.mktemp("whole"), STEPS)


@pytest.fixture
def submit(cluster: Any, tmp_path: Path) -> Callable[..., Any]:
    def submitted(nodes: int, *options: str, updates: int = STEPS) -> Any:
        processes = ("--nodes", str(nodes), "--nproc", str(2 // nodes))
        command = (*TRAINING, str(updates), "--resume", "auto")
        text = tiltune(filled(tmp_path), "launch", "--backend", "slurm", "--cpu", *processes, "--dry-run", "--", *command)
        return cluster.submit(text, tmp_path, *options)

    cluster.grace(0)
    return submitted


@pytest.fixture
def steps(tmp_path: Path, waiting: Any) -> Callable[[int], None]:
    """Waits until the run has taken so many."""
    file = tmp_path / "run" / "metrics.jsonl"
    return lambda count: waiting(lambda: file.exists() and file.read_bytes().count(b"\n") >= count, 120, f"{count} steps")


def grace_of(cluster: Any, seconds: int) -> None:
    cluster.grace(seconds)
    cluster.preempt()


AGAIN: dict[str, Callable[[Any, Any], None]] = {
    "USR1 to the batch script": lambda cluster, job: job.signal("--signal=USR1", "--batch"),
    "scontrol requeue": lambda cluster, job: cluster.run("scontrol", "requeue", job.number) and None,
    "preemption without grace": lambda cluster, job: grace_of(cluster, 0),
    "preemption with grace": lambda cluster, job: grace_of(cluster, 60),
}


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("why", AGAIN)
def test_what_is_stopped_and_goes_on_ends_as_if_nobody_had_stopped_it(
    why, nodes, cluster, submit, steps, whole, tmp_path
) -> None:
    job = submit(nodes)
    steps(12)
    AGAIN[why](cluster, job)
    assert job.ended() == {"JobState": "COMPLETED", "ExitCode": "0:0", "Restarts": "1"}, job.said
    assert left(tmp_path) == whole
    (taken,) = re.findall(r"going on from .*, after (\d+) steps", job.said)
    assert int(taken) >= 12, "nothing that was there at the signal is lost"


@pytest.mark.parametrize("seconds", [0, 1, 5])
def test_a_signal_while_it_starts_is_kept_until_it_is_heard(seconds, cluster, submit, whole, tmp_path) -> None:
    job = submit(2 if seconds == 1 else 1)
    job.listening()
    time.sleep(seconds)
    job.signal("--signal=USR1", "--batch")
    assert job.ended() == {"JobState": "COMPLETED", "ExitCode": "0:0", "Restarts": "1"}, job.said
    assert left(tmp_path) == whole


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_time_limit(nodes, cluster, submit, whole, tmp_path) -> None:
    """A limit of two minutes, and a warning at half of it, or up to a minute early: more than one start, or luck."""
    job = submit(nodes, "--time=2", "--signal=B:USR1@60")
    ended = job.ended(900)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), job.said
    assert left(tmp_path) == whole


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("words", [("--signal=TERM", "--batch"), ()], ids=["TERM to the batch script", "scancel"])
def test_what_a_user_stops_is_saved_and_stays_ended(words, nodes, submit, steps, tmp_path) -> None:
    job = submit(nodes)
    steps(12)
    job.signal(*words)
    ended = job.ended()
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED" if words else "CANCELLED", "0"), job.said
    (last, *_) = sorted((tmp_path / "run" / "checkpoints").glob("step-*"), reverse=True)
    assert int(last.name.removeprefix("step-")) >= 12


def test_a_rank_that_is_killed_ends_the_job(submit, steps) -> None:
    job = submit(2)
    steps(12)
    mine = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "tiltune.launch.cluster.worker" in (process.info["cmdline"] or [])
        and process.environ().get("SLURM_JOB_ID") == job.number
    ]
    workers = [process for process in mine if "RANK" in process.environ()]
    assert len(workers) == 2
    workers[-1].kill()
    ended = job.ended()
    assert ended["JobState"] == "FAILED" and ended["Restarts"] == "0" and ended["ExitCode"] != "0:0", job.said


def test_a_start_that_outlasts_the_warning_twice_is_not_tried_a_third_time(cluster, submit, waiting, monkeypatch) -> None:
    """The import of an energy takes half a minute, and the warning comes in the middle of it."""
    monkeypatch.setitem(cluster.environment, "SLOW_IMPORT", "30")
    job = submit(1)
    for start in range(2):
        waiting(lambda start=start: job.field("Restarts") == str(start), 120, f"start {start + 1}")
        job.running()
        time.sleep(10)
        job.signal("--signal=USR1", "--batch")
    assert job.ended() == {"JobState": "FAILED", "ExitCode": "76:0", "Restarts": "1"}, job.said
    assert job.said.count("nothing new was saved; back into the queue, once") == 1
    assert "for the second time in a row" in job.said and "Give a longer time limit" in job.said


def test_what_launch_says_of_a_job_works_as_it_says_it(cluster, steps, tmp_path) -> None:
    words = ("launch", "--backend", "slurm", "--cpu", "--nproc", "2", "--", *TRAINING, str(STEPS))
    done = subprocess.run(
        [sys.executable, "-m", "tiltune", *words], cwd=filled(tmp_path), env=cluster.environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "without --resume auto" in done.stderr, done.stderr
    first, *commands = done.stdout.splitlines()
    (number,) = re.fullmatch(r"job (\d+) is in the queue", first).groups()
    watch, log, stop = (line.split(maxsplit=1)[1] for line in commands)
    steps(12)
    assert number in cluster.run(*shlex.split(watch))
    assert "chain: ddpm" in cluster.run(*shlex.split(log.replace("tail -F", "cat")))
    cluster.run(*shlex.split(stop))


@pytest.mark.parametrize(("given", "expected"), [(None, "2"), ("3", "3")])
def test_threads_are_those_of_the_allocation(given, expected, cluster, tmp_path, monkeypatch) -> None:
    """Two processes of four cores that are asked for get two each, however many the machine has; what the user says holds."""
    monkeypatch.delitem(cluster.environment, "OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setitem(cluster.environment, "OMP_NUM_THREADS", given)
    words = ("--backend", "slurm", "--cpu", "--nproc", "2", "--dry-run", "--", *TRAINING, str(STEPS))
    text = tiltune(filled(tmp_path), "launch", *words).replace("\nsrun ", "\necho threads $OMP_NUM_THREADS\nfalse ", 1)
    job = cluster.submit(text, tmp_path, "--cpus-per-task=4")
    job.ended()
    assert f"threads {expected}\n" in job.said


@pytest.mark.slow
def test_twenty_preemptions_at_random_moments(cluster, submit, waiting, tmp_path, tmp_path_factory) -> None:
    """Two nodes; grace or none by a coin, and some while the training starts. One run, byte-equal; each start goes on from where
    the last one was, or further."""
    chance = random.Random(7)
    job = submit(2, updates=400)
    for number in range(20):
        job.running()
        assert job.field("Restarts") == str(number), job.said
        time.sleep(chance.uniform(0.0, 25.0))
        grace_of(cluster, chance.choice([0, 60]))
        waiting(lambda number=number: job.field("Restarts") == str(number + 1), 120, f"preemption {number + 1}")
    assert job.ended(600) == {"JobState": "COMPLETED", "ExitCode": "0:0", "Restarts": "20"}, job.said
    taken = [int(found) for found in re.findall(r"going on from .*, after (\d+) steps", job.said)]
    assert taken == sorted(taken), job.said
    assert left(tmp_path) == unstopped(tmp_path_factory.mktemp("whole"), 400)
