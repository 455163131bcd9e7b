"""Measure DW-4: log Z, and the laws of energies and distances, by importance sampling alone. Two minutes on one core.

    python -m tiltune.tasks.data.make_dw4

60 million samples of a Gaussian, of which some 40,000 count. The weights are bounded, since rho falls off like a
fourth power; their largest share is written beside log Z.
"""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor

from ..fitted_prior import log_gaussian
from ..four_particles import DATA, DIM, distances, energy, log_density

SAMPLES, CHUNK, SEED = 60_000_000, 250_000, 0
PROPOSAL = torch.full((DIM,), 2.2, dtype=torch.float64)
BINS = 20


def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples [CHUNK, 6] and the logarithms of their weights."""
    x = torch.randn(CHUNK, DIM, generator=generator) * PROPOSAL.float()
    return x, (log_density(x) - log_gaussian(x, PROPOSAL)).double()


def edges(value: Tensor, weight: Tensor) -> Tensor:
    """The quantiles [BINS - 1] of values by weight."""
    order = value.argsort()
    place = torch.searchsorted(weight[order].cumsum(0), torch.linspace(0, 1, BINS + 1, dtype=torch.float64)[1:-1])
    return value[order][place.clamp(max=len(value) - 1)]


def main() -> None:
    generator = torch.Generator().manual_seed(SEED)
    parts = [draw(generator) for _ in range(8)]
    x, log_weight = (torch.cat(part) for part in zip(*parts, strict=True))
    weight = log_weight.softmax(0)
    bounds = {
        "energy": edges(energy(x).double(), weight),
        "distance": edges(distances(x).double().flatten(), weight.repeat_interleave(6) / 6),
    }
    shift = log_weight.max().item()  # so that no weight is far above 1
    total, square, largest = 0.0, 0.0, 0.0
    shares = {name: torch.zeros(BINS, dtype=torch.float64) for name in bounds}
    for _ in range(SAMPLES // CHUNK):
        x, log_weight = draw(generator)
        weight = (log_weight - shift).exp()
        total, square = total + weight.sum().item(), square + weight.square().sum().item()
        largest = max(largest, weight.max().item())
        for name, value, each in (
            ("energy", energy(x), weight),
            ("distance", distances(x).flatten(), weight.repeat_interleave(6) / 6),
        ):
            bins = torch.bucketize(value.double(), bounds[name])
            shares[name] += torch.bincount(bins, weights=each, minlength=BINS)
    effective = total**2 / square
    found = {
        "log_z": math.log(total / SAMPLES) + shift,
        "log_z_se": math.sqrt(1 / effective - 1 / SAMPLES),
        "samples": SAMPLES,
        "effective": effective,
        "largest_share": largest / total,
    }
    for name, bound in bounds.items():
        found |= {f"{name}_edges": bound.tolist(), f"{name}_shares": (shares[name] / total).tolist()}
    DATA.write_text(json.dumps(found, indent=2) + "\n")
    print(found)


if __name__ == "__main__":
    main()
