"""Distances to a known truth, each beside the same figure between two exact sample sets, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...finetune.estimators import mean as mean_and_error
from ..gaussian_mixture import GaussianMixture

W2_SETS, W2_SIZE = 40, 1000
MODE_SAMPLES = 20_000


def w2(x: Tensor, y: Tensor) -> float:
    """Exact Wasserstein-2 between two equal-weight sample sets [n, D], [m, D] (POT's network simplex)."""
    import ot

    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        return math.nan  # the solver would return nothing, which must not read as a distance of 0

    cost = torch.cdist(x.double(), y.double()).square().cpu().numpy()
    squared: Any = ot.emd2([], [], cost, numItermax=1_000_000)
    return math.sqrt(max(0.0, float(squared)))


def w2_sets(x: Tensor, y: Tensor, sets: int, size: int = W2_SIZE) -> Tensor:
    """W2 of ``sets`` disjoint pairs of ``size``: [sets]."""
    if min(len(x), len(y)) < sets * size:
        raise ValueError(f"{sets} disjoint sets of {size} need {sets * size} samples on each side, not {len(x)}, {len(y)}.")
    return torch.tensor([w2(x[i * size : (i + 1) * size], y[i * size : (i + 1) * size]) for i in range(sets)])


def mmd(x: Tensor, y: Tensor, bandwidth: float) -> float:
    """Unbiased squared MMD with a Gaussian kernel: the diagonal is left out, and may come out negative."""

    def off_diagonal(a: Tensor) -> Tensor:
        kernel = torch.exp(-0.5 * torch.cdist(a, a).square() / bandwidth**2)
        return (kernel.sum() - kernel.diagonal().sum()) / (len(a) * (len(a) - 1))

    x, y = x.double(), y.double()
    cross = torch.exp(-0.5 * torch.cdist(x, y).square() / bandwidth**2).mean()
    return (off_diagonal(x) + off_diagonal(y) - 2 * cross).item()


def modes_of(x: Tensor, truth: GaussianMixture) -> Tensor:
    """Index of the mode each sample [N, D] lies in, or n for none: farther than four standard deviations from all."""
    x = x.double().cpu()
    distance = torch.stack(
        [
            ((x - mean) @ torch.linalg.inv(covariance) * (x - mean)).sum(1)
            for mean, covariance in zip(truth.means, truth.covariances, strict=True)
        ],
        1,
    )
    near, mode = distance.min(1)
    return torch.where(near <= 16.0, mode, len(truth.means))


def mode_shares(x: Tensor, truth: GaussianMixture) -> Tensor:
    """[n + 1] shares of the modes, the last one between them."""
    return torch.bincount(modes_of(x, truth), minlength=len(truth.means) + 1).double() / len(x)


def mode_tv(x: Tensor, truth: GaussianMixture) -> float:
    """Total variation between mode shares and exact weights; samples between modes count as a mode of weight 0."""
    exact = torch.cat([truth.weights, torch.zeros(1, dtype=torch.float64)])
    return 0.5 * (mode_shares(x, truth) - exact).abs().sum().item()


def mode_spreads(x: Tensor, truth: GaussianMixture) -> Tensor:
    """[n] root mean square Mahalanobis radius of each mode over that of the truth; NaN for an empty mode."""
    mode = modes_of(x, truth)
    x = x.double().cpu()
    spreads = []
    for index, (mean, covariance) in enumerate(zip(truth.means, truth.covariances, strict=True)):
        inside = x[mode == index] - mean
        radius = (inside @ torch.linalg.inv(covariance) * inside).sum(1).mean()
        spreads.append((radius / x.shape[1]).sqrt())
    return torch.stack(spreads)


def histogram_tv(x: Tensor, y: Tensor, bins: int = 20) -> float:
    """Total variation between histograms of two samples [N], [M] on quantile bins of the second."""
    edges = y.double().quantile(torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1])
    shares = [torch.bincount(torch.bucketize(part.double(), edges), minlength=bins) / len(part) for part in (x, y)]
    return 0.5 * (shares[0] - shares[1]).abs().sum().item()


def truth_metrics(
    x: Tensor,
    truth: GaussianMixture,
    energy: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    exact_w2: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Every distance of policy samples [≥ 40000, D] to the truth, and ``*_exact``: the same for as many exact samples.

    W2 on 40 disjoint sets of 1000, mode shares and energies on the first 20000, mode spreads on all.
    exact_w2: (mean, standard error) of W2 between two exact sets of 1000, where it is known; else it is measured on 40.
    """
    x = x.double().cpu()
    reference, twin = (truth.sample(max(len(x), W2_SETS * W2_SIZE), generator) for _ in range(2))
    own = mean_and_error(w2_sets(x, reference, W2_SETS))
    exact = exact_w2 or mean_and_error(w2_sets(twin, reference, W2_SETS))
    ratio = own[0] / exact[0]
    spreads, twin_spreads = mode_spreads(x, truth), mode_spreads(twin[: len(x)], truth)
    x, twin, reference = x[:MODE_SAMPLES], twin[:MODE_SAMPLES], reference[:MODE_SAMPLES]
    bandwidth = 1.0
    energies = [energy(part.float()) for part in (x, twin, reference)]
    return {
        "w2": own[0],
        "w2_se": own[1],
        "w2_exact": exact[0],
        "w2_exact_se": exact[1],
        "w2_ratio": ratio,
        "w2_ratio_se": ratio * math.hypot(own[1] / own[0], exact[1] / exact[0]),
        "mmd": mmd(x[:2000], reference[:2000], bandwidth),
        "mmd_exact": mmd(twin[:2000], reference[:2000], bandwidth),
        "mode_tv": mode_tv(x, truth),
        "mode_tv_exact": mode_tv(twin, truth),
        "mode_shares": [round(value, 5) for value in mode_shares(x, truth).tolist()],
        "mode_spreads": [round(value, 4) for value in spreads.tolist()],
        # An empty mode has no spread; that is an infinite error, not a missing one.
        "mode_spread_error": (spreads - 1).abs().nan_to_num(nan=math.inf).max().item(),
        "mode_spread_error_exact": (twin_spreads - 1).abs().max().item(),
        "energy_tv": histogram_tv(energies[0], energies[2]),
        "energy_tv_exact": histogram_tv(energies[1], energies[2]),
    }
