"""A target side that climbed: what it decides where weighted prior paths decide nothing, and what its islands say of errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tiltune.finetune.certificate.climbed import Climbed, climbs
from tiltune.finetune.certificate.evidence import Evidence, gather_evidence
from tiltune.finetune.certificate.path_metrics import path_metrics
from tiltune.finetune.certificate.verdict import judge_unknown
from tiltune.samplers.prior import Prior
from tiltune.tasks.gaussian_mixture import GaussianMixture, MixtureDenoiser
from toys.gaussian_images import build_chain
from toys.held_out_mixtures import HeldOut, lightest_lost

SIZE = 3000


def steep(dim: int = 4, ess: float = 0.004) -> HeldOut:
    """A mixture of four under a linear energy that leaves this share of its samples effective."""
    generator = torch.Generator().manual_seed(3)
    means = 0.9 * torch.randn(4, dim, generator=generator, dtype=torch.float64)
    covariances = (0.25 * torch.eye(dim, dtype=torch.float64)).expand(4, dim, dim)
    prior = GaussianMixture(torch.full((4,), 0.25, dtype=torch.float64), means, covariances)
    direction = torch.randn(dim, generator=generator, dtype=torch.float64)
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if HeldOut(prior, middle * direction).prior_ess > ess else (low, middle)
    return HeldOut(prior, low * direction)


def evidence_of(task: HeldOut, sampler: GaussianMixture, population: str = "auto") -> Evidence:
    """Rollouts of the exact denoiser of ``sampler`` beside those of the prior's, and the target side."""
    chain = build_chain(100)
    prior = Prior(MixtureDenoiser(task.prior, chain), chain, (len(task.slope),))
    generator = torch.Generator().manual_seed(0)
    policy = MixtureDenoiser(sampler, chain)
    return gather_evidence(prior, policy, task.energy, 1.0, generator, size=SIZE, starts=8, population=population)


def judged(evidence: Evidence) -> tuple[str, list[str], dict[str, float]]:
    metrics = path_metrics(evidence)
    verdict, reasons, _ = judge_unknown(evidence, metrics)
    return verdict, reasons, metrics


@pytest.fixture(scope="module")
def task() -> HeldOut:
    return steep()


@pytest.fixture(scope="module")
def exact(task: HeldOut) -> Evidence:
    return evidence_of(task, task.target())


def test_a_right_sampler_is_decided_where_weighted_prior_paths_decide_nothing(task: HeldOut, exact: Evidence) -> None:
    """.004 of 3000 prior paths are a dozen. The climb is worth hundreds, its log Z is right, and its sandwich holds."""
    assert exact.climbed is not None and not exact.climbed.doubts
    verdict, reasons, metrics = judged(exact)
    assert verdict == "pass", reasons
    assert metrics["target_ess"] > 500
    truth = task._tilt(1.0)[1].item()  # of samples; the chain's own is close by
    assert metrics["log_z_forward"] == pytest.approx(truth, abs=4 * metrics["log_z_forward_se"] + 0.05)
    assert metrics["elbo"] < metrics["log_z_forward"] + 3 * metrics["log_z_forward_se"] < metrics["eubo"] + 1
    assert exact.target_calls == exact.energy_calls - SIZE - 64
    weighted = evidence_of(task, task.target(), population="importance")
    assert weighted.climbed is None and judged(weighted)[0] == "inconclusive"


@pytest.mark.parametrize(
    "fault",
    [
        "a component lost",
        pytest.param("alpha 1.5 times too large", marks=pytest.mark.slow),
        pytest.param("the prior", marks=pytest.mark.slow),
    ],
)
def test_planted_faults_do_not_pass(task: HeldOut, fault: str) -> None:
    wrong = {
        "a component lost": lightest_lost(task.target()),
        "alpha 1.5 times too large": task.target(alpha=1.5),
        "the prior": task.prior,
    }[fault]
    verdict, reasons, metrics = judged(evidence_of(task, wrong))
    assert verdict == "fail", reasons
    assert metrics["gap"] > 0.5


def test_more_rollouts_bring_more_islands(exact: Evidence) -> None:
    both = exact.joined(exact)
    assert both.climbed is not None and exact.climbed is not None
    assert len(both.climbed.log_z) == 2 * len(exact.climbed.log_z)
    assert int(both.climbed.island.max()) == len(both.climbed.log_z) - 1
    half = torch.arange(0, len(exact.target_energy), 2)
    assert len(exact.resampled(torch.arange(10), half).target_energy) == len(half)


def side(labels: Tensor, island: Tensor) -> Climbed:
    zero = torch.zeros(len(labels))
    return Climbed(labels[:, None].float(), zero, zero, zero, island, torch.zeros(int(island.max()) + 1))


def test_the_design_effect_counts_independent_paths() -> None:
    """10 islands of 40 paths. Independent labels: 1, within its noise. Islands of one label each: all paths of one count for one,
    40. Between: every label drawn for four paths together counts for four."""
    generator = torch.Generator().manual_seed(0)
    island = torch.arange(10).repeat_interleave(40)
    even = torch.full((400,), 1 / 400, dtype=torch.float64)
    free = torch.randint(2, (400,), generator=generator)
    assert side(free, island).design_effect(free, even, 2) < 2.5
    whole = (island % 2).long()
    assert side(whole, island).design_effect(whole, even, 2) == pytest.approx(40 * 10 / 9, rel=1e-6)
    effects = []
    for _ in range(40):
        four = torch.randint(2, (100,), generator=generator).repeat_interleave(4)
        effects.append(side(four, island).design_effect(four, even, 2))
    assert torch.tensor(effects).mean() == pytest.approx(4, abs=1)


def test_errors_are_those_between_islands() -> None:
    """Hand-computed: three islands with means 0, 1, 2 have the standard error 1/sqrt(3), however many paths each has."""
    island = torch.arange(3).repeat_interleave(100)
    climbed = side(island, island)
    value, error = climbed.mean(island.double(), torch.full((300,), 1 / 300, dtype=torch.float64))
    assert (value, error) == (pytest.approx(1.0), pytest.approx(1 / math.sqrt(3)))


def test_doubts_take_a_pass_back(exact: Evidence) -> None:
    assert exact.climbed is not None
    doubted = replace(exact, climbed=replace(exact.climbed, doubts=("the islands of the target side differ",)))
    verdict, reasons, _ = judged(doubted)
    assert verdict == "inconclusive" and "the islands of the target side differ" in reasons


def test_only_what_is_thin_climbs() -> None:
    generator = torch.Generator().manual_seed(0)
    energy = torch.randn(1000, generator=generator)
    assert not climbs(energy, 1.0, "auto") and climbs(energy, 0.2, "auto")
    assert climbs(energy, 1.0, "smc") and not climbs(energy, 0.2, "importance")
