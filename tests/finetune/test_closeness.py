"""The differences between both sides' shares, against closed forms and against repetition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tiltune.finetune.certificate.closeness import bridge, path_tv, total_variation, undercovered, unseen
from tiltune.finetune.certificate.evidence import Evidence
from tiltune.tasks.gaussian_mixture import GaussianMixture
from toys.held_out_mixtures import HeldOut, certificate

EDGES = torch.linspace(-2.5, 1.5, 7)


def normal(mean: float, std: float = 1.0) -> GaussianMixture:
    one = torch.ones(1, dtype=torch.float64)
    return GaussianMixture(one, mean * one[:, None], std**2 * one[:, None, None])


TASK = HeldOut(normal(0.0), torch.ones(1, dtype=torch.float64))  # N(0, 1) tilted by x: N(-1, 1), log Z = ½


def evidence_of(mean: float, std: float = 1.0, size: int = 4000, noise: float = 0.0, seed: int = 0) -> Evidence:
    return certificate(TASK, normal(mean, std), size, noise, torch.Generator().manual_seed(seed))


def cells(evidence: Evidence) -> tuple[Tensor, Tensor]:
    return torch.bucketize(evidence.samples[:, 0], EDGES), torch.bucketize(evidence.prior_samples[:, 0], EDGES)


def shares(mean: float, std: float = 1.0) -> Tensor:
    """Of N(mean, std²) in eight cells, by the normal distribution function."""
    below = torch.special.ndtr((EDGES.double() - mean) / std)
    return torch.diff(below, prepend=torch.zeros(1).double(), append=torch.ones(1).double())


POLICIES = [(-1.0, 1.0, 0.0), (-1.0, 1.0, 1.0), (-0.5, 1.0, 0.75), (-1.0, 1.4, 0.0), (0.5, 0.5, 0.5), (3.0, 0.3, 0.0)]


@pytest.mark.parametrize(("mean", "std", "noise"), POLICIES)
def test_differences_are_those_of_the_closed_form(mean: float, std: float, noise: float) -> None:
    """Each of eight cells within 4.5 of its standard errors (p = 5e-5 a policy), and the sum of all zero."""
    evidence = evidence_of(mean, std, 40_000, noise)
    joined = bridge(evidence)
    difference, covariance = joined.differences(*cells(evidence), 8)
    truth = shares(-1.0) - shares(mean, std)
    error = covariance.diagonal().sqrt()
    assert ((difference - truth).abs() < 4.5 * error + 1e-9).all(), (difference - truth) / error
    assert difference.sum().item() == pytest.approx(0, abs=1e-9)
    if abs(mean + 1) < 1:  # sides that hardly overlap say little of log Z, and need it little
        assert joined.log_z == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("mean", "std", "noise"),
    [
        pytest.param(-1.0, 1.0, 0.75, marks=pytest.mark.slow),
        (-0.5, 1.3, 0.5),
        pytest.param(1.0, 1.0, 0.0, marks=pytest.mark.slow),
    ],
)
def test_standard_errors_are_the_spread_of_repetitions(mean: float, std: float, noise: float) -> None:
    """300 certificates of 2000 rollouts: each cell's spread is within 20% (4.9 of its errors) of the mean standard error."""
    found, claimed = [], []
    for seed in range(300):
        evidence = evidence_of(mean, std, 2000, noise, seed)
        difference, covariance = bridge(evidence).differences(*cells(evidence), 8)
        found.append(difference)
        claimed.append(covariance.diagonal())
    spread, error = torch.stack(found).std(0), torch.stack(claimed).mean(0).sqrt()
    assert (spread / error - 1).abs().max() < 0.2, spread / error


def test_the_noise_of_an_optimal_policy_is_none() -> None:
    """r = 1 on every path: the difference is zero whatever the samples are, where a two-sample test would see .02 a cell."""
    evidence = evidence_of(-1.0, size=300)
    difference, covariance = bridge(evidence).differences(*cells(evidence), 8)
    assert difference.abs().max() < 1e-5 and covariance.abs().max() < 1e-10


def test_a_lost_mode_is_seen_from_the_target_side_alone() -> None:
    """Half of the target has r = ∞: log Z is right though the policy's own weights say log ½ more, and d = ±½."""
    task = HeldOut(GaussianMixture(*both_modes()), torch.zeros(1, dtype=torch.float64))
    evidence = certificate(task, normal(6.0), 4000, 0.0, torch.Generator().manual_seed(0))
    joined = bridge(evidence)
    assert evidence.log_weight.exp().mean().log().item() == pytest.approx(math.log(0.5), abs=1e-4)
    assert joined.log_z == pytest.approx(0, abs=0.05)
    sides = (evidence.samples[:, 0] > 0).long(), (evidence.prior_samples[:, 0] > 0).long()
    difference, covariance = joined.differences(*sides, 2)
    assert difference.tolist() == pytest.approx([0.5, -0.5], abs=4 * covariance[0, 0].sqrt().item())
    assert undercovered(evidence, joined.log_z) == pytest.approx(0.5, abs=0.04)
    assert path_tv(evidence, joined.log_z)[0] == pytest.approx(0.5, abs=0.04)


def both_modes() -> tuple[Tensor, Tensor, Tensor]:
    half = torch.full((2,), 0.5, dtype=torch.float64)
    return half, torch.tensor([[-6.0], [6.0]], dtype=torch.float64), torch.ones(2, 1, 1, dtype=torch.float64)


def test_sides_that_share_nothing_are_wholly_apart() -> None:
    """A policy 40 standard deviations off, and one whose log-ratios are no numbers: d is ±1, not an error."""
    far = evidence_of(40.0)
    broken = Evidence(1.0, far.samples, far.energy, far.log_ratio * math.nan, *target_of(far), torch.zeros(1), None, 0)
    for evidence in (far, broken):
        joined = bridge(evidence)
        difference, covariance = joined.differences(torch.ones(4000).long(), torch.zeros(4000).long(), 2)
        assert difference.tolist() == pytest.approx([1, -1], abs=1e-6)
        assert covariance.isfinite().all()
        assert path_tv(evidence, joined.log_z)[0] == pytest.approx(1.0, abs=1e-6)
        assert undercovered(evidence, joined.log_z) == pytest.approx(1.0, abs=1e-6)


def target_of(evidence: Evidence) -> tuple[Tensor, Tensor, Tensor]:
    return evidence.prior_samples, evidence.prior_energy, evidence.prior_log_ratio * math.nan


@pytest.mark.parametrize("mean", [-1.0, -0.5, 0.5])
def test_path_tv_is_the_total_variation_of_paths(mean: float) -> None:
    """Without path noise a path is its sample: 2 Φ(|shift| / 2) - 1 for two normal laws."""
    evidence = evidence_of(mean, size=40_000)
    value, error = path_tv(evidence, 0.5)
    truth = 2 * torch.special.ndtr(torch.tensor(abs(mean + 1) / 2)).item() - 1
    assert value == pytest.approx(truth, abs=4 * error + 1e-6)


def test_the_bias_of_a_total_variation_is_taken_off() -> None:
    """25 equal cells with noise and no difference: ½ Σ |d| alone would say .1; a large one stays what it is."""
    generator = torch.Generator().manual_seed(0)
    covariance = 0.01**2 * torch.eye(25, dtype=torch.float64)
    null = [
        total_variation(0.01 * torch.randn(25, generator=generator, dtype=torch.float64), covariance, generator)[0]
        for _ in range(50)
    ]
    assert sum(null) / 50 < 0.075
    large = torch.full((25,), 0.04, dtype=torch.float64)
    value, error = total_variation(large, covariance, generator)
    assert value == pytest.approx(0.5, abs=0.005)
    assert error == pytest.approx(0.5 * 0.01 * 5, rel=0.15)  # the error of a sum of 25


@pytest.mark.parametrize("count", [50.0, 400.0])
def test_what_may_be_unseen(count: float) -> None:
    """A share of this size is missed by all samples once in 200 times: (1 - share)^count = .005."""
    assert (1 - unseen(count)) ** count == pytest.approx(0.005)
    assert unseen(0.5) == pytest.approx(0.995)
