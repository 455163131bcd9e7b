"""The 25 → 9 mode problem of the RTB paper (arXiv 2405.20971, section 5.1): prior, target and energy in closed form.

p25: equal modes on {-10, -5, 0, 5, 10}², covariance 0.3 I. p9: nine of them, unequally weighted.
E = log p25 - log p9, so that at alpha = 1 the tilted prior is p9 exactly, and log Z = 0.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .gaussian_mixture import GaussianMixture
from .tilts import linear, mixture, quadratic  # noqa: F401 - the energies in any dimension, by name beside the plane's

MODE_VARIANCE = 0.3
TARGET_MODES = {
    (-10, -5): 4,
    (-5, -10): 10,
    (-5, 0): 4,
    (10, -5): 5,
    (0, 0): 10,
    (0, 5): 5,
    (5, -5): 4,
    (5, 0): 15,
    (5, 10): 4,
}
# Total variation up to which the closed form counts as the target.
MOST_TILT_ERROR = 0.002


def _isotropic(weights: Tensor, means: Tensor, variance: float = MODE_VARIANCE) -> GaussianMixture:
    covariance = variance * torch.eye(2, dtype=torch.float64)
    return GaussianMixture(weights / weights.sum(), means, covariance.expand(len(means), 2, 2))


def prior_mixture() -> GaussianMixture:
    """p25."""
    axis = torch.arange(-10.0, 11.0, 5.0, dtype=torch.float64)
    return _isotropic(torch.ones(25, dtype=torch.float64), torch.cartesian_prod(axis, axis))


def target_mixture(alpha: float = 1.0, variance: float = MODE_VARIANCE) -> GaussianMixture:
    """p25 (p9 / p25)^(1/alpha), normalized: nine modes weighted (1/25) (25 v)^(1/alpha).

    Exact at alpha = 1; elsewhere up to the mass between modes, `tilt_error`.
    """
    means = torch.tensor(list(TARGET_MODES), dtype=torch.float64)
    share = torch.tensor(list(TARGET_MODES.values()), dtype=torch.float64)
    return _isotropic((share / share.sum()) ** (1 / alpha), means, variance)


def certified_target(alpha: float) -> GaussianMixture:
    """`target_mixture`, where it is the tilted law.

    Errors: ValueError for a temperature at which the mass between modes makes it another.
    """
    error = tilt_error(alpha)
    if error > MOST_TILT_ERROR:
        raise ValueError(
            f"--alpha {alpha:g}: the closed form of the target is off by a total variation of {error:.3f} there, so nothing"
            " could be certified against it; stay below 2.5."
        )
    return target_mixture(alpha)


def energy(x: Tensor) -> Tensor:
    """E(x) = log p25(x) - log p9(x), nats; x [N, 2] → [N]."""
    return prior_mixture().log_density(x) - target_mixture().log_density(x)


def ideal_log_z(alpha: float = 1.0) -> float:
    """log of the integral of p25 (p9/p25)^(1/alpha): 0 at alpha = 1. On a grid of step 0.05 otherwise."""
    return 0.0 if alpha == 1.0 else _grid(alpha)[0]


def tilt_error(alpha: float) -> float:
    """Total variation between the true tilted law and `target_mixture(alpha)`, on a grid of step 0.05."""
    return 0.0 if alpha == 1.0 else _grid(alpha)[1]


@cache
def _grid(alpha: float) -> tuple[float, float]:
    axis = torch.arange(-14.0, 14.0, 0.05, dtype=torch.float64) + 0.025
    points = torch.cartesian_prod(axis, axis)
    log_density = prior_mixture().log_density(points) - energy(points) / alpha
    log_z = (log_density.logsumexp(0) + 2 * torch.log(torch.tensor(0.05, dtype=torch.float64))).item()
    gap = log_density.softmax(0) - target_mixture(alpha).log_density(points).softmax(0)
    return log_z, 0.5 * gap.abs().sum().item()
