"""How far the policy's shares of a partition lie from the target's, from the density ratio on the paths of both sides.

With r = target/policy of a path, the share of part c under the target less that under the policy is E_policy[(r - 1) 1_c] and
E_target[(1 - 1/r) 1_c]. Neither can be averaged alone: r is unbounded on one side and 1/r on the other. Weighed between the
sides by the balance heuristic (Veach and Guibas 1995) both integrands are bounded. With N policy paths, n effective target
paths of weights W and rho = n / N:

    d_c = 1/N Σ_policy h(r) 1_c + rho Σ_target W h(r) 1_c           h(r) = (r - 1) / (rho r + 1)

h lies between -1 and 1/rho. Where both laws are alike the noise of d_c is that of r - 1, not that of the target's sample; what
the policy does not visit has a large r on the target's paths and enters with its whole weight. Z, on which r depends, is where
Σ_c d_c = 0: Bennett's acceptance ratio (1976), which uses both sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...samplers.shapes import Index
from ..estimators import even
from .evidence import Evidence
from .partition import normal_draws

DRAWS = 1000  # bootstrap draws behind a bias and a standard error


@dataclass(frozen=True, eq=False)
class Bridge:
    """Both sides joined: log Z, and of each path its weight in d_c, h(r), and -dh/dlog Z, float64 on the CPU."""

    log_z: float
    rho: float
    design_effect: float
    policy: tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]
    target: tuple[Float[Tensor, " m"], Float[Tensor, " m"], Float[Tensor, " m"]]

    def differences(
        self, policy: Index, target: Int[Tensor, " m"], count: int
    ) -> tuple[Float[Tensor, " {count}"], Float[Tensor, " {count} {count}"]]:
        """(d, its covariance) for the parts of the paths of both sides.

        The covariance is that of the influence of each path, the one through Z included.
        """
        total, slope = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        parts = []
        sides = (policy, self.policy, 1.0), (target, self.target, self.design_effect)
        for label, (weight, height, steepness), design_effect in sides:
            hot = torch.nn.functional.one_hot(label, count).double()
            own = (weight * height) @ hot
            parts.append(design_effect**0.5 * weight[:, None] * (height[:, None] * hot - own / weight.sum()))
            total, slope = total + own, slope + (weight * steepness) @ hot
        influence = torch.cat(parts)
        influence = influence - influence.sum(1, keepdim=True) * slope / slope.sum().clamp(min=1e-300)
        return total, influence.T @ influence


def bridge(evidence: Evidence, design_effect: float = 1.0) -> Bridge:
    """The bridge between the two sides of ``evidence``; some target path must have weight.

    design_effect: of the target side (`Climbed.design_effect`), whose paths then count for so many fewer.
    """
    weight = evidence.target_weight.cpu()
    mine = evidence.log_weight.double().cpu().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    theirs = evidence.log_weight_on_target.double().cpu()
    theirs = theirs.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)[weight > 0]
    rho = effective(weight) / design_effect / len(mine)
    sides = (even(len(mine)), mine), (rho * weight[weight > 0], theirs)

    def level(log_ratio: Float[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        share = torch.sigmoid(log_ratio + math.log(rho))
        return share / rho - (1 - share), (1 / rho + 1) * share * (1 - share)

    finite = torch.cat([part[part.isfinite()] for _, part in sides])
    log_z, margin = 0.0, 50.0 + abs(math.log(rho))
    if len(finite):
        low, high = finite.min().item() - margin, finite.max().item() + margin
        for _ in range(100):  # the sum falls with log Z
            log_z = 0.5 * (low + high)
            above = sum((side @ level(part - log_z)[0]).item() for side, part in sides) > 0
            low, high = (log_z, high) if above else (low, log_z)
    first, second = ((side, *level(part - log_z)) for side, part in sides)
    # Prior paths without weight stay in place, so that labels of all paths fit.
    spread = [torch.zeros(len(weight), dtype=torch.float64) for _ in second]
    for column, values in zip(spread, second, strict=True):
        column[weight > 0] = values
    return Bridge(log_z, rho, design_effect, first, (spread[0], spread[1], spread[2]))


def effective(weight: Float[Tensor, " n"]) -> float:
    """Effective number of samples of weights that sum to 1."""
    return 1 / weight.square().sum().item()


def total_variation(
    difference: Float[Tensor, " parts"], covariance: Float[Tensor, " parts parts"], generator: torch.Generator
) -> tuple[float, float]:
    """½ Σ |d| less its bootstrap bias, and its standard error."""
    value = 0.5 * difference.abs().sum().item()
    draws = 0.5 * (difference + normal_draws(covariance, DRAWS, generator)).abs().sum(1)
    bias = draws.mean().item() - value
    return max(0.0, value - bias), draws.std().item()


def unseen(count: float) -> float:
    """The largest share of the target that ``count`` independent samples of it all miss with a probability of .005 or more."""
    return 1 - 0.005 ** (1 / max(count, 1.0))


def path_tv(evidence: Evidence, log_z: float) -> tuple[float, float]:
    """E_policy[(1 - r)₊] and its standard error: no event of the samples has probabilities that differ by more."""
    ratio = (evidence.log_weight.double() - log_z).exp()
    missing = (1 - ratio).clamp(min=0).nan_to_num(nan=1.0)
    return missing.mean().item(), (missing.std() / math.sqrt(len(missing))).item()


def undercovered(evidence: Evidence, log_z: float, factor: float = 10.0) -> float:
    """The target's share of paths that the policy draws ``factor`` times too rarely, or more so."""
    log_ratio = evidence.log_weight_on_target - log_z
    beyond = ~(log_ratio <= math.log(factor))  # NaN: the policy lost this path
    return evidence.target_weight[beyond & (evidence.target_weight > 0)].sum().item()
