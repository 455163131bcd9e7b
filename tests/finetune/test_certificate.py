"""The certificate on laws that are known: figures against closed forms, verdicts on exact and on broken samplers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tiltune.finetune.certificate import (
    EXIT_STATUS,
    Criterion,
    Evidence,
    conclude,
    expectation,
    flags,
    gather_evidence,
    judge_known,
    judge_unknown,
    k_means,
    path_figures,
    share_distance,
    target_side_doubts,
    weighted_quantiles,
)
from tiltune.samplers.chain import Chain
from tiltune.samplers.policy import Denoiser
from tiltune.samplers.rollout import rollout
from tiltune.samplers.schedulers import brownian_chain
from tiltune.tasks.linear_gaussian import LinearGaussian

SIZE = 4000
KNOWN = {
    "mode_tv": 0.01,
    "log_z_error": 0.01,
    "w2_ratio": 1.0,
    "mode_spread_error": 0.02,
    "gap": 0.5,
    "gap_reference": 0.4,
    "target_ess": 5000.0,
    "target_max_weight": 0.001,
    "target_pareto_k": 0.2,
}


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


# --- figures -----------------------------------------------------------------------------------------------------------


def test_the_optimal_policy_closes_the_sandwich() -> None:
    task = make_task(brownian_chain(5))
    evidence = evidence_of(task, task.policy())
    figures = path_figures(evidence)
    for name in ("elbo", "eubo", "log_z"):
        assert figures[name] == pytest.approx(task.log_z, abs=1e-4)
    assert figures["log_z_forward"] == pytest.approx(task.log_z, abs=4 * figures["log_z_forward_se"])
    assert figures["ess"] == pytest.approx(1.0, abs=1e-5)
    assert figures["residual_std"] < 1e-3
    assert figures["start_variance"] == 0.0
    assert figures["violation_rate"] == 0.0
    assert evidence.start_log_weight is None  # a pinned start needs no test
    assert evidence.energy_calls == 2 * SIZE
    assert judge_unknown(evidence, figures)[0] == "pass"


def test_elbo_and_eubo_bound_log_z_of_an_untrained_policy() -> None:
    """The prior as policy: ELBO = -E_prior[E]/alpha, EUBO = log Z + KL(tilted || prior), KL = ½ b·V b for both."""
    task = make_task(brownian_chain(5))
    figures = path_figures(evidence_of(task, task.prior().denoiser, 20_000))
    kl = task.log_z  # mean 0: log Z = ½ b·V b, and so are both divergences
    assert figures["elbo"] < task.log_z < figures["eubo"]
    assert figures["elbo"] == pytest.approx(0.0, abs=4 * figures["elbo_se"])
    assert figures["eubo"] == pytest.approx(task.log_z + kl, abs=4 * figures["eubo_se"])
    assert figures["gap"] == pytest.approx(2 * kl, abs=4 * figures["gap_se"])
    assert figures["log_z"] == pytest.approx(task.log_z, abs=4 * figures["log_z_se"])
    assert figures["gap_se"] < 0.1 * figures["gap"]


@pytest.mark.parametrize(("mean", "std"), [(-1.0, 1.0), (-0.5, 1.0), (-1.0, 1.3)])
def test_forward_and_reverse_ess_in_closed_form(mean: float, std: float) -> None:
    """1/E_{p*}[p*/pi] for Gaussians: both estimates of the same number, within .03."""
    figures = path_figures(gaussian_evidence(mean, std, size=40_000))
    grid = torch.arange(-15, 15, 0.001, dtype=torch.float64)
    density = torch.exp(-0.5 * (grid + 1) ** 2) / math.sqrt(2 * math.pi)
    policy = torch.exp(-0.5 * ((grid - mean) / std) ** 2) / math.sqrt(2 * math.pi) / std
    truth = 1 / (density**2 / policy).sum().item() / 0.001
    assert figures["ess"] == pytest.approx(truth, abs=0.03)
    assert figures["ess_forward"] == pytest.approx(truth, abs=0.03)


def test_forbidden_samples_are_counted_and_leave_the_conditional_elbo() -> None:
    evidence = gaussian_evidence()
    energy = evidence.energy.clone()
    energy[:200] = math.inf
    energy[200:300] = math.nan
    figures = path_figures(replace(evidence, energy=energy))
    assert figures["elbo"] == -math.inf
    assert figures["elbo_finite"] == pytest.approx(0.5, abs=1e-4)
    assert figures["violation_rate"] == pytest.approx(300 / SIZE)
    assert figures["log_z"] == pytest.approx(0.5 + math.log(1 - 300 / SIZE), abs=1e-4)


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
    figures = path_figures(evidence)
    assert figures["start_variance"] == pytest.approx(task.start_spread**2, abs=4 * figures["start_variance_se"])
    assert task.start_spread**2 > 0.1
    assert "remembers its start" in flags(figures)[0]
    verdict, reasons, _ = judge_unknown(evidence, figures)
    assert verdict == "inconclusive"
    assert "remembers its start" in reasons[0]


def test_a_start_that_is_forgotten_is_not_flagged() -> None:
    """The same chain tilted ten times less: Var[log Z(s_0)] is a hundredth, and stays below the bar."""
    task = make_task(replace(brownian_chain(5), start_std=2.0), alpha=10.0)
    figures = path_figures(evidence_of(task, task.policy(), 1000))
    assert figures["start_variance"] < 0.02
    assert flags(figures) == []


def test_a_start_without_any_finite_rollout_is_said_not_to_be_measured() -> None:
    log_weight = torch.zeros(16, 8)
    log_weight[3] = -math.inf
    figures = path_figures(replace(gaussian_evidence(), start_log_weight=log_weight))
    assert "not measured" in flags(figures)[0]


# --- verdicts ----------------------------------------------------------------------------------------------------------

MET, MISSED, UNKNOWN = Criterion("good", 0.1, 0.2), Criterion("bad", 0.3, 0.2), Criterion("lost", math.nan, 0.2)


@pytest.mark.parametrize(
    ("criteria", "doubts", "verdict", "reason"),
    [
        ([MET, MET], [], "pass", "all 2 criteria met"),
        ([MET, MISSED], [], "fail", "bad is 0.3, above 0.2"),
        ([MET, UNKNOWN], [], "fail", "lost is nan"),
        ([MET], ["too few samples"], "inconclusive", "too few samples"),
        ([MISSED], ["too few samples"], "inconclusive", "too few samples"),
    ],
)
def test_the_verdict_has_three_values(criteria: list[Criterion], doubts: list[str], verdict: str, reason: str) -> None:
    found, reasons = conclude(criteria, doubts)
    assert found == verdict
    assert reason in reasons[0]
    if doubts:  # what was missed is still said
        assert len(reasons) == 1 + sum(not item.met for item in criteria)


def test_exit_statuses_tell_the_verdicts_apart() -> None:
    assert EXIT_STATUS == {"pass": 0, "fail": 1, "inconclusive": 3}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode_tv", 0.041),
        ("log_z_error", 0.051),
        ("w2_ratio", 1.16),
        ("mode_spread_error", 0.11),
        ("mode_spread_error", math.inf),
        ("mode_tv", math.nan),
        ("gap", 0.76),
    ],
)
def test_known_truth_fails_on_each_criterion(name: str, value: float) -> None:
    assert judge_known(KNOWN)[0] == "pass"
    verdict, reasons = judge_known({**KNOWN, name: value})
    assert verdict == "fail"
    assert len(reasons) == 1


def test_known_truth_without_a_reference_gap_leaves_it_out() -> None:
    assert judge_known({**KNOWN, "gap": 50.0, "gap_reference": None})[0] == "pass"


@pytest.mark.parametrize(("name", "value"), [("target_ess", 250.0), ("target_max_weight", 0.03), ("target_pareto_k", 0.8)])
def test_doubts_about_the_target_side_are_inconclusive_never_a_failure(name: str, value: float) -> None:
    figures = {**KNOWN, name: value}
    assert len(target_side_doubts(figures)) == 1
    assert judge_known(figures)[0] == "inconclusive"
    assert judge_known({**figures, "mode_tv": 0.5})[0] == "inconclusive"


def test_a_target_out_of_the_priors_reach_is_inconclusive() -> None:
    evidence = gaussian_evidence(-4.0, tilt=4.0)
    verdict, reasons, _ = judge_unknown(evidence, path_figures(evidence))
    assert verdict == "inconclusive"
    assert any("effective samples, fewer than 300" in reason for reason in reasons)


def test_exact_samplers_pass() -> None:
    """20 exact samplers of N(-1, 1) against 4000 weighted prior samples: the rule may refuse one at most.

    A false-alarm rate of 1% would give two or more with p = .017.
    """
    verdicts = []
    for seed in range(20):
        evidence = gaussian_evidence(seed=seed)
        verdicts.append(judge_unknown(evidence, path_figures(evidence), seed)[0])
    assert verdicts.count("pass") >= 19


@pytest.mark.parametrize(
    ("mean", "std", "reason"),
    [(-0.6, 1.0, "cell TV"), (-1.4, 1.0, "cell TV"), (-1.0, 0.7, "cell TV"), (0.0, 1.0, "energy TV")],
)
def test_wrong_samplers_fail(mean: float, std: float, reason: str) -> None:
    evidence = gaussian_evidence(mean, std)
    verdict, reasons, _ = judge_unknown(evidence, path_figures(evidence))
    assert verdict == "fail"
    assert any(reason in line for line in reasons)
    assert "regions of prior mass below" in reasons[-1]


def test_a_lost_mode_fails_though_the_policy_side_looks_healthy() -> None:
    """Two equal modes at ±6, no tilt, a policy on one of them: its own ESS is 1, the target side sees the loss."""
    generator = torch.Generator().manual_seed(0)
    sign = 2.0 * torch.randint(2, (SIZE, 1), generator=generator) - 1
    prior = 6 * sign + torch.randn(SIZE, 1, generator=generator)
    policy = 6 + torch.randn(SIZE, 1, generator=generator)

    def log_ratio(x: Tensor) -> Tensor:
        both = torch.stack([-0.5 * (x - 6) ** 2, -0.5 * (x + 6) ** 2]).logsumexp(0) - math.log(2)
        return (-0.5 * (x - 6) ** 2 - both)[:, 0]

    zero = torch.zeros(SIZE)
    evidence = Evidence(1.0, policy, zero, log_ratio(policy), prior, zero, log_ratio(prior), torch.zeros(1), None, 0)
    figures = path_figures(evidence)
    assert figures["ess"] > 0.99
    assert figures["log_z"] == pytest.approx(-math.log(2), abs=0.01)
    verdict, _, own = judge_unknown(evidence, figures)
    assert verdict == "fail"
    assert own["cell_tv"] > 0.4


def test_the_verdict_repeats_for_the_same_seed() -> None:
    evidence = gaussian_evidence()
    assert judge_unknown(evidence, path_figures(evidence), 3) == judge_unknown(evidence, path_figures(evidence), 3)


# --- the parts ---------------------------------------------------------------------------------------------------------


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


def test_evidence_is_fresh_rollouts_of_both_sides() -> None:
    task = make_task(brownian_chain(3))
    done: list[int] = []
    evidence = evidence_of(task, task.policy(), 600, on_progress=done.append)
    assert sum(done) == 1200  # a pinned start needs no rollouts from common starts
    assert evidence.samples.shape == evidence.prior_samples.shape == (600, 2)
    assert evidence.log_ratio.shape == evidence.prior_log_ratio.shape == evidence.energy.shape == (600,)
    assert evidence.step_kl.sum().item() == pytest.approx(evidence.log_ratio.mean().item(), abs=1e-4)
    exact = rollout(task.prior(), task.policy(), 600, torch.Generator().manual_seed(7), keep=False).terminal
    error = exact.std() * math.sqrt(2 / 600)
    assert (evidence.samples.mean(0) - exact.mean(0)).abs().max() < 4 * error
