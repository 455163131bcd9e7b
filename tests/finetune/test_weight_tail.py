"""The tail of weights: its shape, and what it holds beyond the largest weight, both against laws that are known."""

import math

import numpy as np
import pytest
import torch

from tiltune.finetune.certificate.criteria import MAX_PARETO_K, MAX_UNSEEN
from tiltune.finetune.weight_tail import pareto_k, weight_tail


def pareto(shape: float, count: int, generator: torch.Generator) -> torch.Tensor:
    """Generalized Pareto weights of scale 1."""
    return (torch.rand(count, generator=generator, dtype=torch.float64) ** (-shape) - 1) / shape


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_pareto_k_recovers_a_known_tail(shape: float) -> None:
    """Generalised Pareto weights of shape k: a tail of 424 fits k to (1 + k)/sqrt(424); the mean of 40 within .05.

    The bar also holds the weak prior's pull toward .5, 10/434 of the distance.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(40):
        found.append(pareto_k((pareto(shape, 20_000, generator) + 1e-9).log()))
    assert abs(float(np.mean(found)) - shape) < 0.05
    assert float(np.std(found)) < 1.4 * (1 + shape) / math.sqrt(424)


@pytest.mark.parametrize("stride", [0.05, 0.25])
@pytest.mark.parametrize("shape", [0.3, 1.0])
def test_pareto_k_of_energies_in_few_values(shape: float, stride: float) -> None:
    """Log-weights cut to multiples of a stride are a Pareto law in steps, many tied weights each; 20 draws.

    The mean is within .1 of the shape: at the coarse stride a light tail holds some eight values, and their foot is a guess.
    """
    generator = torch.Generator().manual_seed(4)
    found = []
    for _ in range(20):
        exponential = -torch.rand(20_000, generator=generator, dtype=torch.float64).log()
        found.append(pareto_k((exponential * shape / stride).floor() * stride))
    assert max(abs(k - shape) for k in found) < 0.3, "a tie at the tail's foot gave up to 15"
    assert float(np.mean(found)) == pytest.approx(shape, abs=0.1)


def test_pareto_k_of_two_values() -> None:
    number = torch.arange(20_000)
    assert pareto_k(torch.where(number < 2000, 3.0, 0.0)) == -math.inf, "the larger weights are all equal"
    assert pareto_k(torch.where(number < 50, 3.0, 0.0)) < 0.7
    assert pareto_k(torch.where(number < 3, 3.0, 0.0)) == math.inf, "three weights are no tail"


def test_pareto_k_of_little_data_light_tails_and_zero_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    assert pareto_k(torch.randn(20, generator=generator)) == math.inf
    assert pareto_k(torch.zeros(1000)) == -math.inf
    assert pareto_k(torch.rand(20_000, generator=generator).log()) < 0.1
    lw = torch.randn(20_000, generator=generator)
    assert pareto_k(torch.cat([lw, torch.full((50,), -math.inf)])) == pytest.approx(pareto_k(lw), abs=0.05)
    assert pareto_k(lw + 700) == pytest.approx(pareto_k(lw), abs=0.02)


@pytest.mark.parametrize("shape", [0.2, 0.5])
def test_what_the_largest_weight_leaves_unseen_is_what_the_law_holds_beyond_it(shape: float) -> None:
    """E[w; w > w_max] of a law of scale 1 and shape k, by integration over its quantiles above that of w_max.

    The median ratio of 40 draws: the fit's error of (1 + k)/sqrt(424) in k moves it by a tenth, and the pull to .5 by less.
    """
    generator = torch.Generator().manual_seed(1)
    ratios = []
    for _ in range(40):
        weight = pareto(shape, 20_000, generator) + 1e-9
        beyond = (1 + shape * weight.max().item()) ** (-1 / shape)  # the chance of a larger one
        points = beyond * (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
        held = beyond * ((points ** (-shape) - 1) / shape).mean().item()
        ratios.append(weight_tail(weight.log()).unseen / (held * (1 - shape)))  # of the mean, 1 / (1 - k)
    assert float(np.median(ratios)) == pytest.approx(1.0, abs=0.25)


def test_a_heavy_tail_of_weights_near_their_mean_holds_little() -> None:
    """Weights 1 + .004 y with y of shape .8, twenty draws of 1200: the largest is about two and a half times the mean. y by
    itself has the same shape, and much of its weight where no draw has been."""
    generator = torch.Generator().manual_seed(2)
    near, alone = [], []
    for _ in range(20):
        y = pareto(0.8, 1200, generator)
        near.append(weight_tail((1 + 0.004 * y).log()))
        alone.append(weight_tail((y + 1e-9).log()))
    heavy = [tail.unseen for tail in near if tail.k > MAX_PARETO_K]
    assert len(heavy) >= 10 and sum(unseen < MAX_UNSEEN for unseen in heavy) >= len(heavy) - 1
    assert all(tail.unseen > MAX_UNSEEN for tail in alone)
    assert weight_tail(pareto(1.5, 1200, generator).log()).unseen == math.inf


def test_what_is_no_tail_holds_nothing_and_what_is_too_little_may_hold_anything() -> None:
    assert weight_tail(torch.zeros(1000)).unseen == 0.0
    assert weight_tail(torch.zeros(20)).unseen == math.inf
