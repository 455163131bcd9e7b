"""How different the samples of one class are from each other."""

from __future__ import annotations

import math

from torch import Tensor

from ...finetune.estimators import even, pairwise_distance

DIVERSITY_SAMPLES = 4000  # pairs grow with the square


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
