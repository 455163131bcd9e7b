"""The objectives on whole trajectories: pure functions of log-ratios and energies.

One sign: x = Λ + E/alpha, residual = log Z + x.

Each takes a `Batch` and returns a scalar; its gradient with respect to ``step_log_ratio`` is all that training needs
(`gradients`), so a term that must not be differentiated is detached here. `objective_table` names them, and what each asks for.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .batch import Batch


class CollapsedWeights(ValueError):
    """The importance weights of a batch rest on a few of its trajectories."""


ALONE = 1.5  # effective trajectories, below which one of them decides


def half_square(residual: Float[Tensor, " batch"], huber: float | None) -> Float[Tensor, " batch"]:
    """½ r², linear beyond ``huber`` nats."""
    if huber is None:
        return 0.5 * residual.square()
    size = residual.abs()
    return torch.where(size <= huber, 0.5 * residual.square(), huber * (size - 0.5 * huber))


def rtb(batch: Batch, alpha: float, log_z: Float[Tensor, ""], huber: float | None = None) -> Float[Tensor, ""]:
    """mean ½ (log Z + Λ + E/alpha)², relative trajectory balance (arXiv 2405.20971, eq. 9). Any trajectories."""
    residual = log_z + batch.log_ratio + batch.energy / alpha
    return (batch.weight * half_square(residual, huber)).sum() / batch.weight.sum()


def log_variance(batch: Batch, alpha: float, log_z: Float[Tensor, ""], huber: float | None = None) -> Float[Tensor, ""]:
    """sum (x - mean x)² / (2 (B - 1)), x = Λ + E/alpha: VarGrad (arXiv 2405.20971, eq. 22-23). Any trajectories."""
    x = batch.log_ratio + batch.energy / alpha
    count = batch.weight.sum()
    mean = (batch.weight * x).sum() / count
    return (batch.weight * half_square(x - mean, huber)).sum() / (count - 1)


def trust_pcl(batch: Batch, alpha: float, log_z: Float[Tensor, ""], huber: float | None = None) -> Float[Tensor, ""]:
    """mean ½ (-V(s_0) - E - alpha Λ)² with V(s_0) = alpha log Z: full-length Trust-PCL (arXiv 1707.01891, eq. 14).

    Equal to alpha² · rtb (arXiv 2509.01632, Prop. 1). ``huber`` is in nats, hence scaled by alpha.
    """
    residual = -alpha * log_z - batch.energy - alpha * batch.log_ratio
    width = None if huber is None else alpha * huber
    return (batch.weight * half_square(residual, width)).sum() / batch.weight.sum()


def ahead_of(each: Float[Tensor, " kernels batch"]) -> Float[Tensor, " kernels batch"]:
    """The sum over each step and those after it."""
    return each.flip(0).cumsum(0).flip(0)


@torch.no_grad()
def leave_one_out(
    batch: Batch,
    alpha: float,
    step_log_ratio: Float[Tensor, " kernels batch"],
    weight: Float[Tensor, " batch"],
    huber: float | None,
) -> Float[Tensor, "*kernels batch"]:
    """-E - alpha Λ minus the weighted mean of the others; of each step where there is a soft value: `reinforce_kl`.

    step_log_ratio: of the policy whose advantage it is. weight: sums to 1. huber: a limit to it, nats.
    """
    ahead = step_log_ratio.sum(0) if batch.soft_value is None else ahead_of(step_log_ratio) + batch.soft_value
    value = -batch.energy - alpha * ahead
    others = ((weight * value).sum(-1, keepdim=True) - weight * value) / (1 - weight).clamp(min=1e-6)
    advantage = value - others
    return advantage if huber is None else advantage.clamp(-alpha * huber, alpha * huber)


def reinforce_kl(batch: Batch, alpha: float, log_z: Float[Tensor, ""], huber: float | None = None) -> Float[Tensor, ""]:
    """-sum w sg[A] Λ, A = -E - alpha Λ minus the leave-one-out mean (arXiv 2509.01632, section 3.1).

    w are self-normalized weights policy / behavior: uniform on-policy. Its on-policy gradient is alpha times that of
    `log_variance` on the same trajectories. With a soft value each step has an advantage of its own, what is still to come less
    what was expected there: A_k = -E - alpha (sum_{j≥k} l_j + log h_k(s_k)), minus the leave-one-out mean. A baseline that
    depends on the state alone leaves the expected gradient as it is (Williams 1992), whatever its error.

    Errors: CollapsedWeights where the weights' effective size falls below 10% of the batch, or hardly above one trajectory: the
    estimate is then the accident of a few (inflated noise does this as the dimension grows).
    """
    if batch.log_behavior is None:
        raise ValueError(
            "reinforce_kl needs the behavior's density, and these trajectories have none; use on_policy, prior, inflated or"
            " tilted_prior trajectories, or an objective that needs no density (rtb, log_variance, trust_pcl)."
        )
    with torch.no_grad():
        log_weight = (batch.log_ratio - batch.log_behavior).masked_fill(~batch.valid, -torch.inf)
        weight = log_weight.softmax(0)
        number = 1 / weight.square().sum()
        effective = number / batch.weight.sum()
        if effective < 0.1 or number < min(ALONE, 0.5 * batch.weight.sum().item()):
            raise CollapsedWeights(
                f"the importance weights policy/behavior keep an effective {effective.item():.1%} of the"
                f" {int(batch.weight.sum())} trajectories, below 10% or hardly more than one; reinforce_kl would follow a few"
                " trajectories. Lower the noise inflation, use on_policy trajectories, or use rtb or log_variance, which need no"
                " weights."
            )
        advantage = leave_one_out(batch, alpha, batch.step_log_ratio, weight, huber)
    return -(weight * advantage * (batch.step_log_ratio if advantage.ndim == 2 else batch.log_ratio)).sum()


def tlm(batch: Batch, alpha: float, log_z: Float[Tensor, ""], huber: float | None = None) -> Float[Tensor, ""]:
    """-mean Λ on trajectories of the tilted law: trajectory likelihood, the forward KL up to a constant."""
    return -(batch.weight * batch.log_ratio).sum() / batch.weight.sum()
