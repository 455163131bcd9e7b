"""A population: whole paths with weights, that stand for the tilted path law at any temperature.

The paths are drawn by a proposal. It is the prior, or, where few of the prior's paths have weight, the mixture of the tempered
laws that a climb went through (`smc`). At an infinite temperature the tilted law is the prior itself.
"""

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
from ...samplers.shapes import Index
from ...samplers.trajectory import Trajectories, concatenate
from ..estimators import adequate_alpha, effective_number, ess, smallest_alpha

ENOUGH, FEWEST = 0.025, 25  # effective prior paths that can stand for a tilted law: their share, 100 of 4000; their number
FURTHEST = 4.0  # times alpha up to which what is learned at a milder temperature may be continued from it


def trajectories_of(state: dict[str, Any], prior: Prior) -> Trajectories:
    """The trajectories whose states and group a ``state_dict`` holds, with their energy and step_log_ratio if it has them."""
    states, group = (state[name].to(prior.device) for name in ("states", "group"))
    more = {name: state[name].to(prior.device) for name in ("energy", "step_log_ratio") if name in state}
    table = prior.condition_table
    return Trajectories(states, condition=None if table is None else Condition(table, group), **more)


@dataclass(frozen=True, eq=False)
class Tempering:
    """The mixture of tempered laws p_prior · exp(beta · tilt) / Z(beta) of paths, tilt = -E/alpha, from the prior on.

    beta, share: of each law in the mixture, beta 0 first; log_z: log Z(beta) of each condition. count: paths drawn by it.
    """

    beta: Float[Tensor, " laws"]
    share: Float[Tensor, " laws"]
    log_z: Float[Tensor, " laws conditions"]
    count: int

    @property
    def prior_count(self) -> int:
        """Paths drawn by the prior itself."""
        return round(self.share[0].item() * self.count)

    def log_density(self, log_tilt: Float[Tensor, " batch"], group: Index) -> Float[Tensor, " batch"]:
        """Of paths, less the prior's, nats."""
        tilt = log_tilt.double()[:, None]
        beta, share, log_z = (each.to(tilt.device) for each in (self.beta, self.share, self.log_z))
        tempered = torch.where(beta > 0, beta * tilt, 0.0)  # not 0 · inf
        return (share.log() + tempered - log_z.T[group]).logsumexp(1).to(log_tilt)

    def state_dict(self) -> dict[str, Any]:
        return {"beta": self.beta, "share": self.share, "log_z": self.log_z, "count": self.count}


@dataclass(frozen=True, eq=False)
class Population:
    """Trajectories with their energies: reweighted by exp(-E/alpha) over their proposal, each condition's on their own, they are
    the tilted path law.

    trajectories: with an energy, NaN where invalid, +inf where the density is zero.
    log_proposal: nats, log density of what drew each path less the prior's; None where that is the prior.
    tempering: what drew the first paths, those of the prior before all; a policy drew the others. None: the prior drew all.
    """

    trajectories: Trajectories
    log_proposal: Float[Tensor, " batch"] | None = None
    tempering: Tempering | None = None

    def renewed(self, alpha: float, log_ratio: Float[Tensor, " climbed"], drawn: Trajectories) -> Population:
        """The paths of the tempering, and new ones of a policy in place of an older one's.

        The proposal is the mixture of both (the balance heuristic), so that where the policy has come close to the target its
        paths carry the weight, and what it has lost keeps the weight that it had. alpha: that of the tempering. log_ratio: policy
        to prior, on `climbed`. drawn: by the policy, with their own.
        """
        assert self.tempering is not None and drawn.step_log_ratio is not None
        paths = concatenate([self.climbed, drawn.with_(step_log_ratio=None, log_behavior=None)])
        share = len(drawn) / len(paths)
        tempered = self.tempering.log_density(Population(paths).log_tilt(alpha), paths.group)
        of_policy = torch.cat([log_ratio, drawn.step_log_ratio.sum(0)])
        log_proposal = torch.logaddexp(tempered + math.log(1 - share), of_policy + math.log(share))
        return Population(paths, log_proposal, self.tempering)

    @property
    def climbed(self) -> Trajectories:
        """Those that the tempering drew."""
        return self._first(None if self.tempering is None else self.tempering.count)

    @property
    def prior_paths(self) -> Trajectories:
        """Those that the prior drew."""
        return self._first(None if self.tempering is None else self.tempering.prior_count)

    def _first(self, count: int | None) -> Trajectories:
        if count is None or count == len(self):
            return self.trajectories
        return self.trajectories.select(torch.arange(count, device=self.energy.device))

    @property
    def energy(self) -> Float[Tensor, " batch"]:
        """Of each path."""
        energy = self.trajectories.energy
        assert energy is not None
        return energy

    def __len__(self) -> int:
        return len(self.trajectories)

    def log_tilt(self, alpha: float) -> Float[Tensor, " batch"]:
        """-E/alpha, -inf for invalid energies."""
        return torch.nan_to_num(-self.energy / alpha, nan=-torch.inf, neginf=-torch.inf, posinf=torch.inf)

    def log_weight(self, alpha: float) -> Float[Tensor, " batch"]:
        """-E/alpha over the proposal. An infinite ``alpha`` gives the weights of the prior."""
        tilt = torch.zeros_like(self.energy) if math.isinf(alpha) else self.log_tilt(alpha)
        return tilt if self.log_proposal is None else tilt - self.log_proposal

    def weight(self, alpha: float) -> Float[Tensor, " batch"]:
        """float64 ∝ exp(-E/alpha) over the proposal, of sum 1; each condition has as much of it as it has of the paths.

        Kept for the next draw."""
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
        """log mean weight over the valid paths of each condition: the forward estimate of log Z."""
        valid, log_weight = ~self.energy.isnan(), self.log_weight(alpha)
        kept = [index[valid[index]] for index in self.trajectories.groups]
        return torch.stack([log_weight[index].logsumexp(0) - math.log(max(1, len(index))) for index in kept])

    def ess(self, alpha: float) -> float:
        """Effective number of samples of the tilted law, over all conditions."""
        return effective_number(self.log_weight(alpha), self.trajectories.groups)

    def within_reach(self, alpha: float, wanted: float, most: float = math.inf) -> float:
        """The temperature, from ``alpha`` up to ``most``, at which this many of the paths are effective; ``most`` where none is.

        Where a policy renews the population, effective paths need not grow with the temperature: between what the prior reaches
        and what the policy has reached there can be few.
        """
        return smallest_alpha(alpha, lambda at: self.ess(at) >= wanted, most)

    def draw(self, count: int, alpha: float, generator: torch.Generator) -> Int[Tensor, " {count}"]:
        """``count`` indices drawn by `weight`, systematically: least variance for given weights.

        Each condition gets an equal number, as far as ``count`` allows.
        """
        weight, groups = self.weight(alpha), self.trajectories.groups
        if len(groups) == 1:
            return systematic(weight, count, generator)
        sizes = [len(range(row, count, len(groups))) for row in range(len(groups))]
        parts = zip(groups, sizes, strict=True)
        index = torch.cat([part[systematic(weight[part], size, generator)] for part, size in parts if size])
        return index[torch.randperm(count, generator=generator, device=index.device)]

    def state_dict(self) -> dict[str, Any]:
        paths, tempering = self.trajectories, None if self.tempering is None else self.tempering.state_dict()
        proposal = {"log_proposal": self.log_proposal, "tempering": tempering}
        return {"states": paths.states, "energy": self.energy, "group": paths.group, **proposal}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], prior: Prior) -> Population:
        log_proposal, tempering = state["log_proposal"], state["tempering"]
        return cls(
            trajectories_of(state, prior),
            None if log_proposal is None else log_proposal.to(prior.device),
            None if tempering is None else Tempering(**tempering),
        )


def too_few(energy: Float[Tensor, " n"], alpha: float, group: Index) -> bool:
    """Whether too few prior samples of some condition are effective at ``alpha`` to stand for the tilted law.

    False where there are hardly any samples, whatever they weigh: nothing stands for it then.
    """
    valid = [part[~part.isnan()] for part in (energy[index] for index in members(group, int(group.max()) + 1))]
    return any(len(part) > FEWEST and ess(-part / alpha) < _enough(len(part)) for part in valid)


def _enough(count: int) -> float:
    """The share of ``count`` samples that must be effective."""
    return max(ENOUGH, FEWEST / count) if count > FEWEST else 1.0


def temperature_within_reach(energy: Float[Tensor, " n"], alpha: float, group: Index | None = None) -> float:
    """The temperature, from ``alpha`` up, at which enough prior samples (`ENOUGH`, `FEWEST`) are effective to stand for the
    tilted law.

    ``alpha`` itself where that is beyond `FURTHEST` times it: few meet a strict constraint, at any temperature. energy: of
    prior samples, NaN where invalid; group: their conditions, of which the one that asks for most decides; None: one for all.
    """

    def within_reach(valid: Float[Tensor, " n"]) -> float:
        found = adequate_alpha(valid, alpha, _enough(len(valid)))
        return found if found <= FURTHEST * alpha else alpha

    parts = [energy] if group is None else [energy[index] for index in members(group, int(group.max()) + 1)]
    return max(within_reach(part[~part.isnan()]) for part in parts)
