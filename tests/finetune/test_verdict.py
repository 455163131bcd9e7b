"""The verdict by shown closeness on laws that are known: what passes, what fails, and what is not decided.

`python tests/calibrate.py` measures the rates; here are single cases, and the controls.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tiltune.finetune.certificate.evidence import Evidence
from tiltune.finetune.certificate.path_metrics import path_metrics
from tiltune.finetune.certificate.verdict import Bounds, judge_unknown
from tiltune.tasks.gaussian_mixture import GaussianMixture
from toys.held_out_mixtures import HeldOut, certificate, held_out, planted, total_variation


def normal(mean: float, std: float = 1.0) -> GaussianMixture:
    one = torch.ones(1, dtype=torch.float64)
    return GaussianMixture(one, mean * one[:, None], std**2 * one[:, None, None])


def evidence_of(
    mean: float = -1.0, std: float = 1.0, size: int = 4000, noise: float = 0.5, seed: int = 0, tilt: float = 1.0
) -> Evidence:
    """N(0, 1) tilted by tilt · x, so that the target is N(-tilt, 1), against a policy that draws N(mean, std²)."""
    task = HeldOut(normal(0.0), torch.full((1,), tilt, dtype=torch.float64))
    return certificate(task, normal(mean, std), size, noise, torch.Generator().manual_seed(seed))


def verdict_of(evidence: Evidence, **options: Any) -> tuple[str, list[str], dict[str, Any]]:
    return judge_unknown(evidence, path_metrics(evidence), **options)


def test_exact_samplers_pass() -> None:
    """20 exact samplers of N(-1, 1), with path noise: at most one is refused (at a rate of 1%, two or more have p = .017)."""
    verdicts = [verdict_of(evidence_of(seed=seed), seed=seed) for seed in range(20)]
    assert [verdict for verdict, _, _ in verdicts].count("pass") >= 19
    reasons = verdicts[0][1]
    assert "within the tolerance of 0.05 (99% confidence)" in reasons[0]
    assert "is unseen" in reasons[-1]


@pytest.mark.parametrize(
    ("mean", "std"),
    [(-0.6, 1.0), (-1.4, 1.0), (-1.0, 0.7), (0.0, 1.0)],
)
def test_wrong_samplers_fail(mean: float, std: float) -> None:
    verdict, reasons, own = verdict_of(evidence_of(mean, std))
    assert verdict == "fail"
    assert reasons[0].startswith("shares of") and "above the tolerance of 0.05" in reasons[0]
    assert own["lower"] > 0.05


@pytest.mark.parametrize("dim", [2, 10, 50])
def test_planted_failures_on_held_out_mixtures_fail_and_the_exact_sampler_passes(dim: int) -> None:
    task = held_out(dim)
    assert task.prior_ess == pytest.approx(0.1, abs=1e-6)
    for name, sampler in planted(task).items():
        verdict, reasons, _ = verdict_of(certificate(task, sampler, 6000, 0.5, torch.Generator().manual_seed(0)))
        assert verdict == ("pass" if name == "exact denoiser" else "fail"), (name, reasons)
        assert total_variation(task.target(), sampler) >= 0.1 or name == "exact denoiser"


def test_nothing_passes_that_was_not_shown() -> None:
    """The old rule's fault: with few rollouts it found no difference and passed. A loss of a component at 1000 rollouts."""
    task = held_out(10)
    for name in ("exact denoiser", "a component lost"):
        for seed in range(20):
            evidence = certificate(task, planted(task)[name], 1000, 0.75, torch.Generator().manual_seed(seed))
            assert verdict_of(evidence, seed=seed)[0] != "pass"


def test_a_tolerance_in_words_decides() -> None:
    """A policy off by a total variation of about .08: within a tolerance of .15, beyond one of .03."""
    evidence = evidence_of(-0.8, size=20_000)
    found = {tolerance: verdict_of(evidence, tolerance=tolerance) for tolerance in (0.03, 0.15)}
    assert found[0.03][0] == "fail" and found[0.15][0] == "pass"
    assert found[0.15][2]["lower"] < 2 * torch.special.ndtr(torch.tensor(0.1)).item() - 1 < found[0.15][2]["upper"]


def test_an_undecided_verdict_names_the_rollouts_that_decide() -> None:
    evidence = evidence_of(size=600)
    verdict, reasons, own = verdict_of(evidence)
    assert verdict == "inconclusive"
    assert f"about {own['rollouts_to_decide']:,} rollouts a side would decide" in reasons
    assert 600 < own["rollouts_to_decide"] < 20_000
    assert verdict_of(evidence_of(size=2 * own["rollouts_to_decide"], seed=1))[0] == "pass"


def test_the_number_of_rollouts_shrinks_the_errors_and_what_is_unseen() -> None:
    bounds = Bounds({"cell_tv": (0.02, 0.02), "energy_tv": (0.01, 0.001)}, 400.0)
    assert bounds.upper()[0] == pytest.approx(0.02 + 2.6 * 0.02 + bounds.unseen())
    assert bounds.upper()[1] == "cell_tv"
    times = bounds.times_to_decide(0.05, 1e6)
    assert times is not None and bounds.upper(times)[0] <= 0.05 < bounds.upper(times / 1.1)[0]
    assert Bounds({"cell_tv": (0.05, 0.001)}, 400.0).times_to_decide(0.05, 1000) is None  # it lies at the tolerance
    assert Bounds({"cell_tv": (0.0, 0.0)}, 150.0).times_to_decide(0.05, 1000) == pytest.approx(2, rel=0.1)  # 300 effective


@pytest.mark.parametrize("size", [100, 300, 2000])
def test_a_gross_miss_fails_however_thin_the_target_side_is(size: int) -> None:
    """The prior's mean for a target 2.2 away, on 4 to 60 effective samples, one of which carries a fifth of the weight."""
    evidence = evidence_of(0.5, 0.3, size, tilt=2.2)
    metrics = path_metrics(evidence)
    assert metrics["target_ess"] < 150
    verdict, reasons, own = judge_unknown(evidence, metrics)
    assert (verdict, own["undercovered"] > 0.9) == ("fail", True), reasons
    assert any("effective samples, fewer than 300" in reason for reason in reasons)


def test_a_policy_that_is_far_worse_than_its_prior_fails_and_is_called_so() -> None:
    """The case from the field: log-weights of -189 on one side and 558 on the other, 245 effective samples."""
    evidence = evidence_of(size=1200)
    evidence = replace(evidence, samples=evidence.samples + 3, energy=evidence.energy + 3)
    evidence = replace(evidence, log_ratio=evidence.log_ratio + 186, prior_log_ratio=evidence.prior_log_ratio - 558)
    metrics = path_metrics(evidence)
    assert metrics["elbo"] < -180 and metrics["eubo"] > 550 and metrics["prior"]["gap"] < 2
    verdict, reasons, own = judge_unknown(evidence, metrics)
    assert verdict == "fail" and own["undercovered"] == pytest.approx(1.0)
    assert any("worse than the model you started from" in reason for reason in reasons)


def test_an_exact_sampler_on_a_hopelessly_thin_target_neither_passes_nor_fails() -> None:
    """N(-4, 1) from prior rollouts of N(0, 1): a handful of effective samples. 20 seeds, none decided."""
    for seed in range(20):
        verdict, reasons, _ = verdict_of(evidence_of(-4.0, size=1000, seed=seed, tilt=4.0), seed=seed)
        assert verdict == "inconclusive", reasons
        assert any("effective samples, fewer than 300" in reason for reason in reasons)


def test_right_samples_with_heavy_path_weights_neither_pass_nor_fail() -> None:
    """An effective share of exp(-5.3) = .005 with exact samples: 20 seeds, none decided."""
    for seed in range(20):
        assert verdict_of(evidence_of(noise=2.3, seed=seed), seed=seed)[0] == "inconclusive"


def test_a_gap_above_the_priors_cannot_pass() -> None:
    """Samples that are right, with a path gap of 1 where the prior's is .01: no share is off, and yet it was better untrained."""
    evidence = evidence_of(-0.1, size=20_000, noise=0.7, tilt=0.1)
    verdict, reasons, own = verdict_of(evidence)
    assert own["upper"] < 0.05 and verdict == "inconclusive"
    assert "worse than the model you started from" in reasons[0]


def test_the_prior_stands_beside_the_policy() -> None:
    """N(0, 1) against N(-1, 1): a total variation of .383, cells see most of it; the policy's own is .03 at most."""
    _, _, own = verdict_of(evidence_of(size=20_000))
    assert 0.3 < own["prior_cell_tv"] < 0.383 + 3 * own["prior_cell_tv_se"]
    assert own["cell_tv"] < 0.03


def test_a_lost_mode_fails_though_the_policy_side_looks_healthy() -> None:
    """Two equal modes at ±6, no tilt, a policy on one of them: its own ESS is 1, the target side sees the loss."""
    half = torch.full((2,), 0.5, dtype=torch.float64)
    means = torch.tensor([[-6.0], [6.0]], dtype=torch.float64)
    task = HeldOut(GaussianMixture(half, means, torch.ones(2, 1, 1, dtype=torch.float64)), torch.zeros(1, dtype=torch.float64))
    evidence = certificate(task, normal(6.0), 4000, 0.0, torch.Generator().manual_seed(0))
    metrics = path_metrics(evidence)
    assert metrics["ess"] > 0.99
    assert metrics["log_z"] == pytest.approx(-math.log(2), abs=0.01)
    verdict, _, own = judge_unknown(evidence, metrics)
    assert verdict == "fail"
    assert own["cell_tv"] == pytest.approx(0.5, abs=0.05)


def test_the_verdict_repeats_for_the_same_seed() -> None:
    assert verdict_of(evidence_of(), seed=3) == verdict_of(evidence_of(), seed=3)


def test_a_target_without_weight_is_inconclusive() -> None:
    evidence = replace(evidence_of(), prior_energy=torch.full((4000,), math.inf))
    verdict, reasons, own = verdict_of(evidence)
    assert (verdict, own) == ("inconclusive", {})
    assert "no prior sample has a finite energy" in reasons[0]


def test_kl_to_and_from_the_target_and_the_prior() -> None:
    """N(-1, 1) against a policy that draws N(-.4, 1), without path noise: .18 nats both ways, and .08 from the prior; each within
    four of its standard errors (p = .0002 in all)."""
    metrics = path_metrics(evidence_of(-0.4, size=20_000, noise=0.0))
    for name, exact in (("kl_to_prior", 0.08), ("kl_to_target", 0.18), ("kl_from_target", 0.18)):
        assert metrics[f"{name}_se"] < 0.02
        assert metrics[name] == pytest.approx(exact, abs=4 * metrics[f"{name}_se"])
    assert metrics["kl_to_target"] + metrics["kl_from_target"] == pytest.approx(metrics["gap"], abs=1e-9)
