"""How different the samples of one class are from each other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .samples import even

DIVERSITY_SAMPLES = 4000  # pairs grow with the square


def pairwise_distance(x: Tensor, weight: Tensor, chunk: int = 1024) -> tuple[float, float]:
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


def diversity_metrics(
    policy: Tensor, policy_label: Tensor, target: Tensor, target_label: Tensor, weight: Tensor, classes: tuple[int, ...]
) -> dict[str, float]:
    """Mean pairwise distance within a class, policy over weighted target, averaged over ``classes`` by the target's shares.

    A class that the policy lost makes it NaN, which meets no criterion. The policy's first 4000 samples of a class are used.
    """
    shares = {label: weight[target_label == label].sum().item() for label in classes}
    ratio, variance = 0.0, 0.0
    for label, share in shares.items():
        if share == 0:
            continue
        mine = policy[policy_label == label][:DIVERSITY_SAMPLES]
        inside = target_label == label
        own = pairwise_distance(mine, even(len(mine)))
        reference = pairwise_distance(target[inside], weight[inside])
        scale = share / sum(shares.values()) / reference[0]
        ratio += scale * own[0]
        variance += scale**2 * (own[1] ** 2 + (own[0] * reference[1] / reference[0]) ** 2)
    return {"diversity": ratio, "diversity_se": math.sqrt(variance)}
