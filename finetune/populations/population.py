"""A population: whole paths with weights, that stand for the tilted path law."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...samplers.condition import Condition, members
from ...samplers.prior import Prior
from ...samplers.resampling import systematic
from ...samplers.shapes import AnyShape, Index
from ...samplers.trajectory import Trajectories
from ..estimators import adequate_alpha, effective_number

ENOUGH, FEWEST = 0.025, 25  # effective prior paths that can stand for a tilted law: their share, 100 of 4000; their number
FURTHEST = 4.0  # times alpha up to which what is learned at a milder temperature may be continued from it


def trajectories_of(state: dict[str, Any], prior: Prior) -> Trajectories:
    """The trajectories whose states, energy and group a ``state_dict`` holds."""
    kept = {name: state[name].to(prior.device) for name in ("states", "energy", "group")}
    table = prior.condition_table
    condition = None if table is None else Condition(table, kept["group"])
    return Trajectories(kept["states"], energy=kept["energy"], condition=condition)


@dataclass(frozen=True, eq=False)
class Population:
    """Prior trajectories with their energies: reweighted by exp(-E/alpha), each condition's on their own, they are the tilted
    path law.

    trajectories: with an energy, NaN where invalid, +inf where the density is zero.
    """

    trajectories: Trajectories

    @property
    def energy(self) -> Float[Tensor, " batch"]:
        """Of each path."""
        energy = self.trajectories.energy
        assert energy is not None
        return energy

    def __len__(self) -> int:
        return len(self.trajectories)

    def log_weight(self, alpha: float) -> Float[Tensor, " batch"]:
        """-E/alpha, -inf for invalid energies."""
        return torch.nan_to_num(-self.energy / alpha, nan=-torch.inf, neginf=-torch.inf, posinf=torch.inf)

    def weight(self, alpha: float) -> Float[Tensor, " batch"]:
        """float64 ∝ exp(-E/alpha), of sum 1; each condition has as much of it as it has of the paths. Kept for the next draw."""
        if alpha in self._weights:
            return self._weights[alpha]
        weight = torch.empty(len(self), dtype=torch.float64, device=self.energy.device)
        for index in self.trajectories.groups:
            weight[index] = self.log_weight(alpha)[index].double().softmax(0) * (len(index) / len(self))
        self._weights[alpha] = weight
        return weight

    @cached_property
    def _weights(self) -> dict[float, Float[Tensor, " batch"]]:
        return {}

    def log_z(self, alpha: float) -> Float[Tensor, " conditions"]:
        """log mean exp(-E/alpha) over the valid prior samples of each condition: the forward estimate of log Z."""
        valid, log_weight = ~self.energy.isnan(), self.log_weight(alpha)
        kept = [index[valid[index]] for index in self.trajectories.groups]
        return torch.stack([log_weight[index].logsumexp(0) - math.log(max(1, len(index))) for index in kept])

    def ess(self, alpha: float) -> float:
        """Effective number of samples of the tilted law, over all conditions."""
        return effective_number(self.log_weight(alpha), self.trajectories.groups)

    def draw(self, count: int, alpha: float, generator: torch.Generator) -> Int[Tensor, " {count}"]:
        """``count`` indices drawn with probability ∝ exp(-E/alpha), systematically: least variance for given weights.

        Each condition gets an equal number, as far as ``count`` allows.
        """
        weight, groups = self.weight(alpha), self.trajectories.groups
        if len(groups) == 1:
            return systematic(weight, count, generator)
        sizes = [len(range(row, count, len(groups))) for row in range(len(groups))]
        parts = zip(groups, sizes, strict=True)
        index = torch.cat([part[systematic(weight[part], size, generator)] for part, size in parts if size])
        return index[torch.randperm(count, generator=generator, device=index.device)]

    def state_dict(self) -> dict[str, AnyShape]:
        return {"states": self.trajectories.states, "energy": self.energy, "group": self.trajectories.group}

    @classmethod
    def from_state_dict(cls, state: dict[str, AnyShape], prior: Prior) -> Population:
        return cls(trajectories_of(state, prior))


def temperature_within_reach(energy: Float[Tensor, " n"], alpha: float, group: Index | None = None) -> float:
    """The temperature, from ``alpha`` up, at which enough prior samples (`ENOUGH`, `FEWEST`) are effective to stand for the
    tilted law.

    ``alpha`` itself where that is beyond `FURTHEST` times it: few meet a strict constraint, at any temperature. energy: of
    prior samples, NaN where invalid; group: their conditions, of which the one that asks for most decides; None: one for all.
    """

    def within_reach(valid: Float[Tensor, " n"]) -> float:
        share = max(ENOUGH, FEWEST / len(valid)) if len(valid) > FEWEST else 1.0
        found = adequate_alpha(valid, alpha, share)
        return found if found <= FURTHEST * alpha else alpha

    parts = [energy] if group is None else [energy[index] for index in members(group, int(group.max()) + 1)]
    return max(within_reach(part[~part.isnan()]) for part in parts)
