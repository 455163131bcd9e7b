"""The population where too few prior paths have weight: some of them climb to the target, and the policy adds its own paths."""

from __future__ import annotations

import math
import warnings

import torch

from ...samplers.denoiser import Denoiser
from ...samplers.log_ratio import step_log_ratio
from ..distributed.processes import Processes
from ..energies.evaluation import EnergyEvaluation
from .held_out import HeldOut
from .importance import Bar, drawn_paths, refuse_oversized
from .population import Population, Tempering
from .smc import APART, ClimbError, IslandsApart, climb

CLIMBERS, EACH = 0.25, 100  # share of the prior paths that climbs; of each condition, so many at least
LAYERS = 12  # for which there must be memory: temperatures of a climb, and the last sweeps


def climbed(
    energies: EnergyEvaluation, first: Population, alpha: float, generator: torch.Generator, bar: Bar, *, cools: bool
) -> tuple[Population, HeldOut | None]:
    """What some of these prior paths become on their way to the target; the last island is held out.

    cools: whether a policy can take over (`Preparation.renew`) where the islands of the climb come apart. All prior paths are the
    population then, and nothing is held out, since nothing stands for the target yet.

    Errors: ClimbError where the climb does not reach the target, or there is no memory for it.
    """
    prior, processes = energies.prior, energies.processes
    count = min(len(first), max(round(CLIMBERS * len(first)), EACH * prior.num_conditions))
    paths = first.trajectories.select(torch.arange(count, device=prior.device))
    with processes.together():
        try:
            refuse_oversized(prior, (prior.chain.num_steps + 1, LAYERS * count, *prior.shape), processes, "paths of a climb")
        except ValueError as error:
            raise ClimbError(str(error)) from error
    evaluate, together, gather, apart = energies.evaluate, processes.together, processes.gather, APART if cools else math.inf
    try:
        with bar(None, "climb to the target") as shown:
            state = climb(prior, paths, alpha, generator, evaluate, bar=shown, together=together, gather=gather, apart=apart)
    except IslandsApart as error:  # on all processes
        if processes.main:
            warnings.warn(
                f"too few prior samples have weight, and those that climb to the target lose their way: {error} The warm start"
                f" cools from a temperature that the prior reaches, as far as the policy's own paths carry it, {len(first):,} of"
                " which are drawn each time. Nothing stands for the target meanwhile, so that the run cannot say by how much it"
                " came closer.",
                stacklevel=2,
            )
        return _uncharted(first), None
    last = state.islands - 1
    held_out = HeldOut.draw(prior, state.target(last, alpha), alpha, 1.0, generator, processes.most)
    return state.population(range(last), paths, alpha), held_out


def _uncharted(first: Population) -> Population:
    """The prior's paths, as a population that the policy renews: it cools as the policy follows."""
    paths = first.trajectories
    one, log_z = torch.ones(1, dtype=torch.float64), torch.zeros(1, len(paths.groups), dtype=torch.float64)
    return Population(paths, torch.zeros_like(first.energy), Tempering(0 * one, one, log_z, len(paths)))


def renewed(
    energies: EnergyEvaluation,
    population: Population,
    policy: Denoiser,
    count: int,
    alpha: float,
    generator: torch.Generator,
    bar: Bar,
) -> Population:
    """The population with ``count`` new paths of ``policy`` in place of an older policy's."""
    prior = energies.prior
    log_ratio = step_log_ratio(prior.chain, prior.denoiser, policy, population.climbed).sum(0)
    with bar(count, "policy samples") as shown:
        drawn = drawn_paths(energies, policy, count, "policy samples", generator, shown)
    return population.renewed(alpha, log_ratio, drawn)


def temperature_for_all(population: Population, alpha: float, wanted: float, most: float, processes: Processes) -> float:
    """The highest of the temperatures, from ``alpha`` to ``most``, at which the processes have so many effective paths."""
    own = torch.tensor([population.within_reach(alpha, wanted, most)], dtype=torch.float64, device=processes.device)
    return processes.gather(own).max().item()
