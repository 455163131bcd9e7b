"""The objectives: pure functions of log-ratios and energies. One sign: x = Λ + E/alpha, residual = log Z + x.

Each takes a `Batch` and returns a scalar; its gradient with respect to ``step_log_ratio`` is all that training needs
(`gradients`), so a term that must not be differentiated is detached here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...samplers.condition import members
from ...samplers.shapes import Index


@dataclass(frozen=True, eq=False)
class Batch:
    """What a loss is a function of: the global batch of trajectories. An objective sees those of one condition.

    step_log_ratio: nats. energy: finite (capped). valid: False where the energy was NaN.
    log_behavior: log behavior - log prior, normalized if behaviors are mixed, or None.
    soft_value: nats, an estimate of log h_k(s_k) (`soft_value`), or None.
    group: the row of each one's condition; None where all have the same one.
    """

    step_log_ratio: Float[Tensor, " kernels batch"]
    energy: Float[Tensor, " batch"]
    valid: Bool[Tensor, " batch"]
    log_behavior: Float[Tensor, " batch"] | None = None
    soft_value: Float[Tensor, " kernels batch"] | None = None
    group: Int[Tensor, " batch"] | None = None

    def __post_init__(self) -> None:
        assert self.step_log_ratio.ndim == 2, self.step_log_ratio.shape
        batch = self.step_log_ratio.shape[1]
        assert self.energy.shape == self.valid.shape == (batch,), (self.energy.shape, self.valid.shape)

    @property
    def log_ratio(self) -> Float[Tensor, " batch"]:
        """Λ: nats, summed over steps."""
        return self.step_log_ratio.sum(0)

    def select(self, index: Index) -> Batch:
        """The trajectories at ``index``, all of one condition."""
        return Batch(
            self.step_log_ratio[:, index],
            self.energy[index],
            self.valid[index],
            None if self.log_behavior is None else self.log_behavior[index],
            None if self.soft_value is None else self.soft_value[:, index],
        )

    def groups(self, count: int) -> list[Int[Tensor, " _"]]:
        """The indices of the trajectories of each of ``count`` conditions."""
        if self.group is None:
            assert count == 1
            return [torch.arange(len(self.energy), device=self.energy.device)]
        return members(self.group, count)

    @property
    def weight(self) -> Float[Tensor, " batch"]:
        """1 for a valid trajectory and 0 for a masked one."""
        return self.valid.to(self.energy)


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


def reinforce_kl(batch: Batch, alpha: float, log_z: Float[Tensor, ""], huber: float | None = None) -> Float[Tensor, ""]:
    """-sum w sg[A] Λ, A = -E - alpha Λ minus the leave-one-out mean (arXiv 2509.01632, section 3.1).

    w are self-normalized weights policy / behavior: uniform on-policy. Its on-policy gradient is alpha times that of
    `log_variance` on the same trajectories. With a soft value each step has an advantage of its own, what is still to come less
    what was expected there: A_k = -E - alpha (sum_{j≥k} l_j + log h_k(s_k)), minus the leave-one-out mean. A baseline that
    depends on the state alone leaves the expected gradient as it is (Williams 1992), whatever its error.

    Errors: ValueError where the weights' effective size falls below 10% of the batch, or hardly above one trajectory: the
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
            raise ValueError(
                f"the importance weights policy/behavior keep an effective {effective.item():.1%} of the"
                f" {int(batch.weight.sum())} trajectories, below 10% or hardly more than one; reinforce_kl would follow a few"
                " trajectories. Lower the noise inflation, use on_policy trajectories, or use rtb or log_variance, which need no"
                " weights."
            )
        per_step = batch.soft_value is not None
        to_go = batch.step_log_ratio.flip(0).cumsum(0).flip(0)  # of each step and those after it
        ahead = to_go + batch.soft_value if batch.soft_value is not None else batch.log_ratio
        value = -batch.energy - alpha * ahead  # [num_kernels, B] or [B]
        others = ((weight * value).sum(-1, keepdim=True) - weight * value) / (1 - weight).clamp(min=1e-6)
        advantage = value - others
        if huber is not None:
            advantage = advantage.clamp(-alpha * huber, alpha * huber)
    return -(weight * advantage * (batch.step_log_ratio if per_step else batch.log_ratio)).sum()


def tlm(batch: Batch, alpha: float, log_z: Float[Tensor, ""], huber: float | None = None) -> Float[Tensor, ""]:
    """-mean Λ on trajectories of the tilted law: trajectory likelihood, the forward KL up to a constant."""
    return -(batch.weight * batch.log_ratio).sum() / batch.weight.sum()


class Objective(NamedTuple):
    """An objective and what it asks of its surroundings."""

    loss: Callable[[Batch, float, Float[Tensor, ""], float | None], Float[Tensor, ""]]
    learns_log_z: bool = False
    takes_soft_value: bool = False
    learns_soft_value: bool = False
    # On-policy its gradient is alpha^alpha_power times that of the KL to the tilted law, in nats.
    alpha_power: int = 0
    # Behaviors whose trajectories it is right on; anything else is refused before the first update.
    behaviors: frozenset[str] = frozenset({"on_policy", "prior", "inflated", "tilted_prior", "noised_back"})


OBJECTIVES: dict[str, Objective] = {
    "rtb": Objective(rtb, learns_log_z=True),
    "log_variance": Objective(log_variance),
    "trust_pcl": Objective(trust_pcl, learns_log_z=True, alpha_power=2),
    "reinforce_kl": Objective(
        reinforce_kl,
        takes_soft_value=True,
        alpha_power=1,
        behaviors=frozenset({"on_policy", "prior", "inflated", "tilted_prior"}),
    ),
    "tlm": Objective(tlm, behaviors=frozenset({"tilted_prior", "noised_back"})),
}
