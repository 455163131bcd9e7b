"""Neal's funnel (2003) in ten dimensions: x0 ~ N(0, 1), and x1 ... x9 ~ N(0, exp(x0)) each. Normalized, so that log Z = 0.

x0 has variance 1 here, the easier of the two in use; with variance 9 the neck is a thousand times as narrow as the mouth, and no
chain of a hundred steps resolves it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .fitted_prior import log_gaussian

DIM = 10
SCALE = torch.tensor([1.0] + [2.0] * (DIM - 1), dtype=torch.float64)  # of the fitted prior; of the mouth more than of the neck
GRID = torch.linspace(-6.0, 6.0, 481, dtype=torch.float64)  # of x0


def log_density(x: Tensor) -> Tensor:
    """log rho(x) [N], normalized, of x [N, 10]."""
    first, square = x[:, 0], x[:, 1:].square().sum(1)
    inside = -0.5 * square * torch.exp(-first) - 0.5 * (DIM - 1) * first
    return inside - 0.5 * first.square() - 0.5 * DIM * math.log(2 * math.pi)


def energy(x: Tensor) -> Tensor:
    """E(x) = log p_prior(x) - log rho(x), nats; x [N, 10] → [N]."""
    return log_gaussian(x, SCALE) - log_density(x)


def sample(count: int, generator: torch.Generator) -> Tensor:
    """Exact samples [count, 10] float64."""
    x = torch.randn(count, DIM, generator=generator, dtype=torch.float64)
    return torch.cat([x[:, :1], x[:, 1:] * (0.5 * x[:, :1]).exp()], 1)


def radius(x: Tensor) -> Tensor:
    """Share of the funnel within the radius of x [N, 10] at its own x0: evenly spread between 0 and 1 under the target."""
    scaled = x[:, 1:].double().square().sum(1) * torch.exp(-x[:, 0].double())
    return torch.special.gammainc(torch.tensor(0.5 * (DIM - 1), dtype=torch.float64), 0.5 * scaled.cpu())


def depth(x: Tensor) -> Tensor:
    """Share of the funnel below the x0 of x [N, 10]: evenly spread between 0 and 1 under the target."""
    return torch.special.ndtr(x[:, 0].double().cpu())


class Funnel:
    """The funnel in units of the prior's standard deviations; the posterior mean is an integral over x0, on a grid."""

    def denoise(self, state: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """E[x | state] [N, 10]: x1 ... x9 shrink toward 0, by how much follows from x0, and x0 from all of them."""
        scale, grid = SCALE.to(state), GRID.to(state)
        signal, noise = (level.reshape(-1, 1).to(state) for level in (signal, noise))
        inner = grid.exp() / scale[1] ** 2  # variance of x1 ... x9 given x0
        total = signal**2 * inner + noise**2
        away = (state[:, :1] - signal * grid / scale[0]) / noise
        square = state[:, 1:].square().sum(1, keepdim=True)
        log_share = -0.5 * (grid.square() + away.square() + square / total + (DIM - 1) * total.log())
        share = log_share.softmax(1)
        gain = (share * signal * inner / total).sum(1, keepdim=True)
        return torch.cat([(share @ grid)[:, None] / scale[0], gain * state[:, 1:]], 1)
