"""A config before a training: its places spelled out, and refused if it is incomplete or wrong. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.run import RunConfig
from ..energies.names import parse_energy
from .energies import absolute_term
from .prompts import from_file
from .task import Task

if TYPE_CHECKING:
    from ..energies.energy import Energy


def resolve(config: RunConfig, folder: Path, task: Task | None, energy: Energy | None) -> RunConfig:
    """The config as it is written into the run's ``folder``: absolute places, and no term where a function takes its place.

    Errors: ValueError for a config that cannot be trained.
    """
    if energy is not None:  # what did not train the run must not stand in its config
        config = replace(config, energy=replace(config.energy, terms=()))
    config = _with_absolute_places(config)
    _refuse_incomplete(config, task, energy)
    _refuse_priors_folder(folder, config)
    if task is not None and task.refuse is not None:
        task.refuse(config)
    return config


def refuse_other_task(config: RunConfig, task: Task | None) -> None:
    """Errors: ValueError where the config names another task than the one that is given, or only one of both is there."""
    if config.task != (None if task is None else task.name):
        raise ValueError(
            f"the config is of the task {config.task!r}, but {None if task is None else task.name!r} is given; in Python, pass"
            " task=tiltune.tasks.NAME.TASK with a config of that task, and none with a prior of your own."
        )


def _with_absolute_places(config: RunConfig) -> RunConfig:
    """The config with the prior's folder and the energies' files spelled out, so that it repeats the run from anywhere; a hub
    id stays."""
    terms = tuple(absolute_term(term) for term in config.energy.terms)
    config = replace(config, energy=replace(config.energy, terms=terms), prior=from_file(config.prior))
    source = config.prior.source
    if source is None or not Path(source).expanduser().exists():
        return config
    return replace(config, prior=replace(config.prior, source=str(Path(source).expanduser().absolute())))


def _refuse_incomplete(config: RunConfig, task: Task | None, energy: Energy | None) -> None:
    """Errors: ValueError where the prior or the energy is missing."""
    if config.task is None and config.prior.source is None:
        raise ValueError("nothing says what to fine-tune: name a task, or a prior (--prior FOLDER) with an energy.")
    refuse_other_task(config, task)
    if energy is None and not config.energy.terms:
        raise ValueError("nothing says what to minimize: name an energy, --energy FILE.py:NAME.")
    for term in config.energy.terms if energy is None else ():
        spec = parse_energy(term)
        if not spec.place and task is None:
            raise ValueError(f"the energy {term!r} names no file, and without a task there is no other place: FILE.py:{term}.")


def _refuse_priors_folder(folder: Path, config: RunConfig) -> None:
    """Errors: ValueError where the run would be written into the prior that it starts from, or over it."""
    prior, run = Path(config.prior.source or "").expanduser().resolve(), folder.resolve()
    if config.prior.source is not None and prior.is_dir() and (run.is_relative_to(prior) or prior.is_relative_to(run)):
        raise ValueError(f"{folder} and the prior {config.prior.source} lie one in the other; name another folder with --out.")
