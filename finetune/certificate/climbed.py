"""The target side of a certificate where too few prior paths have weight: a fresh climb (`smc`), its errors from islands.

The paths of an island have common ancestors, so that their number says nothing of how much they know. Islands are independent:
how far they are apart is the error of all of them, and the design effect (Kish 1965), the variance between islands over that of
as many independent samples, is how many paths make one independent one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...samplers.denoiser import Denoiser
from ...samplers.log_ratio import step_log_ratio
from ...samplers.moves import PARTS
from ...samplers.prior import Prior
from ...samplers.rollout import rollout
from ...samplers.shapes import Index
from ...samplers.trajectory import Trajectories
from ..energies.energy import EnergyMeter
from ..estimators import weighted_mean
from ..populations.population import too_few
from ..populations.smc import APART, Climb, climb

CLIMBERS, ISLANDS = 2000, 8  # paths that climb, at most; independent islands of them
FEW_ANCESTORS = 5  # of an island, below which all that it knows comes from too few prior paths
FROZEN = 0.02  # share of moves that are accepted, below which a part of the chain does not move


@dataclass(frozen=True, eq=False)
class Climbed:
    """Paths of a climb, from the prior to the target.

    log_ratio: the policy's Λ. log_proposal: log density of what drew each path less the prior's. island: of each path; log_z: as
    each island estimates it. doubts: what may be wrong with the climb, in words.
    """

    samples: Float[Tensor, " t *data"]
    energy: Float[Tensor, " t"]
    log_ratio: Float[Tensor, " t"]
    log_proposal: Float[Tensor, " t"]
    island: Int[Tensor, " t"]
    log_z: Float[Tensor, " islands"]
    doubts: tuple[str, ...] = ()

    def select(self, index: Index) -> Climbed:
        """The paths at ``index``."""
        names = ("samples", "energy", "log_ratio", "log_proposal", "island")
        return replace(self, **{name: getattr(self, name)[index] for name in names})

    def cpu(self) -> Climbed:
        """The same on the CPU."""
        names = ("samples", "energy", "log_ratio", "log_proposal", "island", "log_z")
        return replace(self, **{name: getattr(self, name).cpu() for name in names})

    def joined(self, other: Climbed) -> Climbed:
        """The paths of both, on the islands of both."""
        moved = replace(other, island=other.island + len(self.log_z))
        names = ("samples", "energy", "log_ratio", "log_proposal", "island", "log_z")
        rows = {name: torch.cat([getattr(self, name), getattr(moved, name)]) for name in names}
        return replace(self, **rows, doubts=tuple(dict.fromkeys([*self.doubts, *other.doubts])))

    def mean(self, value: Float[Tensor, " t"], weight: Float[Tensor, " t"]) -> tuple[float, float]:
        """Weighted mean and its standard error, by how far the islands are apart."""
        own = [weighted_mean(value[index], weight[index] / weight[index].sum())[0] for index in self._members]
        return weighted_mean(value, weight)[0], (torch.tensor(own).std() / math.sqrt(len(own))).item()

    @property
    def log_z_estimate(self) -> tuple[float, float]:
        """(log Z, its standard error by the islands)."""
        level = (self.log_z.logsumexp(0) - math.log(len(self.log_z))).item()
        return level, ((self.log_z - level).exp().std() / math.sqrt(len(self.log_z))).item()

    def design_effect(self, label: Index, weight: Float[Tensor, " t"], count: int) -> float:
        """How many times the variance of the shares of ``count`` parts is that of as many independent samples; at least 1."""
        hot = torch.nn.functional.one_hot(label.to(weight.device), count).double()
        overall = weight @ hot / weight.sum()
        shares, effective = list[Tensor](), list[float]()
        for index in self._members:
            own = weight[index] / weight[index].sum()
            shares.append(own @ hot[index])
            effective.append(1 / own.square().sum().item())
        between = (torch.stack(shares) - overall).square().sum(1).sum().item() / (len(shares) - 1)
        within = (overall * (1 - overall)).sum().item() * len(effective) / sum(effective)
        return max(1.0, between / within) if within > 0 else 1.0

    @property
    def _members(self) -> list[Index]:
        found = [(self.island == number).nonzero()[:, 0] for number in range(len(self.log_z))]
        return [index for index in found if len(index)]


def climbs(energy: Float[Tensor, " m"], alpha: float, population: str) -> bool:
    """Whether the target side is a climb, where prior samples have these energies; ``population`` as in `TrainConfig`."""
    if population == "auto":
        return too_few(energy, alpha, torch.zeros(len(energy), dtype=torch.long, device=energy.device))
    return population == "smc"


def climbed_side(
    prior: Prior,
    policy: Denoiser,
    meter: EnergyMeter,
    alpha: float,
    size: int,
    generator: torch.Generator,
    bar: Callable[[int | None, str], Any] | None,
) -> Climbed:
    """A fresh climb of at most ``size`` paths of ``prior``. bar: (total, label) → a bar to show it on.

    Errors: ClimbError where it does not reach the target.
    """

    def evaluate(some: Trajectories) -> Trajectories:
        return some.with_(energy=meter(prior.to_data(some.terminal), **some.context))

    first = evaluate(rollout(prior, None, min(size, CLIMBERS), generator))
    with (hidden if bar is None else bar)(None, "target side climbs") as shown:
        state = climb(prior, first, alpha, generator, evaluate, bar=shown, islands=min(ISLANDS, max(2, len(first) // 50)))
    population = state.population(range(state.islands), first, alpha)
    paths, log_proposal = population.trajectories, population.log_proposal
    assert log_proposal is not None and paths.energy is not None
    log_ratio = step_log_ratio(prior.chain, prior.denoiser, policy, paths).sum(0)
    order = torch.cat([index for cells in state.cells for index in cells])
    of_path = torch.empty_like(order)
    for number, cells in enumerate(state.cells):
        of_path[torch.cat(cells)] = number
    island = of_path[order].repeat(len(paths) // len(order))
    samples = prior.to_data(paths.terminal)
    return Climbed(samples, paths.energy, log_ratio, log_proposal, island, state.log_z[:, 0], tuple(_doubts(state)))


def hidden(total: int | None, label: str) -> Any:
    """A bar that nobody sees."""
    from tqdm import tqdm

    return tqdm(total=total, desc=label, disable=True)


def _doubts(state: Climb) -> list[str]:
    """What may be wrong with a climb."""
    found: list[str] = []
    few = min(len(state.ancestor[torch.cat(cells)].unique()) for cells in state.cells)
    if few < FEW_ANCESTORS:
        found.append(f"an island of the target side comes from {few} of the prior's paths")
    lowest = state.moves.accepted.min().item()
    if lowest < FROZEN:
        part = int(state.moves.accepted.argmin())
        found.append(f"of the moves of part {part + 1} of {PARTS} of the chain, the target side accepts {lowest:.1%}")
    apart = state.log_z[:, 0].std().item()
    if apart > APART:
        found.append(f"the islands of the target side differ in log Z by {apart:.2f} nats (one standard deviation)")
    return found
