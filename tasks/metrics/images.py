"""Distances between policy samples and a weighted reference, prior samples weighted by exp(-E/alpha), with their errors.

The reference is a sample itself, so every distance stands beside what it shows when nothing but sampling differs: an exact
value, a standard error (``_se``), or the 99.7% quantile of its null (``_null``). Weights [M] are float64 and sum to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...finetune.certificate.evidence import Evidence
from ...finetune.certificate.partition import share_distance, weighted_quantiles
from ...finetune.estimators import mean as mean_and_error
from ...finetune.estimators import weighted_mean
from ...samplers.resampling import systematic
from ..classifier import predicted
from ..inpainting import Inpainting
from .known_truth import w2

NULL_QUANTILE = 0.997
BASIS_DIM = 16
DIVERSITY_SAMPLES = 4000  # pairs grow with the square


def even(count: int) -> Tensor:
    """Equal weights [count]: those of policy samples."""
    return torch.full((count,), 1 / max(count, 1), dtype=torch.float64)


def effective(weight: Tensor) -> float:
    """Effective number of samples, (sum w)² / sum w²."""
    return (weight.sum().square() / weight.square().sum()).item()


# --- principal components of pixels --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PixelBasis:
    """Leading principal components of images: mean [P], axes [P, dim], float64, and the share of variance they hold."""

    mean: Tensor
    axes: Tensor
    share: float

    def __call__(self, images: Tensor) -> Tensor:
        """Images [N, ...] → coordinates [N, dim] in pixel units."""
        return (images.flatten(1).double() - self.mean) @ self.axes


def pixel_basis(images: Tensor, dim: int) -> PixelBasis:
    """The ``dim`` leading principal components of images [N, ...]."""
    flat = images.flatten(1).double()
    center = flat.mean(0)
    values, vectors = torch.linalg.eigh((flat - center).T @ (flat - center) / (len(flat) - 1))
    return PixelBasis(center, vectors[:, -dim:].flip(1), (values[-dim:].sum() / values.sum()).item())


def frechet(x: Tensor, y: Tensor) -> float:
    """Squared Fréchet distance of Gaussians fitted to [n, D], [m, D] (Dowson and Landau 1982), in squared pixel units."""

    def fitted(z: Tensor) -> tuple[Tensor, Tensor]:
        return z.mean(0), torch.cov(z.T)

    (mean_x, cov_x), (mean_y, cov_y) = fitted(x.double()), fitted(y.double())
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    return ((mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross).item()


def frechet_with_error(x: Tensor, y: Tensor, groups: int = 10) -> tuple[float, float]:
    """`frechet`, and a standard error by the jackknife over ``groups`` parts of both samples, which are in random order.

    Biased upward by sampling, as every such distance: compare it with that of two sets of data of the same sizes.
    """
    left_out = []
    for group in range(groups):
        kept = [torch.arange(len(z)) % groups != group for z in (x, y)]
        left_out.append(frechet(x[kept[0]], y[kept[1]]))
    values = torch.tensor(left_out, dtype=torch.float64)
    error = ((groups - 1) / groups * (values - values.mean()).square().sum()).sqrt()
    return frechet(x, y), error.item()


def w2_figures(
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


# --- shares --------------------------------------------------------------------------------------------------------------


def class_shares(label: Tensor, weight: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Shares [classes] of labels [N] under weights [N], and their standard errors."""
    hot = torch.nn.functional.one_hot(label, classes).double()
    share = weight @ hot
    return share, (weight.square() @ (hot - share).square()).sqrt()


def energy_tv(mine: Tensor, theirs: Tensor, weight: Tensor, generator: torch.Generator, bins: int = 10) -> tuple[float, float]:
    """Total variation between policy energies [N] and weighted ones [M] on ``bins`` weighted-quantile bins, and its null."""
    edges = weighted_quantiles(theirs.double(), weight, bins)
    cells = (torch.bucketize(mine.double(), edges), torch.bucketize(theirs.double(), edges))
    return share_distance(*cells, weight, bins, generator)


# --- diversity -----------------------------------------------------------------------------------------------------------


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


def diversity_figures(
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


# --- posterior mean and spread -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and standard deviation of each pixel, [P], and the covariance [P, P] of the error of each; 0 where exact."""

    mean: Tensor
    spread: Tensor
    mean_covariance: Tensor
    spread_covariance: Tensor


def moments(images: Tensor, weight: Tensor) -> Moments:
    """Of images [N, ...] under weights [N]; errors by the delta method."""
    flat = images.flatten(1).double()
    center = weight @ flat
    deviation = flat - center
    variance = weight @ deviation.square()
    spread = variance.sqrt()
    on_mean = weight[:, None] * deviation
    on_spread = weight[:, None] * (deviation.square() - variance) / (2 * spread.clamp(min=1e-12))
    return Moments(center, spread, on_mean.T @ on_mean, on_spread.T @ on_spread)


def exact_moments(mean: Tensor, spread: Tensor) -> Moments:
    """Known ones: mean, spread [P]."""
    zero = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    return Moments(mean.double(), spread.double(), zero, zero)


def moment_figures(
    policy: Moments, target: Moments, pixels: Tensor, generator: torch.Generator, bootstraps: int = 1000
) -> dict[str, float]:
    """Root mean square difference of the means, and of the spreads, over ``pixels`` [P] bool, each with its null.

    The nulls are of the same root mean square for a normal error of both sides' covariance: pixels err together, so that a
    pixel's own standard error would not do. ``spread_ratio`` is the ratio of the root mean squares of the spreads.
    """
    figures: dict[str, float] = {}
    for name in ("mean", "spread"):
        difference = (getattr(policy, name) - getattr(target, name))[pixels]
        error = getattr(policy, f"{name}_covariance") + getattr(target, f"{name}_covariance")
        if not error.isfinite().all():  # a policy that diverged: no figure of it is a number
            figures |= {f"{name}_error": math.nan, f"{name}_error_null": math.nan}
            continue
        values = torch.linalg.eigvalsh(error[pixels][:, pixels]).clamp(min=0)
        draws = torch.randn(bootstraps, len(values), generator=generator, dtype=torch.float64).square() @ values
        figures[f"{name}_error"] = difference.square().mean().sqrt().item()
        figures[f"{name}_error_null"] = (draws / len(values)).sqrt().quantile(NULL_QUANTILE).item()
    figures["spread_ratio"] = (policy.spread[pixels].norm() / target.spread[pixels].norm()).item()
    return figures


# --- all of a task's figures ---------------------------------------------------------------------------------------------


def on_cpu(evidence: Evidence) -> Evidence:
    """Samples and energies of both sides on the CPU, where these figures and pictures are made."""
    names = ("samples", "energy", "prior_samples", "prior_energy")
    return replace(evidence, **{name: getattr(evidence, name).cpu() for name in names})


def _generator_on_cpu(generator: torch.Generator) -> torch.Generator:
    if generator.device.type == "cpu":
        return generator
    return torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=generator, device=generator.device)))


def image_figures(evidence: Evidence, judge: nn.Module, generator: torch.Generator, classes: int = 10) -> dict[str, Any]:
    """W2 among the prior's principal components, the judge's class histogram, and the energy histogram, against the target."""
    evidence, generator = on_cpu(evidence), _generator_on_cpu(generator)
    weight = evidence.target_weight
    basis = pixel_basis(evidence.prior_samples, BASIS_DIM)
    figures: dict[str, Any] = {"basis_share": basis.share}
    figures |= w2_figures(basis(evidence.samples), basis(evidence.prior_samples), weight, generator)
    mine, theirs = predicted(judge, evidence.samples), predicted(judge, evidence.prior_samples)
    for name, (share, error) in (
        ("", class_shares(mine, even(len(mine)), classes)),
        ("_reference", class_shares(theirs, weight, classes)),
    ):
        figures[f"class_shares{name}"] = [round(value, 5) for value in share.tolist()]
        figures[f"class_shares{name}_se"] = [round(value, 5) for value in error.tolist()]
    figures["class_tv"], figures["class_tv_null"] = share_distance(mine, theirs, weight, classes, generator)
    tv = energy_tv(evidence.energy, evidence.prior_energy, weight, generator)
    return figures | {"energy_tv": tv[0], "energy_tv_null": tv[1]}


def wanted_figures(evidence: Evidence, judge: nn.Module, wanted: tuple[int, ...]) -> dict[str, float]:
    """Share of the ``wanted`` classes by the judge, of the policy and of the target, and the diversity within them."""
    evidence = on_cpu(evidence)
    weight = evidence.target_weight
    labels = predicted(judge, evidence.samples), predicted(judge, evidence.prior_samples)
    inside = [torch.isin(label, torch.tensor(wanted)).long() for label in labels]
    own = class_shares(inside[0], even(len(inside[0])), 2)
    reference = class_shares(inside[1], weight, 2)
    figures = {
        "share": own[0][1].item(),
        "share_se": own[1][1].item(),
        "share_reference": reference[0][1].item(),
        "share_reference_se": reference[1][1].item(),
    }
    return figures | diversity_figures(evidence.samples, labels[0], evidence.prior_samples, labels[1], weight, wanted)


def inpainting_figures(evidence: Evidence, problem: Inpainting, generator: torch.Generator) -> dict[str, float]:
    """How measured pixels are reproduced, and the posterior's mean and spread on measured and unmeasured ones.

    ``residual`` is the root mean square of (pixel - measured value) / noise: at most about 1 where the measurement is met.
    """
    evidence, generator = on_cpu(evidence), _generator_on_cpu(generator)
    weight = evidence.target_weight
    figures: dict[str, float] = {}
    sides = (("", evidence.samples, even(len(evidence.samples))), ("_reference", evidence.prior_samples, weight))
    for name, images, share in sides:
        value, error = weighted_mean(problem.residual(images).square().mean(1), share)
        figures |= {f"residual{name}": math.sqrt(value), f"residual{name}_se": 0.5 * error / math.sqrt(value)}
    policy, target = (moments(images, share) for _, images, share in sides)
    measured = problem.measured.flatten()
    for name, pixels in (("measured", measured), ("unmeasured", ~measured)):
        found = moment_figures(policy, target, pixels, generator)
        figures |= {f"{key}_{name}": value for key, value in found.items()}
    return figures
