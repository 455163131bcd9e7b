"""An hour of random kills: `python tests/soak.py [--minutes 60] [--seed 0] [--processes 1|2]`.

A small real run is trained once with nobody in its way, then again and again from scratch, by the command line: a random signal
at a random moment to all of its processes or to one, then the same command with `--resume auto`, until it ends. After every kill:

- a checkpoint that was good before is good, or was pruned because as many newer ones are good as a run keeps;
- what `last` names is good;
- no process is left over.

At the end of every cycle metrics.jsonl and the policy's weights are, byte for byte, those of the run that nobody stopped. A
checkpoint newer than `last` was not finished by its `save`, and does not count yet. Exit status: 0 if all of this held, 1 if not,
and the folder with the runs then stays.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from tiltune.finetune.runs.checkpoint import FOLDER, LAST, WRITING, checkpoints, last
from tiltune.finetune.runs.checkpointer import CHECKPOINTS
from tiltune.finetune.runs.manifest import name_of, step_of, verify

ENERGY = "def ink(x):\n    return x.flatten(1).mean(1)\n"
# A bit of everything that has a state, and checkpoints often enough that most kills have one to harm.
CONFIG = """
prior: {{source: {folder}/prior, steps: 4}}
energy: {{terms: ["{folder}/ink.py:ink"], cache: true}}
train: {{objective: reinforce_kl, soft_value_updates: 20, forward_rows: 16, population_size: 64, warm_start_updates: 40,
         warm_start_rows: 32, updates: 40, batch_size: 16, ema_decay: 0.9, tempering_ess: 0.9, checkpoint_every: 3}}
device: cpu
"""
COMPARED = ("metrics.jsonl", "policy/diffusion_pytorch_model.safetensors")
TERM, USR1, INT, KILL = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGKILL
# The last is what a cluster does to a run that takes too long to save.
KINDS = ((KILL,), (TERM,), (USR1,), (INT,), (TERM, KILL))
MARK = "TILTUNE_SOAK"  # in the environment of every process of a run, wherever it ends up in the tree
PATIENCE = 150  # seconds after a kill: torchrun gives its processes 100 to save
SAVING = 30  # seconds for processes whose torchrun was killed


@dataclass(frozen=True)
class Kill:
    """What will happen to a run, ``moment`` seconds after its start; in_save: and not before a checkpoint is being written."""

    signals: tuple[signal.Signals, ...]
    moment: float
    in_save: bool
    one: bool
    gap: float

    @property
    def name(self) -> str:
        return " then ".join(number.name for number in self.signals)

    def __str__(self) -> str:
        return f"{self.name} to {'one process' if self.one else 'all'}{' in a save' if self.in_save else ''}"


@dataclass
class Soak:
    """The state of the test. folder: of all runs. seconds: of the run that nobody stopped."""

    folder: Path
    processes: int
    random: random.Random
    seconds: float = 0.0
    kills: Counter[str] = field(default_factory=Counter)
    cycles: int = 0
    lost: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def command(self, run: Path) -> list[str]:
        launch = ["launch", "--cpu", "--nproc", str(self.processes), "--"] if self.processes > 1 else []
        words = ["train", "--config", str(self.folder / "run.yaml"), "--out", str(run), "--resume", "auto"]
        return [sys.executable, "-m", "tiltune", *launch, *words]

    def start(self, run: Path) -> subprocess.Popen[bytes]:
        environment = os.environ | {MARK: str(self.folder), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        with open(self.folder / "log", "ab") as log:
            return subprocess.Popen(self.command(run), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    def drawn(self) -> Kill:
        draw = self.random
        signals, one = draw.choice(KINDS), draw.random() < 0.5
        return Kill(signals, draw.uniform(0, self.seconds), draw.random() < 0.4, one, draw.uniform(0, 0.2))

    def alive(self) -> list[psutil.Process]:
        """Every process of a run, also one whose parent is gone."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended, or is another user's
                continue
        return [process for process in found if process.pid != os.getpid()]

    def stop(self) -> None:
        for process in self.alive():
            send(process, KILL)


def send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return  # it ended by itself a moment ago


def make(folder: Path) -> None:
    """A pipeline by plain diffusers with random weights, an energy and a config."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(4, 1, 1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4, **blocks)
    scheduler: Any = DDPMScheduler(clip_sample=False, variance_type="fixed_large")
    DDPMPipeline(unet, scheduler).save_pretrained(folder / "prior")
    (folder / "ink.py").write_text(ENERGY)
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))


def finished(run: Path) -> bool:
    """Whether the whole training is done; a run.json of a broken-off one says that it is not."""
    try:
        record = json.loads((run / "run.json").read_text())
    except (FileNotFoundError, ValueError):  # ValueError: killed while it was written
        return False
    return not record["interrupted"] and record["stopped"] is None


def good_steps(run: Path) -> list[int]:
    """What `tiltune checkpoint list` calls good, as far as `last` has come."""
    try:
        newest = step_of(last(run / FOLDER))
    except ValueError:
        return []
    return [found.step for found in checkpoints(run / FOLDER) if found.good and found.step <= newest]


def live(soak: Soak, run: Path, kill: Kill | None) -> tuple[int, list[int], bool]:
    """Start the run and, unless it ends before, do ``kill`` to it: its status, the steps that were good before, if it was hit."""
    before, hit = good_steps(run), False
    process = soak.start(run)
    started = time.monotonic()
    if kill is not None:
        while process.poll() is None and time.monotonic() < started + kill.moment:
            time.sleep(0.01)
        before = sorted({*before, *good_steps(run)})
        while kill.in_save and process.poll() is None and not any((run / FOLDER).glob(f"{WRITING}*")):
            time.sleep(0.0005)
        if kill.in_save:
            time.sleep(kill.gap / 4)
        if hit := process.poll() is None:
            everyone = soak.alive()
            targets = soak.random.sample(everyone, 1) if kill.one and everyone else everyone
            for number in kill.signals:
                for target in targets:
                    send(target, number)
                time.sleep(kill.gap)
    try:
        process.wait(PATIENCE + 4 * soak.seconds)
    except subprocess.TimeoutExpired:
        soak.problems.append(f"{run.name}: hangs after {kill or 'nothing at all'}")
        soak.stop()
    return process.wait(), before, hit


def check(soak: Soak, run: Path, before: list[int]) -> None:
    """What a kill must leave behind."""
    until = time.monotonic() + SAVING
    while (left := soak.alive()) and time.monotonic() < until:
        time.sleep(0.05)
    if left:
        soak.problems.append(f"{run.name}: left over: {[' '.join(process.cmdline()) for process in left]}")
        soak.stop()
    folder = run / FOLDER
    now = [found.step for found in checkpoints(folder) if found.good]
    for step in before:
        if (folder / name_of(step)).exists():
            if step not in now:
                soak.lost.append(f"{run.name}: step {step} is damaged: {verify(folder / name_of(step))}")
        elif sum(other > step for other in now) < CHECKPOINTS:
            soak.lost.append(f"{run.name}: step {step} is gone, and only {now} are good")
    if (folder / LAST).exists():
        try:
            if problems := verify(last(folder)):
                soak.problems.append(f"{run.name}: `last` names a damaged checkpoint: {problems}")
        except ValueError as error:
            soak.problems.append(f"{run.name}: {error}")
    elif before:
        soak.problems.append(f"{run.name}: `last` is gone")


def expected(soak: Soak, kill: Kill, status: int) -> bool:
    """Whether a killed run may end so. One killed process of two breaks the other off wherever that is."""
    signals = {code for number in kill.signals for code in (-number, 128 + number)}
    return status in {0, 75, 130, *signals} or (soak.processes > 1 and KILL in kill.signals)


def cycle(soak: Soak, deadline: float) -> None:
    """One run from scratch to its end, killed on the way until the deadline."""
    soak.cycles += 1
    run = soak.folder / f"cycle-{soak.cycles}"
    while not finished(run):
        kill = soak.drawn() if time.monotonic() < deadline else None
        status, before, hit = live(soak, run, kill)
        check(soak, run, before)
        if hit and kill is not None:
            soak.kills[kill.name] += 1
            reached = max(good_steps(run), default=0)
            print(
                f"  cycle {soak.cycles}: {kill} after {kill.moment:.1f} s: status {status}, checkpoint of step {reached}",
                flush=True,
            )
        if not (expected(soak, kill, status) if hit and kill is not None else status == 0):
            soak.problems.append(f"{run.name}: ended with {status} after {kill if hit else 'nothing at all'}")
            return
    for name in COMPARED:
        if (run / name).read_bytes() != (soak.folder / "whole" / name).read_bytes():
            soak.problems.append(f"{run.name}: {name} is not that of the run that nobody stopped")
            return
    shutil.rmtree(run)


def report(soak: Soak, seconds: float) -> bool:
    """Print the summary; returns whether all went well."""
    kills = ", ".join(f"{count} {name}" for name, count in sorted(soak.kills.items()))
    print(f"{soak.kills.total()} kills ({kills}), {soak.cycles} cycles, {len(soak.lost)} lost checkpoints, {seconds:.0f} s")
    for line in (*soak.lost, *soak.problems):
        print(f"WRONG {line}")
    if soak.lost or soak.problems:
        print(*(soak.folder / "log").read_text(errors="replace").splitlines()[-40:], f"all of it: {soak.folder}", sep="\n")
    return not (soak.lost or soak.problems)


def main(minutes: float = 60, seed: int = 0, processes: Literal[1, 2] = 1) -> int:
    """Kill a run at random and see that nothing is lost.

    Args:
        minutes: For how long runs are killed, after the one that nobody stops; the last one then ends undisturbed.
        seed: Of what is done when. A moment's effect depends on the machine, too.
        processes: Of a run.
    """
    started = time.monotonic()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would their children
    soak = Soak(Path(tempfile.mkdtemp(prefix="tiltune-soak-")), processes, random.Random(seed))
    make(soak.folder)
    begun = time.monotonic()
    try:
        if live(soak, soak.folder / "whole", None)[0]:
            soak.problems.append("the run that nobody stops does not end well")
        soak.seconds = time.monotonic() - begun
        deadline = time.monotonic() + 60 * minutes
        print(f"the run takes {soak.seconds:.1f} s", flush=True)
        while time.monotonic() < deadline and not (soak.problems or soak.lost):
            cycle(soak, deadline)
    finally:
        soak.stop()
    well = report(soak, time.monotonic() - started)
    if well:
        shutil.rmtree(soak.folder)
    return 0 if well else 1


if __name__ == "__main__":
    import tyro

    raise SystemExit(tyro.cli(main))
