"""Objectives on parts of a path: what a policy does over ``horizon`` steps, against how much more a state is worth after them.

With V_k(s) = alpha · (log h_k(s) + log Z), the soft value, a policy is the tilted prior's where over every d steps

    -V_k(s_k) - alpha (l_k + … + l_{k+d-1}) + V_{k+d}(s_{k+d}) = 0,      V = -E after the last trained step.

The energy stands in that last condition and nowhere else: there is no reward beside it, which would count it twice. The condition
is exact where nothing random follows the last trained step. d = 1 is detailed balance. Without a horizon the whole path alone
counts, and no value but log Z is needed: `objectives`. Here V is learned, and log Z is a part of it, which stays at the
population's estimate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .batch import Batch
from .objectives import half_square


class Windows(NamedTuple):
    """Of all windows of d steps, those at both ends shorter: [kernels + d - 1, B] each.

    ahead: the sum of their log-ratios, nats. before, after: log h + log Z of the states that they lead from and to, nats, and
    -E/alpha at the end.
    """

    ahead: Float[Tensor, "windows batch"]
    before: Float[Tensor, "windows batch"]
    after: Float[Tensor, "windows batch"]


def windows(batch: Batch, alpha: float, log_z: Float[Tensor, ""], horizon: int) -> Windows:
    """Every step is in d of them, so that none weighs more than another.

    Errors: AssertionError for a batch without a soft value.
    """
    assert batch.soft_value is not None
    count = len(batch.step_log_ratio)
    worth = torch.cat([batch.soft_value + log_z, -batch.energy[None] / alpha])
    total = torch.cat([torch.zeros_like(batch.energy)[None], batch.step_log_ratio.cumsum(0)])
    first = torch.arange(1 - horizon, count, device=total.device)
    start, end = first.clamp(min=0), (first + horizon).clamp(max=count)
    return Windows(total[end] - total[start], worth[start], worth[end])


def sub_trajectory_rtb(
    batch: Batch, alpha: float, log_z: Float[Tensor, ""], huber: float | None = None, *, horizon: int
) -> Float[Tensor, ""]:
    """1/d times the sum over windows of ½ (log F_k + sum l - log F_{k+d})², with the flow F_k = Z h_k. Any trajectories.

    It is relative trajectory balance over every d steps, as sub-trajectory balance (arXiv 2209.12782) is trajectory balance over
    them.
    """
    part = windows(batch, alpha, log_z, horizon)
    loss = half_square(part.before + part.ahead - part.after, huber)
    return (batch.weight * loss.sum(0) / horizon).sum() / batch.weight.sum()


def path_consistency(
    batch: Batch, alpha: float, log_z: Float[Tensor, ""], huber: float | None = None, *, horizon: int
) -> Float[Tensor, ""]:
    """1/d times the sum over windows of ½ (-V_k + V_{k+d} - alpha sum l)²: Trust-PCL (arXiv 1707.01891, eq. 14).

    Without a discount, and with its reward in V alone.
    Equal to alpha² · sub_trajectory_rtb, term by term. ``huber`` is in nats, hence scaled by alpha.
    """
    part = windows(batch, alpha, log_z, horizon)
    residual = -alpha * part.before + alpha * part.after - alpha * part.ahead
    loss = half_square(residual, None if huber is None else alpha * huber)
    return (batch.weight * loss.sum(0) / horizon).sum() / batch.weight.sum()


OF_PARTS = {"rtb": sub_trajectory_rtb, "trust_pcl": path_consistency}
