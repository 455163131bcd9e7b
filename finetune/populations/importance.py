"""The population by importance: prior paths with their energies, weighted by exp(-E/alpha)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch

from ...samplers.condition import selected
from ...samplers.denoiser import Denoiser
from ...samplers.prior import Prior
from ...samplers.rollout import in_parts, rollout
from ...samplers.trajectory import Trajectories, rows_at_once
from ..distributed.processes import Processes
from ..energies.error import EnergyError
from ..energies.evaluation import EnergyEvaluation
from .population import FEWEST, Population

Bar = Callable[[int | None, str], Any]  # (total, label) → a tqdm bar


def importance_population(
    energies: EnergyEvaluation, size: int, alpha: float, generator: torch.Generator, bar: Bar, keep_outputs: bool = False
) -> Population:
    """``size`` prior paths with their energies. keep_outputs: and with what the prior's network said along them.

    Errors: ValueError where their states would fill more than half of the memory that is free, and where a condition gets fewer
    than `FEWEST`; EnergyError where none of a condition's energies is finite.
    """
    prior, count = energies.prior, energies.prior.num_conditions
    with energies.processes.together():
        if size < FEWEST * count and count > 1:
            raise ValueError(
                f"the population is {size} paths here, for {count} conditions, each with a law of its own that needs {FEWEST}"
                " paths at least; name fewer of them, or raise population_size."
            )
    population = Population(prior_paths(energies, size, "prior samples", alpha, generator, bar, keep_outputs))
    with energies.processes.together():
        finite = torch.isfinite(population.log_weight(alpha))
        for row, index in enumerate(population.trajectories.groups):
            if not finite[index].any():
                of = "" if prior.condition_table is None else f" of {prior.condition_table.names[row]}"
                raise EnergyError(
                    f"none of {len(index)} prior samples{of} has a finite energy: the tilted law is out of the prior's reach"
                    " here."
                )
    return population


def prior_paths(
    energies: EnergyEvaluation,
    size: int,
    label: str,
    alpha: float,
    generator: torch.Generator,
    bar: Bar,
    keep_outputs: bool = False,
) -> Trajectories:
    """The same paths, whatever their energies are. A bar of this label ends with their effective number at ``alpha``."""
    with bar(size, label) as shown:
        paths = drawn_paths(energies, None, size, label, generator, shown, keep_outputs)
        # What says whether alpha is within reach.
        shown.set_postfix(effective=f"{Population(paths).ess(alpha):,.0f}")
    return paths


def drawn_paths(
    energies: EnergyEvaluation,
    policy: Denoiser | None,
    size: int,
    label: str,
    generator: torch.Generator,
    shown: Any,
    keep_outputs: bool = False,
) -> Trajectories:
    """``size`` paths of the prior, or of ``policy`` with their log-ratios to it, with their energies. shown: a bar of ``label``.

    Errors: ValueError where their states would fill more than half of the memory that is free.
    """
    prior, processes = energies.prior, energies.processes
    shape, kernels = (prior.chain.num_steps + 1, size, *prior.shape), prior.chain.num_kernels
    with processes.together():
        refuse_oversized(prior, shape, processes, label, kernels * keep_outputs)
    states = torch.empty(shape, device=prior.device)
    outputs = torch.empty(kernels, *shape[1:], device=prior.device) if keep_outputs else None
    energy = torch.empty(size, device=prior.device)
    ratio = None if policy is None else torch.empty(prior.chain.num_kernels, size, device=prior.device)
    chunk = rows_at_once(prior.shape, prior.device)
    condition = prior.condition(size)
    parts = [slice(first, min(first + chunk, size)) for first in range(0, size, chunk)]

    def draw(rows: slice) -> Trajectories:
        count, own = rows.stop - rows.start, selected(condition, rows)
        moving = _moving(prior, processes, shown, count // 2)
        return rollout(prior, policy, count, generator, condition=own, on_step=moving, keep_outputs=keep_outputs)

    drawn = (("", draw(rows)) for rows in parts)
    for rows, (_, part) in zip(parts, energies.evaluate_each(drawn), strict=True):
        assert part.energy is not None
        states[:, rows], energy[rows] = part.states, part.energy
        if outputs is not None:
            assert part.prior_outputs is not None
            outputs[:, rows] = part.prior_outputs
        if ratio is not None:
            assert part.step_log_ratio is not None
            ratio[:, rows] = part.step_log_ratio
        shown.update(len(part) - len(part) // 2)  # the other half moved with the rollout
    return Trajectories(states, ratio, energy=energy, condition=condition, prior_outputs=outputs)


def _moving(prior: Prior, processes: Processes, bar: Any, count: int) -> Callable[[], None]:
    """What to call at every step of a rollout: it listens to the other processes, and moves the bar by ``count`` in all."""
    move = in_parts(count, prior.chain.num_steps, bar.update)

    def step() -> None:
        processes.poll()
        move()

    return step


def refuse_oversized(prior: Prior, shape: tuple[int, ...], processes: Processes, label: str, outputs: int = 0) -> None:
    """ValueError where float32 states [K + 1, N, ...] of this shape, and so many steps' outputs beside them, would fill more than
    half of the memory that is free."""
    import psutil

    wanted, device = 4 * (shape[0] + outputs) * math.prod(shape[1:]), prior.device
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that want as much of the same memory
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available / here
    if wanted > free / 2:
        raise ValueError(
            f"the {label}, {shape[1] * processes.count:,} trajectories of {shape[0]} states, take"
            f" {wanted / 2**30:,.1f} GB, and {device} has {free / 2**30:,.1f} free; lower population_size, or do without:"
            " warm_start none, soft_value_updates 0, forward_rows 0, behavior on_policy 1."
        )
