"""The folder of a run: what it may hold, and that a run which comes to nothing changes nothing in it.

A run that is being replaced lies in `ASIDE` until the new one is finished (run.json, written last), so that it survives even a
process that is killed: whoever overwrites the folder next moves it back first.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config.run import RunConfig
from ..config.yaml_file import from_mapping, read_yaml
from .lock import RunLock

FILES = (
    "config.yaml",
    "metrics.jsonl",
    "policy",
    "run.json",
    "checkpoints",
    "tracker",
    "certificate.json",
    "picture.png",
    "pictures",
    "samples.safetensors",
    "samples.png",
)
SECTIONS = {"prior", "energy", "policy", "train", "certificate"}
# A whole run; what else lies in the folder is another's.
ASIDE = ".replaced"
# A part of a run, on its way to or from `ASIDE`; the rest of it lies in the folder.
MOVING = ".replacing"


def refuse_occupied(folder: Path, overwrite: bool) -> None:
    """Errors: ValueError where ``folder`` is no folder, cannot be written, holds a run that is not to be overwritten, or files
    that are no run's."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder for the run.")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise ValueError(f"{folder} cannot be written: {nearest} is not a folder that you may write in. Name another with --out.")
    found = [name for name in (*FILES, ASIDE, MOVING) if (folder / name).exists()]
    if overwrite:
        if found and not {ASIDE, MOVING} & set(found):  # these are a run's own
            _refuse_foreign(folder, found)
    elif found:
        raise ValueError(
            f"{folder} already holds a run ({', '.join(found)}); nothing was touched. Name another folder with --out, or add"
            " --overwrite."
        )


def _refuse_foreign(folder: Path, found: list[str]) -> None:
    """Errors: ValueError where config.yaml is not one that a run has written, every section of it."""
    path = folder / "config.yaml"
    try:
        values = read_yaml(path) if path.exists() else {}
        from_mapping(values, RunConfig(), str(path))
        why = "" if values.keys() >= SECTIONS else "there is no config.yaml with all sections of a run"
    except ValueError as error:
        why = str(error).rstrip(".")
    if why:
        raise ValueError(
            f"{folder} holds {', '.join(found)}, but no run that could be overwritten: {why}. Nothing was touched; name another"
            " folder with --out, or move these files away."
        )


@contextmanager
def new_run(folder: Path, kept: Callable[[], bool]) -> Iterator[None]:
    """The folder, made and empty of any run.

    If the block raises while ``kept()`` is false, the folder is again what it was. Later it stays as it is; the run that was
    there before goes when the new one is finished.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    undone = False
    try:
        with RunLock(folder):
            _recover(folder)
            _put_aside(folder)
            try:
                yield
            except BaseException:
                if not kept() and not _finished(folder):
                    _put_back(folder)
                    undone = True
                raise
            finally:
                if _finished(folder):
                    shutil.rmtree(folder / ASIDE, ignore_errors=True)
    finally:
        if undone:
            for path in made:
                path.rmdir()


def remove_run(folder: Path) -> None:
    """Remove every file of a run from ``folder``; the caller holds its `RunLock`."""
    for name in FILES:
        _remove(folder / name)


def _finished(folder: Path) -> bool:
    return (folder / "run.json").exists()


def _recover(folder: Path) -> None:
    """Undo what a killed process left half done: the run in the folder is whole again, and the only one."""
    if (folder / MOVING).exists() or ((folder / ASIDE).exists() and not _finished(folder)):
        _put_back(folder)
    shutil.rmtree(folder / ASIDE, ignore_errors=True)


def _put_aside(folder: Path) -> None:
    _move(folder, folder / MOVING)
    if (folder / MOVING).exists():
        (folder / MOVING).rename(folder / ASIDE)


def _put_back(folder: Path) -> None:
    """The run in `ASIDE`, if any, in place of what is in the folder; killed anywhere, it can be done again."""
    if not (folder / MOVING).exists():
        remove_run(folder)
        if (folder / ASIDE).exists():
            (folder / ASIDE).rename(folder / MOVING)
    if (folder / MOVING).exists():
        _move(folder / MOVING, folder)
        (folder / MOVING).rmdir()


def _move(source: Path, target: Path) -> None:
    for name in FILES:
        if (source / name).exists():
            target.mkdir(exist_ok=True)
            (source / name).rename(target / name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def holds_anything(path: Path) -> bool:
    """Whether something is there that a new folder would overwrite: a file, or a folder that is not empty."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))
