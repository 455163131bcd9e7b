"""The energy of a run: the terms in its config, as functions that can be called, behind a memory or on workers.

A run's folder is data that may come from anyone, so no code is imported because a folder names it, except from `tiltune.tasks`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.run import RunConfig
from ..energies.names import combine, parse_energy
from .task import Task

if TYPE_CHECKING:
    from ..energies.energy import Energy

SHIPPED = re.compile(r"tiltune\.tasks\.(?!py$)[a-z_0-9]+|tiltune\.finetune\.energies\.pictures")


def load_energies(config: RunConfig, task: Task | None, energy: Energy | None = None) -> Energy:
    """``energy``, or the weighted sum of the config's terms (names without a module are the task's); behind a memory if the
    config asks for one, and on workers if it asks for them."""
    from ..energies.cache import CachedEnergy

    chosen, search = config.energy, None if task is None else task.module
    if chosen.workers:
        from ..energies.workers.pool import EnergyPool

        measured: Energy | Sequence[str] = chosen.terms if energy is None else energy
        if energy is None and all(_is_remote(term) for term in chosen.terms):  # they wait, for which a thread is enough
            measured = combine(chosen.terms, search)
        energy = EnergyPool(measured, chosen.workers, search=search, timeout=chosen.timeout)
    elif energy is None:
        energy = combine(chosen.terms, search)
    return CachedEnergy(energy) if chosen.cache else energy


@contextmanager
def open_energies(config: RunConfig, task: Task | None, energy: Energy | None) -> Iterator[Energy]:
    """`load_energies` for the length of a block: its workers run within the block and end with it."""
    measured = load_energies(config, task, energy)
    if not config.energy.workers:
        yield measured
        return
    from ..energies.cache import CachedEnergy
    from ..energies.workers.pool import EnergyPool

    pool = measured.energy if isinstance(measured, CachedEnergy) else measured
    assert isinstance(pool, EnergyPool)
    with pool:
        yield measured


def absolute_term(term: str) -> str:
    """An energy's term with the place of its file spelled out; a module stays, and so does a file in a folder with ":" or "*"
    in its name, which no term can spell.

    Errors: ValueError for a term that cannot be read.
    """
    place = parse_energy(term).place
    if not (place.endswith(".py") or "/" in place or "\\" in place):
        return term
    absolute = term.replace(place, str(Path(place).expanduser().absolute()), 1)
    try:
        return absolute if parse_energy(absolute).name == parse_energy(term).name else term
    except ValueError:
        return term


def is_shipped(term: str, task: Task | None) -> bool:
    """Whether a term names nothing but what a module of ``tiltune.tasks`` or the energies of pictures define, and not what such
    a module happens to import."""
    spec = parse_energy(term)
    place = spec.place or ("" if task is None else task.module)
    if not SHIPPED.fullmatch(place):
        return False
    try:
        named = getattr(import_module(place), spec.name, None)
    except ModuleNotFoundError:
        return False
    return SHIPPED.fullmatch(getattr(named, "__module__", "")) is not None


def _is_remote(term: str) -> bool:
    spec = parse_energy(term)
    return spec.name == "from_remote" and spec.place in ("tiltune", "tiltune.finetune.energies.workers.remote")
