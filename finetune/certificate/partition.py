"""Samples of any shape cut into few parts, so that two laws can be compared by the shares that they give to each part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...samplers.shapes import Index
from .bins import BINS, filled, weighted_quantiles
from .evidence import Evidence

CELLS = 25
FIT = 2000  # samples of each side that the cells are made from
# What a label counts, by the figure that is made of it.
PARTS = {"cell_tv": CELLS, "energy_tv": BINS, "distance_tv": BINS}


@dataclass(frozen=True, eq=False)
class Partition:
    """Three partitions: cells around 25 centers, ten bins of energy, and ten bins of the distance to the nearest center.

    The third sees a law that is too narrow or too wide, which in many dimensions moves no sample to another cell.
    """

    centers: Float[Tensor, " cells dim"]
    energy_edges: Float[Tensor, " edges"]
    distance_edges: Float[Tensor, " edges"]

    def labels(self, samples: Float[Tensor, " n *data"], energy: Float[Tensor, " n"]) -> dict[str, Index]:
        """The part of each sample, under the names of `PARTS`. Samples that are no number lie at 0."""
        cell, distance = nearest(_flat(samples), self.centers)
        return {
            "cell_tv": cell,
            "energy_tv": torch.bucketize(filled(energy), self.energy_edges),
            "distance_tv": torch.bucketize(distance, self.distance_edges),
        }


def partition_of(evidence: Evidence, generator: torch.Generator) -> Partition:
    """The partition of the even mixture of both sides' laws: a region that one of them holds alone has parts of its own."""
    weight = evidence.target_weight.cpu()
    mine = torch.randperm(len(evidence.samples), generator=generator)[:FIT]
    theirs = torch.multinomial(weight, FIT, replacement=True, generator=generator)
    own, target = evidence.samples.cpu()[mine], evidence.target_samples.cpu()[theirs]
    flat = torch.cat([_flat(own), _flat(target)])
    energy = torch.cat([filled(evidence.energy)[mine], filled(evidence.target_energy)[theirs]])
    even = torch.cat([torch.full((len(part),), 0.5 / len(part), dtype=torch.float64) for part in (own, target)])
    centers = k_means(flat, even, CELLS, generator)
    _, distance = nearest(flat, centers)
    return Partition(centers, weighted_quantiles(energy, even, BINS), weighted_quantiles(distance, even, BINS))


def _flat(samples: Float[Tensor, " n *data"]) -> Float[Tensor, " n dim"]:
    return samples.flatten(1).float().cpu().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def k_means(
    x: Float[Tensor, " n dim"], weight: Float[Tensor, " n"], count: int, generator: torch.Generator, rounds: int = 20
) -> Float[Tensor, " {count} dim"]:
    """Weighted Lloyd iterations from weighted draws."""
    weight = weight.to(x.dtype)
    centers = x[torch.multinomial(weight, count, generator=generator)]
    for _ in range(rounds):
        cell, _ = nearest(x, centers)
        mass = torch.zeros(count, dtype=x.dtype).index_add_(0, cell, weight)
        total = torch.zeros_like(centers).index_add_(0, cell, weight[:, None] * x)
        centers = torch.where(mass[:, None] > 0, total / mass.clamp(min=1e-30)[:, None], centers)
    return centers


def nearest(x: Float[Tensor, " n dim"], centers: Float[Tensor, " cells dim"]) -> tuple[Index, Float[Tensor, " n"]]:
    """The index of the nearest center of each row of x, and its distance."""
    found = [torch.cdist(part, centers).min(1) for part in x.split(8192)]
    return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])


def share_distance(
    mine: Index,
    theirs: Int[Tensor, " m"],
    weight: Float[Tensor, " m"],
    count: int,
    generator: torch.Generator,
    bootstraps: int = 1000,
) -> tuple[float, float]:
    """Total variation between the shares of ``count`` cells, and its 99.7% quantile when nothing but sampling differs."""
    share = weight / weight.sum()
    own = torch.bincount(mine, minlength=count).double() / len(mine)
    target = torch.zeros(count, dtype=torch.float64).index_add_(0, theirs, share)
    distance = 0.5 * (own - target).abs().sum().item()
    # The weighted shares' noise, by the delta method: one influence share_i (e_i - target) a sample.
    influence = share[:, None] * (torch.nn.functional.one_hot(theirs, count).double() - target)
    noise = normal_draws(influence.T @ influence, bootstraps, generator)
    # The policy's own sampling noise, around the target's shares: what an exact sampler would show.
    seed = int(torch.randint(2**31, (), generator=generator))
    counts = np.random.default_rng(seed).multinomial(len(mine), (target / target.sum()).numpy(), bootstraps)
    draws = torch.from_numpy(counts).double() / len(mine)
    null = 0.5 * (noise - (draws - target)).abs().sum(1)
    return distance, null.quantile(0.997).item()


def binned_distance(
    mine: Float[Tensor, " n"],
    theirs: Float[Tensor, " m"],
    weight: Float[Tensor, " m"],
    edges: Float[Tensor, " edges"],
    generator: torch.Generator,
) -> tuple[float, float]:
    """`share_distance` of values and of weighted ones on the bins that ``edges`` cut, float64."""
    cells = torch.bucketize(mine, edges), torch.bucketize(theirs, edges)
    return share_distance(*cells, weight, len(edges) + 1, generator)


def normal_draws(
    covariance: Float[Tensor, " parts parts"], count: int, generator: torch.Generator
) -> Float[Tensor, " {count} parts"]:
    """Draws of N(0, covariance), which may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    normal = torch.randn(count, len(covariance), generator=generator, dtype=covariance.dtype)
    return normal * values.clamp(min=0).sqrt() @ vectors.T
