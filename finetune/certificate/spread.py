"""How far apart the samples of a law are."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


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
