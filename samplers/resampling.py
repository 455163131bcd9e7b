"""Steering at inference: the policy proposes, weights decide, and samples of the tilted prior come out.

A policy trajectory has the log-weight lw = log_potential(sample) - Λ toward the tilted path law, whatever the policy is. Drawn
in proportion to exp(lw), terminal samples follow p_prior · exp(log_potential) as the number of proposals grows; the effective
number says how far to trust that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .policy import Policy
from .proposals import Part, propose
from .shapes import Index
from .twist import Twist
from .typed import unique


@dataclass(frozen=True, eq=False)
class Resampled:
    """Samples drawn by weight from a policy's proposals.

    samples: data, in random order, so that any part of them is a draw too. index: the proposal each one is. log_weight,
    log_potential: nats, -inf for zero density. parts: the proposals as they were drawn, from which their paths are found again.
    """

    samples: Float[Tensor, " n *data"]
    index: Index
    log_weight: Float[Tensor, " proposals"]
    log_potential: Float[Tensor, " proposals"]
    parts: tuple[Part, ...]

    @property
    def strength(self) -> float | None:
        """Of the twist, after its pilot; None without one."""
        return None if self.parts[-1].twist is None else self.parts[-1].strength

    @property
    def weight(self) -> Float[Tensor, " proposals"]:
        """float64, sums to 1."""
        return self.log_weight.double().softmax(0)

    @property
    def proposals(self) -> int:
        """Number of rollouts that the samples were chosen from."""
        return len(self.log_weight)

    @property
    def ess(self) -> float:
        """Effective number of proposals, 1 / sum w², between 1 and their number."""
        return 1 / self.weight.square().sum().item()

    @property
    def largest_weight(self) -> float:
        """Share of the heaviest proposal."""
        return self.weight.max().item()

    @property
    def unique(self) -> int:
        """Number of different proposals among the samples."""
        return len(unique(self.index))


def systematic(weight: Float[Tensor, " n"], count: int, generator: torch.Generator) -> Int[Tensor, " {count}"]:
    """``count`` indices drawn in proportion to ``weight``, in random order.

    Each i comes floor or ceil of count · w_i times: no resampling has less variance in the copies, and none repeats a proposal
    of count · w_i ≤ 1.
    """
    cumulative = weight.double().cumsum(0)
    first = torch.rand((), generator=generator, device=weight.device, dtype=torch.float64)
    points = (torch.arange(count, device=weight.device) + first) / count * cumulative[-1]
    last = int(weight.nonzero()[-1])  # a point that rounds up to the total must not land on a weight of zero
    index = torch.searchsorted(cumulative, points, right=True).clamp(max=last)
    return index[torch.randperm(count, generator=generator, device=weight.device)]


def importance_resample(
    policy: Policy,
    log_potential: Callable[[Float[Tensor, " batch *data"]], Float[Tensor, " batch"]],
    count: int,
    generator: torch.Generator,
    *,
    proposals: int,
    batch: int | None = None,
    twist: Twist | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Resampled:
    """``count`` samples of p_prior · exp(log_potential) out of ``proposals`` policy rollouts, exact as these grow.

    log_potential: data → nats, -E/alpha; -inf is zero density, and so is NaN. The law is that of the policy's
    chain, whatever the policy. batch: rollouts at once (`rows_at_once`). twist: chooses among candidates at every step, by a
    strength that an eighth of the proposals measures. on_progress: receives the number of rollouts just done.

    Errors: ValueError for fewer proposals than samples, several conditions, and where no proposal has any density.
    """
    if not 1 <= count <= proposals:
        raise ValueError(
            f"{count} samples of {proposals} proposals: ask for at least one sample and at least as many proposals as samples,"
            " or most of them would be copies."
        )
    prior = policy.prior
    if prior.num_conditions > 1:
        raise ValueError(
            f"this policy has {prior.num_conditions} conditions, each with weights of its own; resample policy.only(row) for one."
        )
    drawn = propose(policy, log_potential, proposals, generator, batch=batch, twist=twist, on_progress=on_progress)
    heaviest = drawn.log_weight.max().item()
    if heaviest == -math.inf:
        raise ValueError(
            f"none of {proposals} proposals has any density under the energy, so there is nothing to resample; raise alpha, or"
            " train the policy further toward where the energy is finite."
        )
    if heaviest == math.inf:
        raise ValueError("log_potential returned +inf, an infinite density; return -E/alpha with a finite energy, or -inf.")
    index = systematic(drawn.log_weight.double().softmax(0), count, generator)
    return Resampled(drawn.data[index], index, drawn.log_weight, drawn.log_potential, drawn.parts)
