"""Held-out paths: tilted prior paths that no phase learns from, on which a policy is watched.

    EUBO(policy) = EUBO(prior) - E_tilted[<z, delta> - ½ |delta|²]        delta: the policy's shift; z: the noise that was drawn

is unbiased on any chain and any prior. On the paths that a phase learns from it can fall below log Z: they are then learned by
heart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...samplers.denoiser import Denoiser
from ...samplers.log_ratio import Target, outputs, shift_moments
from ...samplers.prior import Prior
from ...samplers.shapes import Index, States
from ...samplers.trajectory import Trajectories
from .population import Population, trajectories_of

# Tilted paths that are watched, of all conditions and of each one: a systematic draw, so that a heavy path counts more and costs
# once.
DRAWN, EACH = 160, 16


class Look(NamedTuple):
    """What the held-out paths say of a policy: its EUBO, at their temperature; the nats of KL(tilted || prior) that it takes
    away at the target's, their standard error, and what each path says of them."""

    eubo: float
    gain: float
    error: float
    by_path: Float[Tensor, " batch"]


class HeldOut:
    """Tilted paths, with weights that sum to 1, out of prior paths that no phase learns from.

    paths: the trajectories; weight; eubo: the prior's, -E/alpha averaged over them; times: their temperature ``alpha`` over
    the target's; prior_outputs: what the prior says at their states, which every look needs. best: `Look.by_path` of the best
    policy so far, which others are compared with path by path; at first that of the prior, which gains nothing.
    """

    def __init__(
        self,
        prior: Prior,
        paths: Trajectories,
        weight: Float[Tensor, " batch"],
        alpha: float,
        times: float = 1.0,
        prior_outputs: States | None = None,
        best: Float[Tensor, " batch"] | None = None,
    ) -> None:
        assert paths.energy is not None
        self.prior, self.paths, self.weight, self.alpha, self.times = prior, paths, weight, alpha, times
        self.best = torch.zeros_like(weight) if best is None else best
        self.prior_outputs = outputs(prior.chain, prior.denoiser, paths) if prior_outputs is None else prior_outputs
        eubos = [self._eubo(*part) for part in self._weights()]
        self.eubo = sum(eubos) / len(eubos)

    @classmethod
    def draw(
        cls,
        prior: Prior,
        population: Population,
        alpha: float,
        times: float,
        generator: torch.Generator,
        most: Callable[[int], int] = int,
    ) -> HeldOut:
        """Paths of the population by their weight at ``times`` the target's temperature ``alpha``.

        most: the largest of such a number over the processes. As many paths are held by each, the last ones of weight 0: a
        policy in shards must be evaluated equally often everywhere.
        """
        drawn = max(DRAWN, EACH * prior.num_conditions)
        index, count = population.draw(drawn, times * alpha, generator).unique(return_counts=True)
        lacking = most(len(index)) - len(index)
        index, count = torch.cat([index, index[:1].expand(lacking)]), torch.cat([count, count.new_zeros(lacking)])
        return cls(prior, population.trajectories.select(index), count.double() / count.sum(), times * alpha, times)

    def state_dict(self) -> dict[str, Any]:
        paths = self.paths
        tensors = {"states": paths.states, "energy": paths.energy, "weight": self.weight, "outputs": self.prior_outputs}
        tensors |= {"group": paths.group, "best": self.best}
        return {"alpha": self.alpha, "times": self.times, **tensors}

    @classmethod
    def from_state_dict(cls, prior: Prior, state: dict[str, Any]) -> HeldOut:
        weight, outputs, best = (state[name].to(prior.device) for name in ("weight", "outputs", "best"))
        return cls(prior, trajectories_of(state, prior), weight, state["alpha"], state["times"], outputs, best)

    def moments(self, policy: Denoiser, target: Target | None = None) -> Float[Tensor, " moments batch"]:
        """`shift_moments` of the policy on these paths."""
        return shift_moments(self.prior.chain, policy, self.paths, self.prior_outputs, target)

    def look(self, policy: Denoiser) -> Look:
        """With delta the policy's shift, E<z, delta> - E ½|delta|² is what its EUBO is below the prior's. Where the paths are of
        a milder law than the target, E<z, delta> grows from there by ``times``, if log h is linear."""
        along, size = self.moments(policy)
        by_path = self.times * along - size
        return Look(self.eubo - self._mean(along - size), self._mean(by_path), self.error(by_path), by_path)

    def look_by_condition(self, policy: Denoiser) -> list[Look]:
        """`look` at each condition on its own."""
        along, size = self.moments(policy)
        looks: list[Look] = []
        for index, weight in self._weights():
            nats, plain = self.times * along[index] - size[index], along[index] - size[index]
            gained = (weight * plain).sum().item()
            looks.append(Look(self._eubo(index, weight) - gained, (weight * nats).sum().item(), _error(nats, weight), nats))
        return looks

    def error(self, by_path: Float[Tensor, " batch"]) -> float:
        """Standard error of the mean over conditions of such values."""
        errors = [_error(by_path[index], weight) for index, weight in self._weights()]
        return math.hypot(*errors) / len(errors)

    def _mean(self, by_path: Float[Tensor, " batch"]) -> float:
        means = [(weight * by_path[index]).sum().item() for index, weight in self._weights()]
        return sum(means) / len(means)

    def _weights(self) -> list[tuple[Index, Float[Tensor, " n"]]]:
        """The paths of each condition with their weights, of sum 1."""
        groups = self.paths.groups
        if len(groups) == 1:
            return [(groups[0], self.weight)]
        return [(index, self.weight[index] / self.weight[index].sum()) for index in groups]

    def _eubo(self, index: Index, weight: Float[Tensor, " n"]) -> float:
        assert self.paths.energy is not None
        return -(weight * self.paths.energy[index].double()).sum().item() / self.alpha


def _error(nats: Float[Tensor, " n"], weight: Float[Tensor, " n"]) -> float:
    """Standard error of the weighted mean of one condition."""
    return math.sqrt((weight * (nats - (weight * nats).sum())).square().sum().item())
