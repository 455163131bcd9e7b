"""DW-4: four particles in the plane whose six distances each have a double well (Köhler et al. 2020, arXiv 2006.02425).

    -log rho = sum over pairs of  0.9 (d - 4)⁴ - 4 (d - 4)²

The law of the particles' mean would be flat, so it is left out: x are six orthonormal coordinates of the positions whose mean is
0, and log Z is of the integral over those. `data/make_dw4` measured it, with the laws of energies and distances.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .fitted_prior import log_gaussian

PARTICLES, DIM = 4, 6
SCALE = torch.full((DIM,), 2.2, dtype=torch.float64)  # of the fitted prior
OFFSET = 4.0
DATA = Path(__file__).parent / "data" / "dw4.json"
# Orthonormal coordinates of four numbers of mean 0 (Helmert).
BASIS = (
    torch.tensor([[1, 1, 1], [-1, 1, 1], [0, -2, 1], [0, 0, -3]], dtype=torch.float64)
    / torch.tensor([2.0, 6.0, 12.0], dtype=torch.float64).sqrt()
)


def positions(x: Tensor) -> Tensor:
    """Particles [N, 4, 2] of mean 0 from their coordinates x [N, 6]."""
    return torch.einsum("pc,ncd->npd", BASIS.to(x), x.reshape(-1, PARTICLES - 1, 2))


def distances(x: Tensor) -> Tensor:
    """The six distances [N, 6] between particles."""
    first, second = torch.triu_indices(PARTICLES, PARTICLES, 1)
    where = positions(x)
    return (where[:, first] - where[:, second]).norm(dim=-1)


def log_density(x: Tensor) -> Tensor:
    """log rho(x) [N], unnormalized, of x [N, 6]."""
    square = (distances(x) - OFFSET).square()
    return (4 * square - 0.9 * square.square()).sum(1)


def energy(x: Tensor) -> Tensor:
    """E(x) = log p_prior(x) - log rho(x), nats; x [N, 6] → [N]."""
    return log_gaussian(x, SCALE) - log_density(x)


@cache
def measured() -> dict[str, Any]:
    """log_z with its standard error, and histograms of the target: edges between bins, and the share of each bin."""
    return json.loads(DATA.read_text())
