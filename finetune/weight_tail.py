"""The tail of a sample's weights: its shape, Pareto-k, and what the weights that were not drawn may hold.

A generalized Pareto law is fitted to the largest weights (Zhang and Stephens 2009). Beyond the foot u of the tail, which a share
p of the weights is above,

    P(w - u > y) = p (1 + k y / sigma)^(-1/k)

so that the weights above the largest one drawn, w_max, hold in the mean

    E[w; w > w_max] = w_max P(w > w_max) + sigma / (1 - k) (1 + k y_max / sigma) P(w > w_max),        y_max = w_max - u

k is the shape whatever the scale: weights that are all within a factor of two of their mean can have a k above .7, and what they
may have left out is then little.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class WeightTail(NamedTuple):
    """k: Pareto-k; above .7 the mean of the weights cannot be trusted by its standard error. unseen: what weights
    above the largest one drawn may hold, by the fitted tail, over all that was drawn; infinite for k of 1 and more."""

    k: float
    unseen: float


def pareto_k(log_weight: Float[Tensor, " n"]) -> float:
    """The shape of the tail alone."""
    return weight_tail(log_weight).k


def weight_tail(log_weight: Float[Tensor, " n"]) -> WeightTail:
    """The tail is min(N/5, 3 sqrt(N)) weights, and k is drawn a little to .5 (Vehtari et al. 2024, arXiv 1507.02646).

    Fewer than 5 tail points, or a flat tail, give infinities, and minus infinity and nothing unseen. Energies of few values, a
    count of bytes for one, give tied weights, and a tail cannot begin inside a tie: it begins above it, or where fewer than 5 are
    above, below it. Its foot is halfway between the last value below and the first one in it.
    """
    finite = log_weight[torch.isfinite(log_weight)].double().cpu()
    tail_size = int(min(len(finite) / 5, 3 * math.sqrt(len(finite))))
    if tail_size < 5:
        return WeightTail(math.inf, math.inf)
    ordered = (finite - finite.max()).exp().sort().values
    tie = ordered[-tail_size - 1]
    # Nearly equal largest weights (an energy that is flat in its best mode) are no tail at all.
    if ordered[-1] - tie <= 1e-3 * tie:
        return WeightTail(-math.inf, 0.0)
    inside = ordered - tie > 1e-9 * (ordered[-1] - tie)
    if inside.sum() < 5:
        inside = ordered >= tie
    tail, below = ordered[inside], ordered[~inside]
    if len(below) == 0:
        return WeightTail(math.inf, math.inf)
    excess = tail - 0.5 * (below[-1] + tail[0])
    shape, scale = _fit(excess)
    k = (shape * len(tail) + 0.5 * 10) / (len(tail) + 10)
    if k >= 1:
        return WeightTail(k, math.inf)
    further = 1 + k * excess[-1].item() / scale  # the largest weight, of which all are a part, is 1
    above = len(tail) * further ** (-1 / k) if further > 0 else 0.0
    return WeightTail(k, above * (1 + scale / (1 - k) * further) / ordered.sum().item())


def _fit(excess: Float[Tensor, " n"]) -> tuple[float, float]:
    """(shape, scale) of a generalized Pareto law, ``excess`` in ascending order."""
    count, quartile = len(excess), excess[int(len(excess) / 4 + 0.5) - 1]
    size = 30 + int(math.sqrt(count))
    grid = torch.arange(1, size + 1, dtype=torch.float64)
    theta = 1 / excess[-1] + (1 - (size / (grid - 0.5)).sqrt()) / (3 * quartile)
    shape = torch.log1p(-theta[:, None] * excess).mean(1)
    profile = count * (torch.log(-theta / shape) - shape - 1)
    theta_hat = (profile.softmax(0) * theta).sum()
    k = torch.log1p(-theta_hat * excess).mean().item()
    return k, -k / theta_hat.item()
