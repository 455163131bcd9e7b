"""The population by importance: prior paths with their energies, weighted by exp(-E/alpha)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch

from ...samplers.prior import Prior
from ...samplers.rollout import in_parts, rollout
from ...samplers.trajectory import Trajectories, rows_at_once
from ..distributed.processes import Processes
from ..energies.error import EnergyError
from ..energies.evaluation import EnergyEvaluation
from .population import Population

Bar = Callable[[int, str], Any]  # (total, label) → a tqdm bar


def importance_population(
    energies: EnergyEvaluation, size: int, alpha: float, generator: torch.Generator, bar: Bar
) -> Population:
    """``size`` prior paths with their energies.

    Errors: ValueError where their states would fill more than half of the memory that is free; EnergyError where none of their
    energies is finite.
    """
    population = Population(prior_paths(energies, size, "prior samples", alpha, generator, bar))
    with energies.processes.together():
        if not torch.isfinite(population.log_weight(alpha)).any():
            raise EnergyError(
                f"none of {size} prior samples has a finite energy: the tilted law is out of the prior's reach here."
            )
    return population


def prior_paths(
    energies: EnergyEvaluation, size: int, label: str, alpha: float, generator: torch.Generator, bar: Bar
) -> Trajectories:
    """The same paths, whatever their energies are. A bar of this label ends with their effective number at ``alpha``."""
    prior, processes = energies.prior, energies.processes
    shape = (prior.chain.num_steps + 1, size, *prior.shape)
    with processes.together():
        refuse_oversized(prior, shape, processes, label)
    states = torch.empty(shape, device=prior.device)
    energy = torch.empty(size, device=prior.device)
    chunk = rows_at_once(prior.shape, prior.device)
    counts = [min(chunk, size - first) for first in range(0, size, chunk)]
    with bar(size, label) as shown:
        drawn = (
            ("", rollout(prior, None, count, generator, on_step=_moving(prior, processes, shown, count // 2))) for count in counts
        )
        first = 0
        for _, part in energies.evaluate_each(drawn):
            assert part.energy is not None
            rows = slice(first, first + len(part))
            states[:, rows], energy[rows] = part.states, part.energy
            first = rows.stop
            shown.update(len(part) - len(part) // 2)  # the other half moved with the rollout
        paths = Trajectories(states, energy=energy)
        # What says whether alpha is within reach.
        shown.set_postfix(effective=f"{Population(paths).ess(alpha):,.0f}")
    return paths


def _moving(prior: Prior, processes: Processes, bar: Any, count: int) -> Callable[[], None]:
    """What to call at every step of a rollout: it listens to the other processes, and moves the bar by ``count`` in all."""
    move = in_parts(count, prior.chain.num_steps, bar.update)

    def step() -> None:
        processes.poll()
        move()

    return step


def refuse_oversized(prior: Prior, shape: tuple[int, ...], processes: Processes, label: str) -> None:
    """ValueError where float32 states [K + 1, N, ...] of this shape would fill more than half of the memory that is free."""
    import psutil

    wanted, device = 4 * math.prod(shape), prior.device
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that want as much of the same memory
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available / here
    if wanted > free / 2:
        raise ValueError(
            f"the {label}, {shape[1] * processes.count:,} trajectories of {shape[0]} states, take"
            f" {wanted / 2**30:,.1f} GB, and {device} has {free / 2**30:,.1f} free; lower bank_size, or do without:"
            " warm_start none, soft_value_updates 0, forward_rows 0, behavior on_policy 1."
        )
