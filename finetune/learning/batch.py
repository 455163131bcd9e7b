"""The trajectories of an update as an objective sees them."""

from __future__ import annotations

from dataclasses import dataclass

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
    old_step_log_ratio: step_log_ratio as it was in the first epoch; None during that one.
    """

    step_log_ratio: Float[Tensor, " kernels batch"]
    energy: Float[Tensor, " batch"]
    valid: Bool[Tensor, " batch"]
    log_behavior: Float[Tensor, " batch"] | None = None
    soft_value: Float[Tensor, " kernels batch"] | None = None
    group: Int[Tensor, " batch"] | None = None
    old_step_log_ratio: Float[Tensor, " kernels batch"] | None = None

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
            old_step_log_ratio=None if self.old_step_log_ratio is None else self.old_step_log_ratio[:, index],
        )

    def groups(self, count: int) -> list[Int[Tensor, " _"]]:
        """The indices of the trajectories of each of ``count`` conditions."""
        if self.group is None:
            assert count == 1
            return [torch.arange(len(self.energy), device=self.energy.device)]
        return members(self.group, count)

    @property
    def old(self) -> Float[Tensor, " kernels batch"]:
        """The log-ratios before the first epoch, without a gradient."""
        return self.step_log_ratio.detach() if self.old_step_log_ratio is None else self.old_step_log_ratio

    @property
    def weight(self) -> Float[Tensor, " batch"]:
        """1 for a valid trajectory and 0 for a masked one."""
        return self.valid.to(self.energy)
