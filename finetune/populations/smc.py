"""Tempered sequential Monte Carlo on whole paths: prior paths that climb to the target by temperature, and what Z is on the way.

    beta from 0 to 1       the next one keeps a share `KEPT` of the paths effective (arXiv 1303.3123)
    resample               systematically, within each island
    move                   `Moves`, at the new temperature

The product of the mean weights estimates Z (Del Moral et al. 2006): without bias where temperatures and sizes of moves are
given, and but for O(1 / N) here, where they follow the paths. Its error comes from islands, which share nothing but these
settings: what a population lost it cannot know from within.

The paths after the moves of every temperature stay. Together they are a sample of the mixture of all the tempered laws, from the
prior to the target, and are weighed as such (the balance heuristic of Veach and Guibas 1995; multiple histograms in
physics): `mixture` makes one `Population` of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...samplers.moves import Moves
from ...samplers.noise_paths import NoisePaths, noise_of
from ...samplers.prior import Prior
from ...samplers.resampling import systematic
from ...samplers.trajectory import Trajectories, concatenate
from .population import Population, Tempering

Together = Callable[[], AbstractContextManager[None]]
Gather = Callable[[Float[Tensor, "n ..."]], Float[Tensor, "m ..."]]  # of all processes

ISLANDS = 5
KEPT = 0.5
TEMPERATURES = 100  # at most
SWEEPS, LAST_SWEEPS = 1, 3  # of moves at each temperature, at the target's own
APART = 1.0  # nats of standard deviation between the islands' log Z, above which they have not seen the same law


class ClimbError(ValueError):
    """The target is out of the climb's reach."""


class IslandsApart(ClimbError):
    """The islands have not seen the same law."""


@dataclass(eq=False)
class Climb:
    """N paths on their way to the target, on islands.

    cells: by island and condition, the indices of its paths, which stay.
    log_tilt: -E/alpha of each path. log_z: log mean exp(beta · log_tilt), as each island estimates it for each condition.
    ancestor: the path of the prior that each one came from. betas: all temperatures so far, the last one that of the paths;
    at_beta: log_z at each of them. layers: the paths after the moves, with the number of their temperature.
    """

    paths: NoisePaths
    log_tilt: Float[Tensor, " n"]
    cells: list[list[Int[Tensor, " _"]]]
    log_z: Float[Tensor, " islands conditions"] = field(init=False)
    ancestor: Int[Tensor, " n"] = field(init=False)
    betas: list[float] = field(default_factory=lambda: [0.0])
    at_beta: list[Float[Tensor, " islands conditions"]] = field(init=False)
    layers: list[tuple[int, Trajectories]] = field(init=False)
    moves: Moves = field(default_factory=Moves)

    def __post_init__(self) -> None:
        self.log_z = torch.zeros(len(self.cells), len(self.cells[0]), dtype=torch.float64)
        self.at_beta = [self.log_z]
        self.ancestor = torch.arange(len(self.log_tilt), device=self.log_tilt.device)
        self.layers = []

    @property
    def islands(self) -> int:
        return len(self.cells)

    def resample(self, beta: float, generator: torch.Generator) -> None:
        """Go to the next temperature: its weights go into log Z, and each island is resampled by them.

        Errors: ClimbError where an island has no path of finite energy left.
        """
        log_weight = (beta - self.betas[-1]) * self.log_tilt.double()
        gained, chosen = torch.zeros_like(self.log_z), torch.arange(len(log_weight), device=log_weight.device)
        for number, cells in enumerate(self.cells):
            for row, index in enumerate(cells):
                if not log_weight[index].isfinite().any():
                    raise ClimbError(
                        "an island of the population has no path of finite energy left; raise population_size, or alpha,"
                        " or take --population importance."
                    )
                gained[number, row] = log_weight[index].logsumexp(0) - math.log(len(index))
                chosen[index] = index[systematic(log_weight[index].softmax(0), len(index), generator)]
        self.log_z = self.log_z + gained
        self.paths, self.log_tilt, self.ancestor = self.paths.select(chosen), self.log_tilt[chosen], self.ancestor[chosen]
        self.betas.append(beta)
        self.at_beta.append(self.log_z)

    def _of(self, islands: range) -> Int[Tensor, " _"]:
        """The paths of these islands."""
        return torch.cat([index for number in islands for index in self.cells[number]])

    def target(self, island: int, alpha: float) -> Population:
        """The paths of one island at the target itself."""
        index = self._of(range(island, island + 1))
        paths = concatenate([layer.select(index) for number, layer in self.layers if self.betas[number] == 1])
        return Population(paths, Population(paths).log_tilt(alpha))

    def population(self, islands: range, first: Trajectories, alpha: float) -> Population:
        """What these islands went through: the prior's own paths ``first``, and the paths of all layers."""
        own = self._of(islands)
        paths = concatenate([first.select(own), *(layer.select(own) for _, layer in self.layers)])
        kept = torch.tensor([0, *(number for number, _ in self.layers)])
        share = torch.bincount(kept, minlength=len(self.betas)).double() / len(kept)
        log_z = torch.stack([_log_mean_exp(each[islands.start : islands.stop]) for each in self.at_beta])
        tempering = Tempering(torch.tensor(self.betas, dtype=torch.float64), share, log_z, len(paths))
        return Population(paths, tempering.log_density(Population(paths).log_tilt(alpha), paths.group), tempering)


def _log_mean_exp(value: Float[Tensor, " islands conditions"]) -> Float[Tensor, " conditions"]:
    return value.logsumexp(0) - math.log(len(value))


def climb(
    prior: Prior,
    paths: Trajectories,
    alpha: float,
    generator: torch.Generator,
    evaluate: Callable[[Trajectories], Trajectories],
    *,
    bar: Any,
    together: Together = nullcontext,
    gather: Gather = lambda value: value,
    islands: int = ISLANDS,
    apart: float = math.inf,
) -> Climb:
    """Take paths of the prior, with their energies, to the target at ``alpha``.

    evaluate: gives trajectories their energies. bar: moves by the paths that moved. together, gather: of several processes
    (`Processes`), which climb at one pace, each on islands of its own. apart: the standard deviation of log Z over all islands,
    nats, above which it ends.

    Errors: IslandsApart where they are; ClimbError where an island has no path of finite energy left, or `TEMPERATURES` do not
    suffice.
    """
    assert paths.energy is not None
    log_tilt = Population(paths).log_tilt(alpha)
    island = torch.arange(len(paths), device=log_tilt.device) * islands // len(paths)
    cells = [[index[island[index] == number] for index in paths.groups] for number in range(islands)]
    state = Climb(noise_of(prior, paths), log_tilt, cells)

    def tempered(some: Trajectories) -> Float[Tensor, " batch"]:
        bar.update(len(some))
        return state.betas[-1] * Population(evaluate(some)).log_tilt(alpha)

    while (before := state.betas[-1]) < 1:
        with together():
            if len(state.betas) > TEMPERATURES:
                raise ClimbError(f"{TEMPERATURES} temperatures have not reached the target; raise alpha, or draw more paths.")
        own = [torch.cat([cells[row] for cells in state.cells]) for row in range(len(state.cells[0]))]
        beta = min(next_beta(gather(state.log_tilt[index]).double(), before) for index in own)
        with together():
            state.resample(beta, generator)
        bar.set_postfix(beta=f"{beta:.3g}")
        if (found := gather(state.log_z.to(log_tilt.device)).std(0).max().item()) > apart:
            raise IslandsApart(f"at beta = {beta:.2g} its islands differ in log Z by {found:.1f} nats (one standard deviation).")
        for sweep in range(LAST_SWEEPS if beta == 1 else SWEEPS):
            paths_now, value = state.moves.sweep(prior, state.paths, beta * state.log_tilt, tempered, generator)
            state.paths, state.log_tilt = paths_now, value / beta
            if beta == 1 or sweep == SWEEPS - 1:
                energy = -alpha * state.log_tilt
                state.layers.append((len(state.betas) - 1, state.paths.trajectories.with_(energy=energy)))
    return state


def next_beta(log_tilt: Float[Tensor, " n"], beta: float) -> float:
    """The largest temperature up to 1 at which a share `KEPT` of the paths that have a density at all stays effective."""
    possible = log_tilt[log_tilt.isfinite()]

    def kept(to: float) -> float:
        log_weight = (to - beta) * possible
        return (2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)).exp().item() / max(1, len(possible))

    if kept(1.0) >= KEPT:
        return 1.0
    low, high = beta, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if kept(middle) >= KEPT else (low, middle)
    return high
