"""Distances between image samples of a policy and a weighted reference, prior samples weighted by exp(-E/alpha).

The reference is a sample itself, so every distance stands beside what it shows when nothing but sampling differs: an exact
value, a standard error (``_se``), or the 99.7% quantile of its null (``_null``). Weights [M] are float64 and sum to 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...finetune.certificate.evidence import Evidence
from ...finetune.certificate.partition import binned_distance, share_distance, weighted_quantiles
from ...finetune.estimators import even, weighted_mean
from ...finetune.estimators import mean as mean_and_error
from ...samplers.resampling import systematic
from ..classifier import predicted
from ..inpainting import Inpainting
from .diversity import diversity_metrics
from .known_truth import w2
from .moments import moment_metrics, moments
from .principal_components import pixel_basis
from .samples import effective, generator_on_cpu, on_cpu

BASIS_DIM = 16


def w2_metrics(
    policy: Tensor, target: Tensor, weight: Tensor, generator: torch.Generator, pairs: int = 4, most: int = 1000
) -> dict[str, float]:
    """W2 between policy samples [N, D] and the weighted target [M, D], and between the target and itself, over ``pairs`` pairs.

    The target is cut into 2 · pairs random parts, each resampled by weight to no more points than it has effective ones, so
    that all pairs are independent and none compares a sample with its own copies. ``w2_ratio`` is 1 for an exact sampler; NaN,
    all, where the effective numbers leave sets of fewer than ten (``w2_size``).
    """
    order = torch.randperm(len(target), generator=generator)
    parts = order.tensor_split(2 * pairs)
    size = min(most, len(policy) // pairs, int(min(effective(weight[part]) for part in parts)))
    names = ("w2", "w2_se", "w2_exact", "w2_exact_se", "w2_ratio", "w2_ratio_se")
    if size < 10:
        return dict.fromkeys(names, math.nan) | {"w2_size": size}
    sets = [target[part[systematic(weight[part], size, generator)]] for part in parts]
    own = policy[torch.randperm(len(policy), generator=generator)[: pairs * size]].split(size)
    ours = mean_and_error(torch.tensor([w2(x, y) for x, y in zip(own, sets[:pairs], strict=True)]))
    exact = mean_and_error(torch.tensor([w2(x, y) for x, y in zip(sets[pairs:], sets[:pairs], strict=True)]))
    ratio = ours[0] / exact[0]
    error = ratio * math.hypot(ours[1] / ours[0], exact[1] / exact[0])
    return dict(zip(names, (*ours, *exact, ratio, error), strict=True)) | {"w2_size": size}


def class_shares(label: Tensor, weight: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Shares [classes] of labels [N] under weights [N], and their standard errors."""
    hot = torch.nn.functional.one_hot(label, classes).double()
    share = weight @ hot
    return share, (weight.square() @ (hot - share).square()).sqrt()


def energy_tv(mine: Tensor, theirs: Tensor, weight: Tensor, generator: torch.Generator, bins: int = 10) -> tuple[float, float]:
    """Total variation between policy energies [N] and weighted ones [M] on ``bins`` weighted-quantile bins, and its null."""
    mine, theirs = mine.double(), theirs.double()
    return binned_distance(mine, theirs, weight, weighted_quantiles(theirs, weight, bins), generator)


def image_metrics(evidence: Evidence, judge: nn.Module, generator: torch.Generator, classes: int = 10) -> dict[str, Any]:
    """W2 among the prior's principal components, the judge's class histogram, and the energy histogram, against the target."""
    evidence, generator = on_cpu(evidence), generator_on_cpu(generator)
    weight = evidence.target_weight
    basis = pixel_basis(evidence.prior_samples, BASIS_DIM)
    metrics: dict[str, Any] = {"basis_share": basis.share}
    metrics |= w2_metrics(basis(evidence.samples), basis(evidence.target_samples), weight, generator)
    mine, theirs = predicted(judge, evidence.samples), predicted(judge, evidence.target_samples)
    for name, (share, error) in (
        ("", class_shares(mine, even(len(mine)), classes)),
        ("_reference", class_shares(theirs, weight, classes)),
    ):
        metrics[f"class_shares{name}"] = [round(value, 5) for value in share.tolist()]
        metrics[f"class_shares{name}_se"] = [round(value, 5) for value in error.tolist()]
    metrics["class_tv"], metrics["class_tv_null"] = share_distance(mine, theirs, weight, classes, generator)
    tv = energy_tv(evidence.energy, evidence.target_energy, weight, generator)
    return metrics | {"energy_tv": tv[0], "energy_tv_null": tv[1]}


def wanted_metrics(evidence: Evidence, judge: nn.Module, wanted: tuple[int, ...]) -> dict[str, float]:
    """Share of the ``wanted`` classes by the judge, of the policy and of the target, and the diversity within them."""
    evidence = on_cpu(evidence)
    weight = evidence.target_weight
    labels = predicted(judge, evidence.samples), predicted(judge, evidence.target_samples)
    inside = [torch.isin(label, torch.tensor(wanted)).long() for label in labels]
    own = class_shares(inside[0], even(len(inside[0])), 2)
    reference = class_shares(inside[1], weight, 2)
    metrics = {
        "share": own[0][1].item(),
        "share_se": own[1][1].item(),
        "share_reference": reference[0][1].item(),
        "share_reference_se": reference[1][1].item(),
    }
    return metrics | diversity_metrics(evidence.samples, labels[0], evidence.target_samples, labels[1], weight, wanted)


def inpainting_metrics(evidence: Evidence, problem: Inpainting, generator: torch.Generator) -> dict[str, float]:
    """How measured pixels are reproduced, and the posterior's mean and spread on measured and unmeasured ones.

    ``residual`` is the root mean square of (pixel - measured value) / noise: at most about 1 where the measurement is met.
    """
    evidence, generator = on_cpu(evidence), generator_on_cpu(generator)
    weight = evidence.target_weight
    metrics: dict[str, float] = {}
    sides = (("", evidence.samples, even(len(evidence.samples))), ("_reference", evidence.target_samples, weight))
    for name, images, share in sides:
        value, error = weighted_mean(problem.residual(images).square().mean(1), share)
        metrics |= {f"residual{name}": math.sqrt(value), f"residual{name}_se": 0.5 * error / math.sqrt(value)}
    policy, target = (moments(images, share) for _, images, share in sides)
    measured = problem.measured.flatten()
    for name, pixels in (("measured", measured), ("unmeasured", ~measured)):
        found = moment_metrics(policy, target, pixels, generator)
        metrics |= {f"{key}_{name}": value for key, value in found.items()}
    return metrics
