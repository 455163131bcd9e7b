"""The evidence and its metrics on laws that are known, against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tiltune.finetune.certificate.criteria import flags
from tiltune.finetune.certificate.evidence import Evidence, gather_evidence
from tiltune.finetune.certificate.path_metrics import expectation, path_metrics
from tiltune.finetune.certificate.verdict import judge_unknown
from tiltune.samplers.chain import Chain
from tiltune.samplers.denoiser import Denoiser
from tiltune.samplers.rollout import rollout
from tiltune.samplers.schedulers.brownian import brownian_chain
from toys.linear_gaussian import LinearGaussian

SIZE = 4000


def make_task(chain: Chain, alpha: float = 1.0) -> LinearGaussian:
    slope = torch.tensor([0.6, 0.3], dtype=torch.float64)
    return LinearGaussian(chain, torch.zeros(2, dtype=torch.float64), slope, 1.5, alpha)


def evidence_of(task: LinearGaussian, policy: Denoiser, size: int = SIZE, **options: Any) -> Evidence:
    return gather_evidence(task.prior(), policy, task.energy, task.alpha, torch.Generator().manual_seed(0), size=size, **options)


def gaussian_evidence(mean: float = -1.0, std: float = 1.0, seed: int = 0, size: int = SIZE, tilt: float = 1.0) -> Evidence:
    """Prior N(0, 1), E = tilt · x, so that p* = N(-tilt, 1) and log Z = ½ tilt²; the policy draws N(mean, std²)."""
    generator = torch.Generator().manual_seed(seed)
    x = mean + std * torch.randn(size, 1, generator=generator)
    y = torch.randn(size, 1, generator=generator)

    def log_ratio(value: Tensor) -> Tensor:
        return (0.5 * value**2 - 0.5 * ((value - mean) / std) ** 2 - math.log(std))[:, 0]

    return Evidence(1.0, x, tilt * x[:, 0], log_ratio(x), y, tilt * y[:, 0], log_ratio(y), torch.zeros(1), None, 0)


# --- metrics -----------------------------------------------------------------------------------------------------------


def test_the_optimal_policy_closes_the_sandwich() -> None:
    task = make_task(brownian_chain(5))
    evidence = evidence_of(task, task.policy())
    metrics = path_metrics(evidence)
    for name in ("elbo", "eubo", "log_z"):
        assert metrics[name] == pytest.approx(task.log_z, abs=1e-4)
    assert metrics["log_z_forward"] == pytest.approx(task.log_z, abs=4 * metrics["log_z_forward_se"])
    assert metrics["ess"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["residual_std"] < 1e-3
    assert metrics["start_variance"] == 0.0
    assert metrics["violation_rate"] == 0.0
    assert evidence.start_log_weight is None  # a pinned start needs no test
    assert evidence.energy_calls == 2 * SIZE
    assert judge_unknown(evidence, metrics)[0] == "pass"


def test_elbo_and_eubo_bound_log_z_of_an_untrained_policy() -> None:
    """The prior as policy: ELBO = -E_prior[E]/alpha, EUBO = log Z + KL(tilted || prior), KL = ½ b·V b for both."""
    task = make_task(brownian_chain(5))
    metrics = path_metrics(evidence_of(task, task.prior().denoiser, 20_000))
    kl = task.log_z  # mean 0: log Z = ½ b·V b, and so are both divergences
    assert metrics["elbo"] < task.log_z < metrics["eubo"]
    assert metrics["elbo"] == pytest.approx(0.0, abs=4 * metrics["elbo_se"])
    assert metrics["eubo"] == pytest.approx(task.log_z + kl, abs=4 * metrics["eubo_se"])
    assert metrics["gap"] == pytest.approx(2 * kl, abs=4 * metrics["gap_se"])
    assert metrics["log_z"] == pytest.approx(task.log_z, abs=4 * metrics["log_z_se"])
    assert metrics["gap_se"] < 0.1 * metrics["gap"]


@pytest.mark.parametrize(("mean", "std"), [(-1.0, 1.0), (-0.5, 1.0), (-1.0, 1.3)])
def test_forward_and_reverse_ess_in_closed_form(mean: float, std: float) -> None:
    """1/E_{p*}[p*/pi] for Gaussians: both estimates of the same number, within .03."""
    metrics = path_metrics(gaussian_evidence(mean, std, size=40_000))
    grid = torch.arange(-15, 15, 0.001, dtype=torch.float64)
    density = torch.exp(-0.5 * (grid + 1) ** 2) / math.sqrt(2 * math.pi)
    policy = torch.exp(-0.5 * ((grid - mean) / std) ** 2) / math.sqrt(2 * math.pi) / std
    truth = 1 / (density**2 / policy).sum().item() / 0.001
    assert metrics["ess"] == pytest.approx(truth, abs=0.03)
    assert metrics["ess_forward"] == pytest.approx(truth, abs=0.03)


def test_forbidden_samples_are_counted_and_leave_the_conditional_elbo() -> None:
    evidence = gaussian_evidence()
    energy = evidence.energy.clone()
    energy[:200] = math.inf
    energy[200:300] = math.nan
    metrics = path_metrics(replace(evidence, energy=energy))
    assert metrics["elbo"] == -math.inf
    assert metrics["elbo_finite"] == pytest.approx(0.5, abs=1e-4)
    assert metrics["violation_rate"] == pytest.approx(300 / SIZE)
    assert metrics["log_z"] == pytest.approx(0.5 + math.log(1 - 300 / SIZE), abs=1e-4)


def test_the_prior_has_a_row_of_its_own() -> None:
    """N(0, 1) tilted to N(-1, 1): as its own policy the prior has ELBO 0, EUBO log Z + ½ and a gap of both KLs, 1, whatever
    the policy is; the row does not move with it."""
    metrics, other = (path_metrics(gaussian_evidence(mean, size=40_000)) for mean in (-1.0, 3.0))
    prior = metrics["prior"]
    for name, truth in (("mean_energy", 0.0), ("elbo", 0.0), ("eubo", 1.0), ("gap", 1.0)):
        assert prior[name] == pytest.approx(truth, abs=4 * prior[f"{name}_se"]), name
    assert metrics["gap"] < 0.01 and other["gap"] > 10
    assert metrics["mean_energy"] == pytest.approx(-1, abs=4 * metrics["mean_energy_se"])
    assert other["prior"] == prior


def test_more_evidence_of_the_same_policy_is_joined() -> None:
    first, second = gaussian_evidence(seed=1, size=300), gaussian_evidence(seed=2, size=100)
    first = replace(first, step_kl=torch.tensor([1.0]), energy_calls=10)
    both = first.joined(replace(second, step_kl=torch.tensor([5.0]), energy_calls=3))
    assert both.samples.shape == both.prior_samples.shape == (400, 1)
    assert torch.equal(both.log_weight[300:], second.log_weight)
    assert (both.step_kl.item(), both.energy_calls) == (2.0, 13)  # the mean over 300 and 100 rollouts


def test_expectations_come_from_both_sides_with_their_intervals() -> None:
    """A policy off by .3, reweighted: both intervals hold the true mean -1 at 99.99% (p = 1e-4 each)."""
    found = expectation(gaussian_evidence(-0.7), lambda x: x[:, 0])
    assert abs(found["policy"] + 1) < 2 * found["policy_ci"]
    assert abs(found["target"] + 1) < 2 * found["target_ci"]
    assert found["policy_ci"] < 0.1


# --- what the chain cannot do ------------------------------------------------------------------------------------------


def test_a_chain_that_remembers_its_start_is_flagged() -> None:
    chain = replace(brownian_chain(5), start_std=2.0)
    task = make_task(chain)
    evidence = evidence_of(task, task.policy())
    assert evidence.energy_calls == 2 * SIZE + 128 * 8
    metrics = path_metrics(evidence)
    assert metrics["start_variance"] == pytest.approx(task.start_spread**2, abs=4 * metrics["start_variance_se"])
    assert task.start_spread**2 > 0.1
    assert "remembers its start" in flags(metrics)[0]
    verdict, reasons, _ = judge_unknown(evidence, metrics)
    assert verdict == "inconclusive"
    assert any("remembers its start" in reason for reason in reasons)


def test_a_start_that_is_forgotten_is_not_flagged() -> None:
    """The same chain tilted ten times less: Var[log Z(s_0)] is a hundredth, and stays below the bar."""
    task = make_task(replace(brownian_chain(5), start_std=2.0), alpha=10.0)
    metrics = path_metrics(evidence_of(task, task.policy(), 1000))
    assert metrics["start_variance"] < 0.02
    assert flags(metrics) == []


def test_a_start_without_any_finite_rollout_is_said_not_to_be_measured() -> None:
    log_weight = torch.zeros(16, 8)
    log_weight[3] = -math.inf
    metrics = path_metrics(replace(gaussian_evidence(), start_log_weight=log_weight))
    assert "not measured" in flags(metrics)[0]


# --- the evidence ---------------------------------------------------------------------------------------------------------


def test_evidence_is_fresh_rollouts_of_both_sides() -> None:
    task = make_task(brownian_chain(3))
    done: list[int] = []
    evidence = evidence_of(task, task.policy(), 600, on_progress=done.append)
    assert sum(done) == 1200  # a pinned start needs no rollouts from common starts
    assert len(done) == 6  # three steps of both sides: a bar moves with every step, not with every batch
    assert evidence.samples.shape == evidence.prior_samples.shape == (600, 2)
    assert evidence.log_ratio.shape == evidence.prior_log_ratio.shape == evidence.energy.shape == (600,)
    assert evidence.step_kl.sum().item() == pytest.approx(evidence.log_ratio.mean().item(), abs=1e-4)
    exact = rollout(task.prior(), task.policy(), 600, torch.Generator().manual_seed(7), keep=False).terminal
    error = exact.std() * math.sqrt(2 / 600)
    assert (evidence.samples.mean(0) - exact.mean(0)).abs().max() < 4 * error
