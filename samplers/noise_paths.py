"""Prior paths as functions of their noise, and proposals that move a path without leaving the prior's law.

A prior path is a deterministic map of standard normal numbers: those of the start and of each step. So the prior's law over
paths is N(0, I) in these numbers, and a preconditioned Crank-Nicolson proposal (Cotter et al. 2013, arXiv 1202.0709)

    z' = sqrt(1 - b²) z + b xi,    xi ~ N(0, I)

leaves it as it is, from any step on, for every chain: clipped ones, steps without noise, and networks of any kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .condition import Condition, selected
from .denoiser import evaluate
from .prior import Prior
from .rollout import step
from .shapes import Index
from .trajectory import Trajectories, rows_at_once


@dataclass(frozen=True, eq=False)
class NoisePaths:
    """Prior paths. noise: that of the start and then of each step; 0 where a step draws none."""

    states: Float[Tensor, " states batch *state"]
    noise: Float[Tensor, " states batch *state"]
    condition: Condition | None = None

    def __len__(self) -> int:
        return self.states.shape[1]

    @property
    def trajectories(self) -> Trajectories:
        """The same paths without their noise."""
        return Trajectories(self.states, condition=self.condition)

    def select(self, index: Index) -> NoisePaths:
        """The paths at ``index``."""
        return NoisePaths(self.states[:, index], self.noise[:, index], selected(self.condition, index))

    def replaced(self, chosen: Bool[Tensor, " batch"], others: NoisePaths) -> NoisePaths:
        """Those of ``others`` where ``chosen``, these elsewhere."""
        mask = chosen.view(1, -1, *[1] * (self.states.ndim - 2))
        states, noise = torch.where(mask, others.states, self.states), torch.where(mask, others.noise, self.noise)
        return NoisePaths(states, noise, self.condition)


def noise_of(prior: Prior, trajectories: Trajectories) -> NoisePaths:
    """Stored paths, whoever drew them, with the noise from which the prior makes them: K evaluations of its network a path."""
    chain, states = prior.chain, trajectories.states
    noise = torch.zeros_like(states)
    if chain.start_std > 0:
        noise[0] = states[0] / chain.start_std
    for rows in torch.split(torch.arange(len(trajectories), device=states.device), rows_at_once(prior.shape, prior.device)):
        condition = selected(trajectories.condition, rows)
        for k in range(chain.num_steps):
            if not chain.noiseless(k):
                output = evaluate(prior.denoiser, chain, states[k, rows], k, condition)
                noise[k + 1, rows] = chain.kernel.standardize(states[k + 1, rows], states[k, rows], k, output)
    return NoisePaths(states, noise, trajectories.condition)


@torch.no_grad()
def follow(prior: Prior, paths: NoisePaths, first: int) -> NoisePaths:
    """The paths that the prior makes of their noise from s_first on; the states up to there stay. K - first evaluations a path.

    first: 0 begins with the start's own noise.
    """
    chain, states = prior.chain, paths.states.clone()
    if first == 0:
        states[0] = chain.start_std * paths.noise[0]
    for rows in torch.split(torch.arange(len(paths), device=states.device), rows_at_once(prior.shape, prior.device)):
        condition, state = selected(paths.condition, rows), states[first, rows]
        for k in range(first, chain.num_steps):
            noise = None if chain.noiseless(k) else paths.noise[k + 1, rows]
            state = step(prior, None, state, k, noise, condition).following
            states[k + 1, rows] = state
    return NoisePaths(states, paths.noise, paths.condition)


def crank_nicolson(prior: Prior, paths: NoisePaths, first: int, size: float, generator: torch.Generator) -> NoisePaths:
    """Proposals that keep s_first, or nothing where first is 0, and move all later noise by ``size`` in (0, 1]."""
    noise = paths.noise.clone()
    fresh = torch.randn(noise[first:].shape, generator=generator, device=noise.device)
    kept = slice(0 if first == 0 else 1, None)  # row `first` is the noise that led to s_first
    noise[first:][kept] = (1 - size**2) ** 0.5 * noise[first:][kept] + size * fresh[kept]
    if prior.chain.start_std == 0:
        noise[0] = 0
    for k in range(first, prior.chain.num_steps):
        if prior.chain.noiseless(k):
            noise[k + 1] = 0
    return follow(prior, NoisePaths(paths.states, noise, paths.condition), first)
