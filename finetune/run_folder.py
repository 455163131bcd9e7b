"""The folder of a run: what it may hold, and that a run which comes to nothing changes nothing in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILES = (
    "config.yaml",
    "metrics.jsonl",
    "policy",
    "run.json",
    "certificate.json",
    "picture.png",
    "samples.safetensors",
    "samples.png",
)
ASIDE = ".replaced"


def refuse_occupied(folder: Path, overwrite: bool) -> None:
    """Errors: ValueError where ``folder`` holds a run that is not to be overwritten, or is no folder."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder for the run.")
    found = [name for name in FILES if (folder / name).exists()]
    if found and not overwrite:
        raise ValueError(
            f"{folder} already holds a run ({', '.join(found)}); nothing was touched. Name another folder with --out, or add"
            " --overwrite."
        )


@contextmanager
def new_run(folder: Path) -> Iterator[None]:
    """The folder, made and empty of any run; if the block raises, it is again what it was."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    _move(folder, aside)
    try:
        yield
    except BaseException:
        for name in FILES:
            _remove(folder / name)
        if aside.exists():
            _move(aside, folder)
            aside.rmdir()
        for path in made:
            path.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


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
