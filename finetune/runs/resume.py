"""Whether and where a run goes on: is it finished, which checkpoint, is its config the same. Imports no torch."""

from __future__ import annotations

import json
import reprlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..config.run import RunConfig
from ..config.yaml_file import from_mapping, read_yaml, to_yaml
from . import checkpoint
from .folder import refuse_occupied


def is_finished(folder: Path) -> bool:
    """Whether the run in ``folder`` trained to its end: no interrupt and no error stopped it."""
    record = folder / "run.json"
    if not record.exists():
        return False
    ended = json.loads(record.read_text())
    return not (ended["interrupted"] or ended["stopped"])


def refuse_finished(folder: Path, config: RunConfig, resume: str | Path) -> None:
    """For a finished run, which "auto" takes as it is.

    Errors: ValueError where ``resume`` is the path of a checkpoint, and where the run has another config.
    """
    if resume != "auto":
        raise ValueError(f"the run in {folder} is finished; there is nothing to resume.")
    _refuse_other_config(folder / "config.yaml", config)


def starting_checkpoint(folder: Path, config: RunConfig, resume: str | Path | None, overwrite: bool) -> Path | None:
    """The checkpoint that a training goes on from; None where it starts, in a folder that is free for it.

    resume, overwrite: as in `train`.

    Errors: ValueError for a checkpoint that is damaged, of another run or of another config, and for a folder that is taken.
    """
    start = None if resume is None else checkpoint.find(folder / checkpoint.FOLDER, resume)
    if start is None:
        refuse_occupied(folder, overwrite or _has_only_begun(folder, config, resume))
        return None
    if start.parent.resolve() != (folder / checkpoint.FOLDER).resolve():
        raise ValueError(f"{start} is of another run than {folder}; copy that run's folder, and resume the copy.")
    _refuse_other_config(start / "config.yaml", config)
    return start


def _has_only_begun(folder: Path, config: RunConfig, resume: str | Path | None) -> bool:
    """Whether "auto" finds the same run, ended before its first checkpoint: it is started over without a word.

    Where none are kept, an interrupted run may hold hours, and is for its owner to replace.
    """
    path = folder / "config.yaml"
    if resume != "auto" or not path.exists() or path.read_text() != to_yaml(config):
        return False
    return config.train.checkpoint_every > 0 or not (folder / "run.json").exists()


def _refuse_other_config(file: Path, config: RunConfig) -> None:
    """Errors: ValueError where ``file`` holds another run's config than ``config``; what only says how to wait or report may
    differ."""
    theirs = from_mapping(read_yaml(file), RunConfig(), str(file))
    if theirs.energy.workers and config.energy.workers:  # how many there are, and how patient one is, changes no energy
        theirs = replace(theirs, energy=replace(theirs.energy, workers=config.energy.workers, timeout=config.energy.timeout))
    waiting = replace(config.train, process_timeout=theirs.train.process_timeout)
    differing = _difference(asdict(theirs), asdict(replace(config, tracker=theirs.tracker, train=waiting)))
    if differing:
        raise ValueError(
            f"{file.parent} is of a run with another config: {differing}. Resume with the flags of that run, or --config {file}."
        )


def _difference(theirs: dict[str, Any], ours: dict[str, Any], place: str = "") -> str:
    """The first field in which two configs differ, in words; empty where there is none."""
    for name, value in theirs.items():
        if isinstance(value, dict) and isinstance(ours[name], dict) and name != "behavior":
            if found := _difference(value, ours[name], f"{place}{name}."):
                return found
        elif value != ours[name]:
            return f"{place}{name} is {reprlib.repr(value)} there and {reprlib.repr(ours[name])} here"
    return ""
