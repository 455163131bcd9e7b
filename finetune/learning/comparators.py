"""Objectives of other toolkits, to be measured against. They do NOT target the tilted law p_prior(x) exp(-E(x)/alpha).

They start from the prior, at one alpha, and take no huber.

Both divide the reward R = -E by its standard deviation in the batch, which changes as the policy moves. So the temperature of
what they would converge to changes with it, and a policy that has nothing more to gain is still pushed with full force.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from .batch import Batch
from .clipped import bounded_exp, surrogate

SMALL = 1e-8


def normalized_advantage(batch: Batch) -> Float[Tensor, " batch"]:
    """(R - mean R) / std R of the valid trajectories; zero for the others."""
    reward = -batch.energy
    count = batch.weight.sum()
    centered = batch.weight * (reward - (batch.weight * reward).sum() / count)
    return centered / ((centered.square().sum() / (count - 1)).sqrt() + SMALL)


def ddpo(batch: Batch, alpha: float, log_z: Float[Tensor, ""], huber: float | None = None, *, clip: float) -> Float[Tensor, ""]:
    """-mean sum_k min(r_k A, clip(r_k) A), A the normalized reward: DDPO-IS (arXiv 2305.13301, section 4.2 and 5).

    The reward alone, whatever alpha is: nothing holds the policy near the prior.
    """
    cost = surrogate(batch, -normalized_advantage(batch), clip)
    return (batch.weight * cost).sum() / batch.weight.sum()


def grpo(batch: Batch, alpha: float, log_z: Float[Tensor, ""], huber: float | None = None, *, clip: float) -> Float[Tensor, ""]:
    """`ddpo` plus alpha times the KL to the prior by its estimator exp(-l_k) - 1 + l_k at each step (arXiv 2402.03300, eq. 3-4;
    for flows arXiv 2505.05470).

    Its weight is alpha, but beside a reward in standard deviations: the temperature would be alpha · std R. And where
    trajectories are the policy's, the expected gradient of this estimator is that of KL(prior || policy), not of
    KL(policy || prior).
    """
    kl = bounded_exp(-batch.step_log_ratio) - 1 + batch.step_log_ratio
    return ddpo(batch, alpha, log_z, huber, clip=clip) + alpha * (batch.weight * kl.sum(0)).sum() / batch.weight.sum()


COMPARATORS = {"ddpo": ddpo, "grpo": grpo}
