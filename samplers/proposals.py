"""Proposals: rollouts of a policy with their log-weights toward the tilted path law, from which some are chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from .policy import Policy
from .rollout import rollout
from .shapes import AnyShape
from .trajectory import Trajectories, rows_at_once
from .twist import Twist, Twisted, strength_of

PILOT = 8  # one part in so many of the proposals measures the strength of a twist
SMALLEST_PILOT = 100


@dataclass(frozen=True, eq=False)
class Part:
    """Proposals ``first`` to ``first + size - 1``, drawn at once.

    noise: the generator's state before them. strength: of the twist.
    """

    first: int
    size: int
    noise: AnyShape
    strength: float
    twist: Twist | None

    def again(self, policy: Policy) -> Trajectories:
        """The whole paths, drawn once more from their noise: keeping all of them would take the memory of all."""
        generator = torch.Generator(device=policy.prior.device)
        generator.set_state(self.noise)
        return self.draw(policy, generator, keep=True).trajectories

    def draw(self, policy: Policy, generator: torch.Generator, *, keep: bool) -> Twisted:
        """The paths by this generator; without a twist their ``noise`` is zero."""
        if self.twist is not None:
            return self.twist.rollout(policy, self.strength, self.size, generator, keep=keep)
        drawn = rollout(policy.prior, policy, self.size, generator, keep=keep)
        return Twisted(drawn, torch.zeros_like(drawn.terminal.flatten(1)[:, 0]))


@dataclass(frozen=True, eq=False)
class Proposals:
    """data: of all of them. log_weight, log_potential: nats, -inf for zero density. parts: as they were drawn, in order."""

    data: Float[Tensor, " proposals *data"]
    log_weight: Float[Tensor, " proposals"]
    log_potential: Float[Tensor, " proposals"]
    parts: tuple[Part, ...]


def without_nan(potential: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """NaN is zero density, as -inf is."""
    return potential.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def propose(
    policy: Policy,
    log_potential: Callable[[Float[Tensor, " batch *data"]], Shaped[Tensor, " batch"]],
    count: int,
    generator: torch.Generator,
    *,
    batch: int | None = None,
    twist: Twist | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Proposals:
    """``count`` rollouts; arguments as in `importance_resample`."""
    prior = policy.prior
    batch = rows_at_once(prior.shape, prior.device) if batch is None else batch
    data, log_weights, potentials, noises = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    parts = list[Part]()
    pilot = 0 if twist is None else min(count // 2, max(SMALLEST_PILOT, count // PILOT))
    strength, first = 0.0, 0
    while first < count:
        if first == pilot and twist is not None:
            strength = strength_of(torch.cat(log_weights), torch.cat(noises))
        size = min(batch, (pilot if first < pilot else count) - first)
        parts.append(Part(first, size, generator.get_state(), strength, twist))
        drawn, noise = parts[-1].draw(policy, generator, keep=False)
        assert drawn.log_behavior is not None
        data.append(prior.to_data(drawn.terminal))
        potential = without_nan(log_potential(data[-1]).to(drawn.log_behavior))
        potentials.append(potential)
        log_weights.append(potential - drawn.log_behavior)
        noises.append(noise)
        first += size
        if on_progress:
            on_progress(size)
    return Proposals(torch.cat(data), torch.cat(log_weights), torch.cat(potentials), tuple(parts))
