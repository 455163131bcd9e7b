"""Partitions: cells, quantiles, and the distance between shares with its null."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tiltune.finetune.certificate.evidence import Evidence
from tiltune.finetune.certificate.partition import (
    PARTS,
    binned_distance,
    k_means,
    nearest,
    partition_of,
    share_distance,
    weighted_quantiles,
)


def test_k_means_finds_separated_weighted_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
    x = centers.repeat_interleave(200, 0) + 0.1 * torch.randn(600, 2, generator=generator, dtype=torch.float64)
    weight = torch.rand(600, generator=generator, dtype=torch.float64)
    found = k_means(x, weight, 12, generator)
    nearest = torch.cdist(centers, found).min(1).values
    assert nearest.max() < 0.2
    assert torch.isfinite(found).all()


def test_weighted_quantiles_cut_equal_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(5000, generator=generator, dtype=torch.float64)
    weight = torch.rand(5000, generator=generator, dtype=torch.float64)
    edges = weighted_quantiles(value, weight, 10)
    share = torch.zeros(10, dtype=torch.float64).index_add_(0, torch.bucketize(value, edges), weight) / weight.sum()
    assert len(edges) == 9
    assert (share - 0.1).abs().max() < 1e-3


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {"even": torch.ones_like, "uneven": lambda x: x.exp()}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_null_quantile_covers_exact_samples(weights: str) -> None:
    """Shares of 8 cells, 200 pairs of exact samples: the 99.7% null is exceeded at most 4 times (p = .0004 at .3%).

    And it is not lax: the typical distance is above a quarter of it.
    """
    generator = torch.Generator().manual_seed(0)
    edges = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
    beyond, ratios = 0, []
    for _ in range(200):
        theirs = torch.randn(500, generator=generator, dtype=torch.float64)
        weight = WEIGHTS[weights](theirs)
        mine = torch.randn(500, generator=generator, dtype=torch.float64) + float(weights == "uneven")
        cells = (torch.bucketize(mine, edges), torch.bucketize(theirs, edges))
        distance, null = share_distance(*cells, weight, 8, generator, bootstraps=200)
        beyond += distance > null
        ratios.append(distance / null)
    assert beyond <= 4
    assert sorted(ratios)[100] > 0.25


def test_share_distance_is_the_total_variation() -> None:
    mine, theirs = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 2])
    weight = torch.tensor([1.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    distance, _ = share_distance(mine, theirs, weight, 4, torch.Generator().manual_seed(0))
    assert distance == pytest.approx(0.5 * (abs(0.5 - 0.2) + abs(0.25 - 0.4) + abs(0.25 - 0.4)))


def test_binned_distance_sees_a_shift_and_nothing_in_exact_samples() -> None:
    """10 bins of 4000 samples a side: below the 99.7% null without a shift, and Φ(.25) - Φ(-.25) = .197 at half a sigma."""
    generator = torch.Generator().manual_seed(0)
    mine, theirs = torch.randn(2, 4000, generator=generator, dtype=torch.float64)
    weight = torch.ones_like(theirs)
    edges = weighted_quantiles(theirs, weight, 10)
    distance, null = binned_distance(mine, theirs, weight, edges, generator)
    assert 0 < distance < null < 0.05
    assert binned_distance(mine + 0.5, theirs, weight, edges, generator)[0] == pytest.approx(0.197, abs=0.03)


def test_nearest_gives_the_center_and_its_distance() -> None:
    centers = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    cell, distance = nearest(torch.tensor([[0.0, 1.0], [3.0, 0.0], [4.0, 3.0]]), centers)
    assert cell.tolist() == [0, 1, 1]
    assert distance.tolist() == [1.0, 1.0, 3.0]


def evidence_of(mine: Tensor, theirs: Tensor) -> Evidence:
    zero = torch.zeros(len(mine))
    return Evidence(1.0, mine, mine[:, 0], zero, theirs, torch.zeros(len(theirs)), zero, torch.zeros(1), None, 0)


def test_a_partition_holds_both_sides_and_has_about_equal_ranges() -> None:
    """Two laws far apart: each has cells of its own, and each of ten ranges of distances a tenth, within 4 standard errors."""
    generator = torch.Generator().manual_seed(0)
    mine, theirs = torch.randn(2000, 5, generator=generator), 20 + torch.randn(2000, 5, generator=generator)
    evidence = evidence_of(mine, theirs)
    partition = partition_of(evidence, generator)
    first = partition.labels(evidence.samples, evidence.energy)
    second = partition.labels(evidence.prior_samples, evidence.prior_energy)
    assert set(first) == set(PARTS)
    assert not set(first["cell_tv"].tolist()) & set(second["cell_tv"].tolist())
    share = torch.bincount(torch.cat([first["distance_tv"], second["distance_tv"]]), minlength=10) / 4000
    assert (share - 0.1).abs().max() < 4 * math.sqrt(0.09 / 4000)


def test_energies_and_samples_that_are_no_number_have_a_part() -> None:
    generator = torch.Generator().manual_seed(0)
    evidence = evidence_of(torch.randn(300, 2, generator=generator), torch.randn(300, 2, generator=generator))
    partition = partition_of(evidence, generator)
    labels = partition.labels(torch.full((1, 2), math.nan), torch.tensor([math.nan]))
    assert labels["energy_tv"].item() == 9
    assert 0 <= labels["cell_tv"].item() < 25 and 0 <= labels["distance_tv"].item() < 10
