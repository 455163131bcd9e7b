"""The many wells: m pairs of coordinates, each a tilted double well beside a Gaussian (Noé et al. 2019; arXiv 2505.19552).

    -log rho(x) = sum over pairs of  x1⁴ - 6 x1² - x1/2 + x2²/2          2^m wells, log Z = 164.6957 for D = 32

The law is a product, so that its denoiser, its samples and log Z follow from one integral over x1, taken on a grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from ..samplers.typed import unique_with_inverse
from .fitted_prior import log_gaussian

SCALE = (1.8, 1.0)  # standard deviations of the fitted prior: as far as the wells in x1, exact in x2
GRID = torch.linspace(-4.0, 4.0, 801, dtype=torch.float64)  # of x1; the density is below e^-150 of its maximum beyond
STATES = torch.linspace(-8.0, 8.0, 1601, dtype=torch.float64)  # of x1 in a chain's units


def log_density(x: Tensor) -> Tensor:
    """log rho(x) [N], unnormalized, of x [N, D]; D is even."""
    first, second = x[:, ::2], x[:, 1::2]
    square = first.square()
    return (6 * square - square.square() + 0.5 * first - 0.5 * second.square()).sum(1)


def prior_scale(dim: int) -> Tensor:
    """Standard deviations of the fitted prior [D].

    Errors: ValueError for an odd dimension.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"the many wells come in pairs of coordinates, so dim is an even number from 2 on, not {dim}.")
    return torch.tensor(SCALE, dtype=torch.float64).repeat(dim // 2)


def energy(x: Tensor) -> Tensor:
    """E(x) = log p_prior(x) - log rho(x), nats; x [N, D] → [N]."""
    return log_gaussian(x, prior_scale(x.shape[1])) - log_density(x)


@dataclass(frozen=True, eq=False)
class DoubleWells:
    """p_prior (rho / p_prior)^(1/alpha) in ``pairs`` pairs of coordinates; rho itself at alpha = 1. `denoise` is in units of the
    prior's standard deviations, everything else in those of x."""

    pairs: int
    alpha: float = 1.0

    @cached_property
    def _log_share(self) -> Tensor:
        """log of the unnormalized density of x1 on the grid."""
        rho = 6 * GRID**2 - GRID**4 + 0.5 * GRID
        prior = -0.5 * (GRID / SCALE[0]) ** 2 - math.log(SCALE[0]) - 0.5 * math.log(2 * math.pi)
        return rho / self.alpha + (1 - 1 / self.alpha) * prior

    @property
    def log_z(self) -> float:
        """log E_prior[exp(-E/alpha)]; of x2, whose prior is exact, only the normalizer of rho is left."""
        first = self._log_share.logsumexp(0) + (GRID[1] - GRID[0]).log()
        return self.pairs * (first.item() + 0.5 * math.log(2 * math.pi) / self.alpha)

    @property
    def right(self) -> float:
        """Share of the deeper well of a pair, x1 > 0."""
        share = self._log_share.softmax(0)
        return (share[GRID > 0].sum() + 0.5 * share[GRID == 0].sum()).item()

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, D] float64: x1 from its cell of the grid, evenly within it."""
        cell = torch.multinomial(self._log_share.softmax(0), count * self.pairs, replacement=True, generator=generator)
        within = torch.rand(len(cell), generator=generator, dtype=torch.float64) - 0.5
        first = GRID[cell] + within * (GRID[1] - GRID[0])
        second = torch.randn(len(cell), generator=generator, dtype=torch.float64)
        return torch.stack([first, second], 1).reshape(count, -1)

    def denoise(self, state: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """E[x | state], [N, D]; of x1 from a table of each level, interpolated linearly."""
        levels = torch.stack([signal.double().reshape(-1), noise.double().reshape(-1)], 1).expand(len(state), 2)
        clean = torch.empty_like(state)
        labels, inverse = unique_with_inverse(levels[:, 0])
        for row in range(len(labels)):
            rows = inverse == row
            a, n = levels[rows][0].tolist()
            clean[rows, ::2] = _interpolated(self._table(a, n).to(state), state[rows][:, ::2])
            clean[rows, 1::2] = state[rows][:, 1::2] * (a / (a**2 + n**2))
        return clean

    def _table(self, signal: float, noise: float) -> Tensor:
        return _table(self.alpha, signal, noise)


@cache
def _table(alpha: float, signal: float, noise: float) -> Tensor:
    """E[x1 | state] at `STATES`, in units of the prior's standard deviation."""
    points = GRID / SCALE[0]
    away = (STATES[:, None] - signal * points) / noise
    return (DoubleWells(1, alpha)._log_share - 0.5 * away.square()).softmax(1) @ points


def _interpolated(table: Tensor, state: Tensor) -> Tensor:
    place = ((state - STATES[0].item()) / (STATES[1] - STATES[0]).item()).clamp(0, len(STATES) - 1.001)
    left = place.long()
    return torch.lerp(table[left], table[left + 1], place - left)
