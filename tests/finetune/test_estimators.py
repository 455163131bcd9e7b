"""Estimators against numpy closed forms, and their standard errors against Monte Carlo (fixed seeds)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tiltune.finetune.estimators import adequate_alpha, ess, log_mean_exp, mean, start_variance, weighted_mean


def log_weights(count: int = 500, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_log_mean_exp_against_numpy() -> None:
    lw = log_weights()
    weight = np.exp(lw.numpy())
    value, error = log_mean_exp(lw)
    assert value == pytest.approx(np.log(weight.mean()), rel=1e-12)
    assert error == pytest.approx(weight.std() / weight.mean() / math.sqrt(500), rel=1e-12)
    # Far outside the range of exp, and in float32.
    assert log_mean_exp(lw + 5000)[0] == pytest.approx(value + 5000, rel=1e-12)
    assert log_mean_exp(lw.float())[0] == pytest.approx(value, abs=1e-6)


def test_ess_against_numpy() -> None:
    lw = log_weights()
    weight = np.exp(lw.numpy())
    assert ess(lw) == pytest.approx(weight.sum() ** 2 / (500 * (weight**2).sum()), rel=1e-12)
    assert ess(lw - 900) == pytest.approx(ess(lw), rel=1e-9)
    assert ess(torch.zeros(7)) == pytest.approx(1.0)
    assert ess(torch.tensor([0.0, -math.inf, -math.inf, -math.inf])) == pytest.approx(0.25)


def test_the_adequate_temperature_has_the_share_of_its_closed_form() -> None:
    """Energies spread evenly over (0, L): at low temperature the weights are exponential, (sum w)² / sum w² is 2 alpha, and a
    share of 2 alpha/L is effective; where they were drawn tilted, 1/alpha less that tilt counts."""
    energy = 40 * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert adequate_alpha(energy, 0.1, 0.025) == pytest.approx(40 * 0.025 / 2, rel=0.01)
    assert adequate_alpha(energy, 0.6, 0.025) == 0.6  # enough already
    assert adequate_alpha(energy, 0.1, 0.025, log_ratio=-energy / 0.5) == pytest.approx(1 / (1 / 0.5 + 1 / 0.5), rel=0.01)


def test_weighted_mean_against_numpy() -> None:
    weight = log_weights().softmax(0)
    value = log_weights(seed=1)
    w, v = weight.numpy(), value.numpy()
    average = (w * v).sum()
    assert weighted_mean(value, weight) == pytest.approx((average, np.sqrt((w**2 * (v - average) ** 2).sum())), rel=1e-12)
    uniform = torch.full((500,), 1 / 500, dtype=torch.float64)
    assert weighted_mean(value, uniform) == pytest.approx((v.mean(), v.std() / math.sqrt(500)), rel=1e-12)
    assert mean(value) == pytest.approx((v.mean(), v.std(ddof=1) / math.sqrt(500)), rel=1e-12)


def test_zero_weights_are_left_out_even_where_the_value_is_infinite() -> None:
    lw = torch.tensor([0.0, math.log(3.0), -math.inf])
    assert log_mean_exp(lw)[0] == pytest.approx(math.log(4 / 3))
    assert log_mean_exp(torch.full((4,), -math.inf)) == (-math.inf, math.inf)
    assert ess(torch.full((4,), -math.inf)) == 0.0
    value, error = weighted_mean(torch.tensor([1.0, 2.0, math.inf]), lw.softmax(0))
    assert value == pytest.approx(1.75, rel=1e-6)
    assert math.isfinite(error)


@pytest.mark.parametrize("estimator", ["log_mean_exp", "weighted_mean", "mean"])
def test_standard_errors_are_those_of_repeated_draws(estimator: str) -> None:
    """400 repetitions of 2000 draws: the spread of the estimate within 12% of the mean stated error.

    A standard deviation of 400 has a relative error of 3.5%, so a right error fails with p < .001.
    """
    generator = torch.Generator().manual_seed(0)
    values, errors = [], []
    for _ in range(400):
        lw = 0.7 * torch.randn(2000, generator=generator, dtype=torch.float64)
        other = torch.randn(2000, generator=generator, dtype=torch.float64) + 0.5 * lw
        result = {
            "log_mean_exp": lambda lw=lw: log_mean_exp(lw),
            "weighted_mean": lambda lw=lw, other=other: weighted_mean(other, lw.softmax(0)),
            "mean": lambda other=other: mean(other),
        }[estimator]()
        values.append(result[0])
        errors.append(result[1])
    truth = {"log_mean_exp": 0.245, "weighted_mean": 0.5 * 0.49, "mean": 0.0}[estimator]
    spread = float(np.std(values, ddof=1))
    assert spread == pytest.approx(float(np.mean(errors)), rel=0.12)
    assert abs(float(np.mean(values)) - truth) < 4 * spread / 20 + 0.001


@pytest.mark.parametrize("planted", [0.0, 0.05, 0.4])
def test_start_variance_recovers_a_planted_variance(planted: float) -> None:
    """128 starts of 8 rollouts with residuals of .3 nats, 60 repetitions.

    The estimate is cut at 0, which lifts its mean by .4 standard deviations where nothing is planted; .02 allows for that
    and for the bias of the log at 8 rollouts.
    """
    generator = torch.Generator().manual_seed(0)
    found, errors = [], []
    for _ in range(60):
        level = math.sqrt(planted) * torch.randn(128, 1, generator=generator)
        value, error = start_variance(level + 0.3 * torch.randn(128, 8, generator=generator))
        found.append(value)
        errors.append(error)
    assert abs(float(np.mean(found)) - planted) < 0.02
    if planted:
        assert float(np.std(found)) == pytest.approx(float(np.mean(errors)), rel=0.3)
    else:
        assert max(found) < 0.05


def test_start_variance_sees_no_memory_in_unequal_weights() -> None:
    """Rollouts of a poor policy, lw spread by 3 nats, from starts that do not matter: no flag; with memory, one."""
    generator = torch.Generator().manual_seed(1)
    lw = 3.0 * torch.randn(256, 8, generator=generator)
    value, error = start_variance(lw)
    assert value - 1.64 * error < 0.05
    value, error = start_variance(lw + 1.5 * torch.randn(256, 1, generator=generator))
    assert value - 1.64 * error > 0.05


def test_start_variance_with_forbidden_rollouts() -> None:
    """Some rollouts of zero weight are ordinary; a start without any finite one cannot be measured, and says so."""
    lw = 0.1 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    lw[::4, 0] = -math.inf
    value, error = start_variance(lw)
    assert 0 <= value < 0.1
    assert math.isfinite(error)
    lw[3] = -math.inf
    value, error = start_variance(lw)
    assert math.isnan(value)
    assert math.isnan(error)
