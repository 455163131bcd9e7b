"""Estimators from log-weights: log Z, ELBO, EUBO, effective sample sizes, each with its standard error.

``log_weight`` is lw = -E/alpha - Λ of a policy trajectory; ``target_weight`` normalized weights of the tilted law.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor


def log_mean_exp(log_weight: Float[Tensor, " n"]) -> tuple[float, float]:
    """(log mean exp, standard error by the delta method); log_weight may be -inf."""
    count = len(log_weight)
    total = torch.logsumexp(log_weight.double(), 0)
    if total == -torch.inf:
        return -math.inf, math.inf
    share = (log_weight.double() - total).exp()
    variance = (share * count - 1).square().mean() / count
    return (total - math.log(count)).item(), variance.sqrt().item()


def ess(log_weight: Float[Tensor, " n"]) -> float:
    """Effective share of the sample, (sum w)² / (N sum w²), between 1/N and 1; 0 where every weight is zero."""
    if not torch.isfinite(log_weight).any():
        return 0.0
    share = log_weight.double().softmax(0)
    return (1 / (share.square().sum() * len(share))).item()


def effective_number(log_weight: Float[Tensor, " n"], groups: list[Int[Tensor, " _"]]) -> float:
    """Effective samples, each of ``groups`` (indices) weighted on its own; the sum over them."""
    return sum(ess(log_weight[index]) * len(index) for index in groups)


def adequate_alpha(
    energy: Float[Tensor, " n"], alpha: float, share: float, log_ratio: Float[Tensor, " n"] | float = 0.0
) -> float:
    """The smallest temperature, from ``alpha`` up, at which ``share`` of the samples is effective; no energy may be NaN.

    log_ratio: log density of what drew them less the prior's.
    """
    return smallest_alpha(alpha, lambda at: ess(-energy / at - log_ratio) >= share)


def smallest_alpha(alpha: float, enough: Callable[[float], bool], most: float = math.inf) -> float:
    """The smallest temperature from ``alpha`` to ``most`` that is ``enough``, where all above it are; the last, where none is.
    exp(12) times alpha at most."""
    if enough(alpha):
        return alpha
    low, high = math.log(alpha), min(math.log(alpha) + 12.0, math.log(most))
    for _ in range(30):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if enough(math.exp(middle)) else (middle, high)
    return max(alpha, min(most, math.exp(high)))


def weighted_mean(value: Float[Tensor, " n"], weight: Float[Tensor, " n"]) -> tuple[float, float]:
    """Self-normalized mean and its standard error; ``weight`` sums to 1. Zero-weight values may be inf."""
    kept = weight > 0
    if not kept.any():
        return math.nan, math.nan
    value, weight = value[kept].double(), weight[kept].double()
    mean = (weight * value).sum()
    return mean.item(), (weight.square() * (value - mean).square()).sum().sqrt().item()


def mean(value: Float[Tensor, " n"]) -> tuple[float, float]:
    """Plain mean and its standard error."""
    value = value.double()
    return value.mean().item(), (value.std() / math.sqrt(len(value))).item()


def start_variance(log_weight: Float[Tensor, " starts rollouts"]) -> tuple[float, float]:
    """Var over starts of log Z(s_0), free of its Monte Carlo noise, with a jackknife standard error.

    log_weight: of two or more policy rollouts from the same starts. For a policy near the optimum every lw of
    one start is near log Z(s_0). Two halves of a start's rollouts estimate it independently, so that their covariance over
    starts holds no noise, however unequal the weights; the mean over four ways to halve them. NaN, both, where half of some
    start's rollouts have zero weight: nothing is known of it.
    """
    starts, rollouts = log_weight.shape
    local = log_weight.double()
    order = torch.arange(rollouts)
    halves = [order % 2 == 0, order < rollouts // 2, order % 4 < 2, (order % 2 == 0) ^ (order < rollouts // 2)]
    pairs = []
    for half in halves:
        if 0 < int(half.sum()) < rollouts:
            pairs.append([local[:, part].logsumexp(1) - math.log(int(part.sum())) for part in (half, ~half)])
    level = torch.stack([torch.stack(pair) for pair in pairs])  # [ways, 2, starts]
    if not torch.isfinite(level).all():
        return math.nan, math.nan

    def estimate(kept: Float[Tensor, " ways 2 kept"]) -> Float[Tensor, ""]:
        centered = kept - kept.mean(-1, keepdim=True)
        return (centered[:, 0] * centered[:, 1]).sum(-1).mean() / (kept.shape[-1] - 1)

    keep = ~torch.eye(starts, dtype=torch.bool, device=level.device)
    leave_out = torch.stack([estimate(level[..., row]) for row in keep])
    error = ((starts - 1) / starts * (leave_out - leave_out.mean()).square().sum()).sqrt()
    return max(0.0, estimate(level).item()), error.item()


def even(count: int) -> Float[Tensor, " {count}"]:
    """Equal weights, float64: those of a policy's samples."""
    return torch.full((count,), 1 / max(count, 1), dtype=torch.float64)


def pairwise_distance(x: Float[Tensor, " n *data"], weight: Float[Tensor, " n"], chunk: int = 1024) -> tuple[float, float]:
    """Weighted mean Euclidean distance between two different samples of [N, ...], and its standard error.

    sum_{i≠j} w_i w_j |x_i - x_j| / sum_{i≠j} w_i w_j, a U-statistic: its error is that of twice its projection. NaN below two
    samples with weight.
    """
    kept = weight > 0
    flat, weight = x[kept].flatten(1).float(), weight[kept] / weight.sum()
    if len(flat) < 2:
        return math.nan, math.nan
    total = torch.cat([torch.cdist(part, flat).double() @ weight for part in flat.split(chunk)])
    other = 1 - weight  # the weight of the pairs that a sample has; its distance to itself is 0
    value = ((weight * total).sum() / (weight * other).sum()).item()
    influence = 2 * weight * (total - value * other) / (weight * other).sum()
    return value, influence.square().sum().sqrt().item()
