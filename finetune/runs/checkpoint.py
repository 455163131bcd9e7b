"""The checkpoints of a run as folders: written so that a killed process, a full disk or a power cut never costs a good one.

    checkpoints/step-00000040/    what `save`'s writer put there, and manifest.json: the format, the step, and every file's
                                  size and SHA-256
    checkpoints/last              the name of the folder to go on from

A folder gets its name when all of it is on the disk. Names with a dot in front are being written or deleted: the next `save`
removes what a killed process left of them. One process writes, which holds the run's `RunLock`; any number may read.
What such folders hold is data: nothing in them is run, and no name in them leads out of them. Imports no torch.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .manifest import MANIFEST, is_checkpoint, name_of, replace_file, seal, step_of, sync, verify

FOLDER = "checkpoints"
LAST = "last"
WRITING = ".writing-"
DELETING = ".deleting-"


@dataclass(frozen=True)
class Checkpoint:
    """A folder that is named like a checkpoint. size: of its files, in bytes. problems: in words; none in a good one."""

    path: Path
    step: int
    size: int
    problems: tuple[str, ...]

    @property
    def good(self) -> bool:
        return not self.problems


# --- writing ---------------------------------------------------------------------------------------------------------


def save(folder: Path, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
    """The checkpoint of ``step`` in ``folder``, a run's checkpoints; returns its path.

    write: fills the empty folder that it is given with files, in subfolders if it likes. keep: how many good checkpoints remain,
    this one among them. The order is: everything to the disk, the folder's name, `last`, and only then the pruning of older ones.
    A checkpoint of the same step is left as it is if it is good (see `rewind`), and replaced if it is damaged.

    Errors: ValueError for a keep or a step that no run can have. Whatever ``write`` or the disk raises; then the checkpoints
    that were there still are, and nothing half-written takes up space.
    """
    if keep < 1 or step < 0:
        raise ValueError(f"keep is {keep} and step {step}; keep at least 1 checkpoint, of a step that is not negative.")
    folder.mkdir(parents=True, exist_ok=True)
    sync(folder.parent)
    _sweep(folder)
    target = folder / name_of(step)
    if verify(target):
        _write(target, step, write)
    sync(folder)
    _point(target)
    good = 1
    for path in _folders(folder):
        if path == target:
            continue
        if good == keep:
            _hide(path)
        elif not verify(path):
            good += 1
    _sweep(folder)
    return target


def is_good(folder: Path, step: int) -> bool:
    """Whether there is a good checkpoint of ``step``, which `save` would leave as it is."""
    return not verify(folder / name_of(step))


def rewind(folder: Path, step: int) -> None:
    """Let the run in ``folder`` go on from ``step``: `last` names it, and checkpoints of later steps are deleted.

    They belong to another course of the run. Without this, `save` would find them good and leave them as they are.

    Errors: ValueError where there is no good checkpoint of ``step``; then nothing is deleted.
    """
    target = folder / name_of(step)
    if problems := verify(target):
        raise ValueError(_refusal(target, problems))
    _point(target)
    for path in _folders(folder):
        if step_of(path) > step:
            _hide(path)
    _sweep(folder)


def being_written(folder: Path, step: int) -> Path:
    """The folder that `save` gives to its writer: other processes of the run may fill it as well."""
    return folder / (WRITING + name_of(step))


def _write(target: Path, step: int, write: Callable[[Path], None]) -> None:
    temporary = being_written(target.parent, step)
    try:
        temporary.mkdir()
        write(temporary)
        seal(temporary, step)
        if os.path.lexists(target):
            _hide(target)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _point(target: Path) -> None:
    """Make `last` name ``target``, at once or not at all."""
    replace_file(target.with_name(LAST), target.name + "\n")


def _hide(path: Path) -> None:
    """The first half of deleting: what is half deleted must not be named like a checkpoint."""
    path.rename(path.with_name(DELETING + path.name))
    sync(path.parent)


def _sweep(folder: Path) -> None:
    """Remove what is hidden. Where that fails, as with files open elsewhere on a network disk, the next save tries again."""
    for path in folder.iterdir():
        if path.name.startswith((WRITING, DELETING)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


# --- reading ---------------------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Checkpoint]:
    """What is in ``folder``, newest first, good or not; empty where there is no such folder."""
    found = []
    for path in _folders(folder):
        problems = verify(path)
        size = sum(os.lstat(Path(inner, name)).st_size for inner, _, names in os.walk(path) for name in names)
        if path.is_dir():  # else it was pruned in the meantime
            found.append(Checkpoint(path, step_of(path), size, tuple(problems)))
    return found


def last(folder: Path) -> Path:
    """The checkpoint in ``folder`` that `last` names, unverified.

    Errors: ValueError where it names none.
    """
    pointer = folder / LAST
    try:
        with open(pointer, encoding="utf-8") as file:
            name = file.read(100).strip()
    except FileNotFoundError:
        raise ValueError(f"{pointer} is missing.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{pointer} cannot be read: {error}.") from None
    if not is_checkpoint(folder / name) or "/" in name or not (folder / name).is_dir():
        raise ValueError(f"{pointer} names {name!r}, and {folder} has no such checkpoint.")
    return folder / name


def find(folder: Path, which: str | Path) -> Path | None:
    """The checkpoint to go on from, verified.

    which: "auto" takes the one in ``folder``, a run's checkpoints, that `last` names; where that is not good, the newest good one
    with a warning that says what was wrong; None where there is none at all. Anything else is the path of a checkpoint, or of a
    run, meaning the one that its `last` names, and nothing takes its place.

    Errors: ValueError for a path without a good checkpoint, and for "auto" where all checkpoints are damaged.
    """
    if which == "auto":
        return _newest_good(folder)
    path = Path(which).expanduser()
    if not (path / MANIFEST).exists() and (path / FOLDER).is_dir():
        path = last(path / FOLDER)
    if problems := verify(path):
        raise ValueError(_refusal(path, problems))
    return path


def _folders(folder: Path) -> list[Path]:
    """What is named like a checkpoint, newest first."""
    there = folder.iterdir() if folder.is_dir() else ()
    return sorted(filter(is_checkpoint, there), key=step_of, reverse=True)


def _newest_good(folder: Path) -> Path | None:
    paths = _folders(folder)
    if not paths:
        return None
    wrong = []
    try:
        named = last(folder)
        if not (problems := verify(named)):
            return named
        wrong.append(f"{named.name}: {', '.join(problems)}")
        paths.remove(named)
    except ValueError as error:
        wrong.append(str(error).rstrip("."))
    for path in paths:
        if not (problems := verify(path)):
            warnings.warn(f"going on from {path}, because the last checkpoint is not good: {'; '.join(wrong)}.", stacklevel=3)
            return path
        wrong.append(f"{path.name}: {', '.join(problems)}")
    raise ValueError(
        f"no checkpoint in {folder} is good, and starting over is not for a resume to decide: {'; '.join(wrong)}. Move the folder"
        " away to start over."
    )


def _refusal(path: Path, problems: list[str]) -> str:
    return f"{path} is no good checkpoint, and none is taken in its place: {'; '.join(problems)}."
