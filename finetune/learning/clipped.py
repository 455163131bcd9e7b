"""Objectives whose trajectories serve for several steps of the optimizer, which stay near the policy that took the first.

After a step the policy is no longer the one of the first epoch. Its ratio to that one at step k is r_k = exp(l_k - l_k old). What
a trajectory says about step k counts only while r_k is within 1 ± clip (PPO, arXiv 1707.06347, eq. 7; for denoising steps DDPO,
arXiv 2305.13301). In the first epoch all r_k are 1, and the gradient is that of the objective without a clip.

What a trajectory says is here its residual under the old policy, which holds the KL to the prior in full: -alpha times the
residual log Z + Λ + E/alpha is the advantage of the reward -E - alpha Λ with the baseline alpha log Z. So clipped balance
objectives and PPO with that reward are one thing: without a limit to residuals (huber), `ppo_kl` is alpha times the clipped
`log_variance`. The limit is applied before the mean of the others is taken off in the one, and after it in the other.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ...samplers.shapes import AnyShape
from .batch import Batch
from .objectives import leave_one_out

MOST = 20.0  # of a logarithm whose exponential is taken


def bounded_exp(value: AnyShape) -> AnyShape:
    """exp, and beyond `MOST` its tangent there: a number with a gradient, however large the value is."""
    return torch.where(value <= MOST, value.clamp(max=MOST).exp(), math.exp(MOST) * (1 + value - MOST))


def surrogate(batch: Batch, cost: Float[Tensor, "*kernels batch"], clip: float) -> Float[Tensor, " batch"]:
    """sum_k max((r_k - 1) cost, (clip(r_k) - 1) cost) of each trajectory: its gradient is cost · grad Λ where all r_k are 1.

    cost: positive where a trajectory should become less likely; of each step, or one for all. No gradient goes through it.
    """
    change = bounded_exp(batch.step_log_ratio - batch.old) - 1
    cost = cost.detach()
    return torch.maximum(change * cost, change.clamp(-clip, clip) * cost).sum(0)


def ppo_kl(batch: Batch, alpha: float, log_z: Float[Tensor, ""], huber: float | None = None, *, clip: float) -> Float[Tensor, ""]:
    """-mean sum_k min(r_k A, clip(r_k) A), A = -E - alpha Λ of the policy that drew, minus the leave-one-out mean.

    On-policy trajectories. With a soft value each step has an advantage of its own, as in `reinforce_kl`.
    """
    weight = batch.weight / batch.weight.sum()
    advantage = leave_one_out(batch, alpha, batch.old, weight, huber)
    return (weight * surrogate(batch, -advantage, clip)).sum()


def clipped_rtb(
    batch: Batch, alpha: float, log_z: Float[Tensor, ""], huber: float | None = None, *, clip: float
) -> Float[Tensor, ""]:
    """`rtb` with the residual of the policy that drew, clipped; log Z learns from the same residual."""
    residual = log_z + batch.old.sum(0) + batch.energy / alpha
    cost = residual if huber is None else residual.clamp(-huber, huber)
    loss = cost.detach() * residual + surrogate(batch, cost, clip)
    return (batch.weight * loss).sum() / batch.weight.sum()


def clipped_trust_pcl(
    batch: Batch, alpha: float, log_z: Float[Tensor, ""], huber: float | None = None, *, clip: float
) -> Float[Tensor, ""]:
    """alpha² times `clipped_rtb`, as `trust_pcl` is to `rtb`."""
    return alpha**2 * clipped_rtb(batch, alpha, log_z, huber, clip=clip)


def clipped_log_variance(
    batch: Batch, alpha: float, log_z: Float[Tensor, ""], huber: float | None = None, *, clip: float
) -> Float[Tensor, ""]:
    """`log_variance` with the deviations x - mean x of the policy that drew, clipped."""
    x = batch.old.sum(0) + batch.energy / alpha
    count = batch.weight.sum()
    cost = x - (batch.weight * x).sum() / count
    if huber is not None:  # the mean moves with each of them, so that what is left of them sums to zero as well
        bounded = cost.clamp(-huber, huber)
        cost = bounded - (batch.weight * bounded).sum() / count
    return (batch.weight * surrogate(batch, cost, clip)).sum() / (count - 1)


CLIPPED = {"rtb": clipped_rtb, "trust_pcl": clipped_trust_pcl, "log_variance": clipped_log_variance, "ppo_kl": ppo_kl}
