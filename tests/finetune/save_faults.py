"""Saves that are cut off at every point: a script without torch, so that a child is forked in a millisecond.

`python save_faults.py FOLDER MODE`, MODE being kill, full, order, or kill with a naive save (in_place, prune_first); prints JSON.

A point is a call that changes the disk (mkdir, rename, replace, unlink, rmdir, fsync) and the middle of every write.
"""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tiltune.finetune.runs.checkpoint import checkpoints, find, save
from tiltune.finetune.runs.manifest import seal

CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")


@contextmanager
def points(strike: Callable[[str, Any], None]) -> Iterator[None]:
    """Call ``strike(name, first argument)`` before every call of `CALLS`, and at the start and in the middle of every write."""
    originals = {name: getattr(os, name) for name in CALLS}
    opened = io.open

    def struck(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            strike(name, arguments[0])
            return originals[name](*arguments, **named)

        return call

    def opening(path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if "w" not in mode:
            return opened(path, mode, *arguments, **named)
        strike("open", path)
        return Halved(opened(path, mode, *arguments, **named), strike)

    try:
        for name in CALLS:
            setattr(os, name, struck(name))
        io.open = builtins.open = opening  # pyright: ignore[reportAttributeAccessIssue]
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
        io.open = builtins.open = opened


class Halved:
    """A file that is struck when half of a write has reached it."""

    def __init__(self, file: Any, strike: Callable[[str, Any], None]) -> None:
        self.file, self.strike = file, strike

    def write(self, data: Any) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.strike("write", self.file.name)
        self.file.write(data[len(data) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Halved:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


# --- what is saved, and how ------------------------------------------------------------------------------------------


def content(step: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "policy").mkdir()
        (folder / "policy" / "weights").write_bytes(bytes([step]) * 1000)
        (folder / "state.json").write_text(f"state of {step}")

    return write


def in_place(folder: Path, step: int, write: Callable[[Path], None], *, keep: int) -> None:
    """Naive: one folder, written over."""
    target = folder / f"step-{step:08d}"
    for path in folder.glob("step-*"):
        shutil.rmtree(path)
    target.mkdir(parents=True)
    write(target)
    seal(target, step)
    (folder / "last").write_text(target.name)


def prune_first(folder: Path, step: int, write: Callable[[Path], None], *, keep: int) -> None:
    """Naive: makes room before it writes."""
    older = sorted(folder.glob("step-*"), reverse=True)
    for path in older[keep - 1 :]:
        shutil.rmtree(path)
    save(folder, step, write, keep=keep)


def prepare(folder: Path, scenario: str) -> int | None:
    """Fill ``folder``; returns the step of the good checkpoint that must survive, or None."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if scenario == "first":
        return None
    for step in (10, 20):
        save(folder, step, content(step), keep=2)
    if scenario == "over a damaged one of the same step":
        shutil.copytree(folder / "step-00000020", folder / "step-00000030")  # its manifest is of another step
        (folder / "last").write_text("step-00000030\n")
    return 20


SCENARIOS = {"first": 1, "next": 2, "next, keeping one": 1, "over a damaged one of the same step": 2}


# --- the faults ------------------------------------------------------------------------------------------------------


def losses(folder: Path, step: int | None, when: str) -> list[str]:
    """What is wrong with ``folder`` after a save of step 30 was cut off: nothing, if ``step`` or 30 loads and 30 can be saved."""
    found: list[str] = []
    try:
        path = find(folder, "auto")
        now = None if path is None else int(path.name[5:])
        if now not in (step, 30):
            found.append(f"{when}: {now} instead of {step}")
        elif path is not None and (path / "state.json").read_text() != f"state of {now}":
            found.append(f"{when}: another content")
        if any(not checkpoint.good for checkpoint in checkpoints(folder) if checkpoint.step != 30):
            found.append(f"{when}: what is half deleted is named like a checkpoint")
        if (pointer := folder / "last").exists() and pointer.read_text() not in ("step-00000020\n", "step-00000030\n"):
            found.append(f"{when}: last says {pointer.read_text()!r}")
    except ValueError as error:
        found.append(f"{when}: {error}")
    try:
        save(folder, 30, content(30), keep=2)
        steps = [checkpoint.step for checkpoint in checkpoints(folder) if checkpoint.good]
        if steps[0] != 30 or find(folder, "auto") != folder / "step-00000030":
            found.append(f"{when}: the next save gave {steps}")
        if any(path.name.startswith(".") for path in folder.iterdir()):
            found.append(f"{when}: left behind {sorted(path.name for path in folder.iterdir())}")
    except (ValueError, OSError) as error:
        found.append(f"{when}: the next save failed: {error}")
    return found


def kill(folder: Path, saving: Callable[..., Any]) -> dict[str, Any]:
    """SIGKILL at the first point of a save, at the second, …, until one completes; ends with the first loss."""
    count = 0
    for scenario, keep in SCENARIOS.items():
        for at in itertools.count():
            step = prepare(folder, scenario)
            if (child := os.fork()) == 0:
                seen = itertools.count()

                def strike(name: str, _: Any, seen: Iterator[int] = seen, at: int = at) -> None:
                    if next(seen) == at:
                        os.kill(os.getpid(), signal.SIGKILL)

                with points(strike):
                    saving(folder, 30, content(30), keep=keep)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            if found := losses(folder, step, f"{scenario}, killed at point {at}"):
                return {"points": count, "losses": found}
            if status == 0:
                break
            assert os.WTERMSIG(status) == signal.SIGKILL
            count += 1
    return {"points": count, "losses": []}


def full(folder: Path) -> dict[str, Any]:
    """The disk full from the first point of a save on, from the second, …: what makes something fails, what removes does not."""
    found, count = [], 0
    for scenario, keep in SCENARIOS.items():
        for at in itertools.count():
            step = prepare(folder, scenario)
            seen = itertools.count()

            def strike(name: str, _: Any, seen: Iterator[int] = seen, at: int = at) -> None:
                if name not in ("unlink", "rmdir") and next(seen) >= at:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            try:
                with points(strike):
                    save(folder, 30, content(30), keep=keep)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                count += 1
                if (folder / ".writing-step-00000030").exists():
                    found.append(f"{scenario}, full from point {at}: the half-written one still takes space")
                found += losses(folder, step, f"{scenario}, full from point {at}")
            else:
                break
    return {"points": count, "losses": found}


def order(folder: Path) -> list[list[Any]]:
    """[name, path or None, inode or None] of what a save with pruning does to the disk, in order."""
    prepare(folder, "next")
    events: list[list[Any]] = []

    def note(name: str, what: Any) -> None:
        inode = None
        with suppress(OSError):
            inode = os.stat(what).st_ino
        events.append([name, None if isinstance(what, int) else Path(what).name, inode])

    with points(note):
        save(folder, 30, content(30), keep=1)
    events.append(["tree", {str(p.relative_to(folder)): p.stat().st_ino for p in [folder, *folder.rglob("*")]}, None])
    return events


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    here, mode = Path(sys.argv[1]) / "checkpoints", sys.argv[2]
    modes: dict[str, Callable[[], Any]] = {
        "kill": lambda: kill(here, save),
        "in_place": lambda: kill(here, in_place),
        "prune_first": lambda: kill(here, prune_first),
        "full": lambda: full(here),
        "order": lambda: order(here),
    }
    print(json.dumps(modes[mode]()))
    assert "torch" not in sys.modules
