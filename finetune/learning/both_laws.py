"""Steps of paths to learn a shift from: half are of the tilted law, half are the policy's own.

What a policy is judged by is its gap, and that is the sum of both:

    EUBO - ELBO = KL(tilted || policy) + KL(policy || tilted)
                = sum_k E_tilted[½ |delta_k - delta*_k|²] + sum_k E_policy[½ |delta_k - delta*_k|²] + const

for kernels of one variance, delta* the shift that is best at a state; the second sum where log h is linear over a kernel. So it
is at the states of these two laws that a policy has to be right, and nowhere else. Of the tilted law there is the population. The
policy's own paths are drawn anew from time to time, and cost no energy calls: a target needs none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...samplers.condition import Condition, selected
from ...samplers.denoiser import Denoiser
from ...samplers.prior import Prior
from ...samplers.rollout import rollout
from ...samplers.shapes import Index, States
from ...samplers.trajectory import Trajectories
from ..populations.population import Population, trajectories_of
from .rows import step_share, stratified
from .soft_value import importance_weight

EVERY = 20  # updates after which the policy's own paths are drawn anew
FEWEST, EACH = 16, 2  # of them, of all conditions and of each


class Steps(NamedTuple):
    """Steps of the chain, from ``state`` to ``following``.

    tilted: which are of the tilted law; log_ratio: nats, of the kernel that drew the others' next states over the prior's.
    weight: what each one counts, so that a sum over them has the sum over kernels of a mean as its mean.
    """

    state: States
    following: States
    step: Index
    condition: Condition | None
    tilted: Bool[Tensor, " n"]
    log_ratio: Float[Tensor, " n"]
    weight: Float[Tensor, " n"]

    def split(self, size: int) -> list[Steps]:
        """Parts of ``size`` at most."""
        state, following, step, condition, *rest = self
        parts: list[Steps] = []
        for first in range(0, len(step), size):
            place = slice(first, first + size)
            others = (each[place] for each in rest)
            parts.append(Steps(state[place], following[place], step[place], selected(condition, place), *others))
        return parts


class BothLaws:
    """Draws from a population, at the temperature ``alpha``, and from ``own``, paths of the policy as it was when they were
    drawn; None until `renew`."""

    def __init__(self, prior: Prior, population: Population, alpha: float, generator: torch.Generator) -> None:
        self.prior, self.population, self.generator = prior, population, generator
        self.own: Trajectories | None = None
        self.probability = step_share(prior.chain).to(prior.device)
        self._tilted = importance_weight(population, alpha)

    def state_dict(self) -> dict[str, Any]:
        own = self.own
        return {} if own is None else {"states": own.states, "step_log_ratio": own.step_log_ratio, "group": own.group}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.own = trajectories_of(state_dict, self.prior) if state_dict else None

    def renew(self, policy: Denoiser, rows: int, on_step: Callable[[], None] | None = None) -> None:
        """Draw paths of ``policy``, so many that of ``rows`` an update each of their steps is taken about once; no gradient."""
        wanted = math.ceil(0.5 * rows * EVERY / self.prior.chain.num_kernels)
        count = max(FEWEST, EACH * self.prior.num_conditions, wanted)
        self.own = rollout(self.prior, policy, count, self.generator, on_step=on_step)

    def keep_fresh(self, update: int, policy: Denoiser, rows: int, on_step: Callable[[], None] | None = None) -> None:
        """`renew` before the update of this number, in its phase, if it is time."""
        if update % EVERY == 0:
            self.renew(policy, rows, on_step)

    def draw(self, count: int) -> Steps:
        """``count`` steps by `step_share`."""
        own, paths, generator, chain = self.own, self.population.trajectories, self.generator, self.prior.chain
        assert own is not None and own.step_log_ratio is not None
        device = paths.states.device
        row = stratified(self.probability, count, generator)
        tilted = torch.rand(count, generator=generator, device=device) < 0.5
        of_tilted = torch.multinomial(self._tilted, count, replacement=True, generator=generator)
        of_own = torch.randint(len(own), (count,), generator=generator, device=device)
        at = chain.step_of_row(row)
        around = (-1, *[1] * (paths.states.ndim - 2))
        state, following = (
            torch.where(tilted.view(around), paths.states[k, of_tilted], own.states[k, of_own]) for k in (at, at + 1)
        )
        condition = None
        if paths.condition is not None:
            group = torch.where(tilted, paths.group[of_tilted], own.group[of_own])
            condition = Condition(paths.condition.table, group)
        log_ratio = torch.where(tilted, 0.0, own.step_log_ratio[row, of_own])
        weight = 1 / (count * self.probability[row])
        return Steps(state, following, at, condition, tilted, log_ratio, weight)
