"""The metrics against closed forms, and against the traps of published benchmarks."""

import math

import pytest
import torch

from tiltune.tasks.metrics.known_truth import histogram_tv, mmd, mode_shares, mode_spreads, mode_tv, modes_of, w2, w2_sets
from tiltune.tasks.mixture_target import target_mixture


def test_w2_of_a_shift_is_the_shift():
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert w2(x, x + torch.tensor([3.0, 4.0])) == pytest.approx(5.0, rel=1e-9)
    assert w2(x, x) == pytest.approx(0.0, abs=1e-6)


def test_w2_sets_are_disjoint_and_refuse_to_reuse_samples():
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert w2_sets(x, x, sets=4, size=10).abs().max() < 1e-6
    with pytest.raises(ValueError, match="need 50 samples"):
        w2_sets(x, x, sets=5, size=10)


def test_mmd_of_exact_samples_is_zero_within_its_error_and_may_be_negative():
    """40 pairs of n = 200: |mean| below 4 standard errors (p < 1e-4); keeping the diagonal would add about 1/n."""
    generator = torch.Generator().manual_seed(0)
    truth = target_mixture()
    values = torch.tensor([mmd(truth.sample(200, generator), truth.sample(200, generator), 1.0) for _ in range(40)])
    error = values.std() / math.sqrt(40)
    assert values.mean().abs() < 4 * error
    assert values.min() < 0
    assert 4 * error < 2 / 200, "the trap's bias would have shown"


def test_mmd_of_different_laws_is_positive():
    generator = torch.Generator().manual_seed(0)
    wide = target_mixture(variance=0.6).sample(1000, generator)
    assert mmd(wide, target_mixture().sample(1000, generator), 1.0) > 0.003


def test_modes_are_found_and_samples_between_them_belong_to_none():
    truth = target_mixture()
    assert torch.equal(modes_of(truth.means, truth), torch.arange(9))
    assert modes_of(torch.tensor([[2.5, 2.5], [100.0, 0.0]]), truth).tolist() == [9, 9]


def test_mode_tv_counts_lost_and_invented_mass():
    truth = target_mixture()
    count = 61
    exact = truth.means.repeat_interleave((truth.weights * count).round().long(), 0)
    assert mode_tv(exact, truth) == pytest.approx(0.0, abs=1e-9)
    astray = exact.clone()
    astray[:10] = 50.0
    assert mode_tv(astray, truth) == pytest.approx(10 / 61, abs=1e-9)
    assert mode_shares(astray, truth)[9] == pytest.approx(10 / 61)


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.2])
def test_mode_spreads_measure_the_scale(factor):
    """40000 samples: the lightest mode holds 2600, so its spread is known to 1% (one standard error)."""
    truth = target_mixture()
    x = target_mixture(variance=0.3 * factor**2).sample(40_000, torch.Generator().manual_seed(0))
    spreads = mode_spreads(x, truth)
    # Four standard deviations of the truth cut a little off the wide one.
    assert (spreads / factor - 1).abs().max() < 0.04
    assert mode_spreads(x[modes_of(x, truth) != 0], truth)[0].isnan()


def test_histogram_tv_of_a_shift():
    x = torch.arange(1000.0)
    assert histogram_tv(x, x) == pytest.approx(0.0, abs=0.002)
    assert histogram_tv(x + 500, x) == pytest.approx(0.5, abs=0.01)
    assert histogram_tv(x + 5000, x) == pytest.approx(0.95, abs=0.01)
