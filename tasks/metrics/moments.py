"""Mean and spread of each pixel, of a policy and of a posterior, with their errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NULL_QUANTILE = 0.997


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


def moment_metrics(
    policy: Moments, target: Moments, pixels: Tensor, generator: torch.Generator, bootstraps: int = 1000
) -> dict[str, float]:
    """Root mean square difference of the means, and of the spreads, over ``pixels`` [P] bool, each with its null.

    The nulls are of the same root mean square for a normal error of both sides' covariance: pixels err together, so that a
    pixel's own standard error would not do. ``spread_ratio`` is the ratio of the root mean squares of the spreads.
    """
    metrics: dict[str, float] = {}
    for name in ("mean", "spread"):
        difference = (getattr(policy, name) - getattr(target, name))[pixels]
        error = getattr(policy, f"{name}_covariance") + getattr(target, f"{name}_covariance")
        if not error.isfinite().all():  # a policy that diverged: no figure of it is a number
            metrics |= {f"{name}_error": math.nan, f"{name}_error_null": math.nan}
            continue
        values = torch.linalg.eigvalsh(error[pixels][:, pixels]).clamp(min=0)
        draws = torch.randn(bootstraps, len(values), generator=generator, dtype=torch.float64).square() @ values
        metrics[f"{name}_error"] = difference.square().mean().sqrt().item()
        metrics[f"{name}_error_null"] = (draws / len(values)).sqrt().quantile(NULL_QUANTILE).item()
    metrics["spread_ratio"] = (policy.spread[pixels].norm() / target.spread[pixels].norm()).item()
    return metrics
