"""The studies of objectives and estimators: tiny ones end to end, and what their figures rest on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from tiltune.launch.study import equivalence, estimators, reward, study, temperature
from tiltune.launch.study.baselines import ARMS
from tiltune.launch.study.behaviors import arms as behavior_arms
from tiltune.launch.study.clipping import arms as clipping_arms
from tiltune.launch.study.comparison import Arm, Settings, comparison, config_of, perform
from tiltune.launch.study.comparison_answer import answer, factor
from tiltune.launch.study.gradient_estimators import ESTIMATORS, ROLLOUT, ROW, estimate
from tiltune.launch.study.problem import plane_problem, problem_of
from tiltune.launch.study.reward_answer import BINS
from tiltune.launch.study.training import MOST, Evaluations
from tiltune.launch.verbs.study import Name
from tiltune.samplers.denoiser import ResidualDenoiser
from tiltune.samplers.make_policy import make_policy
from tiltune.tasks.mixture_target import energy, prior_mixture, target_mixture
from tiltune.tasks.random_mixture import random_mixture

TINY = Settings(dims=(2,), ess=0.3, steps=5, updates=(1, 2), batch_size=10, samples=40, seeds=2)


def test_a_comparison_measures_every_arm_on_the_same_problems(tmp_path: Path) -> None:
    """Leave-one-out and the mean of the batch have one gradient, so that their gaps are one; a step of any size is another."""
    arms = {name: ARMS[name] for name in ("leave_one_out", "batch")}
    arms["wild"] = Arm("steps of any size", {"learning_rate": 1e30, "step_nats": 1e9}, "leave_one_out")
    whole = comparison("baselines", "Which?", arms, replace(TINY, updates=(1, 14)))
    said = study.carry_out(whole, tmp_path / "study", 1)
    rows = [row for run in whole.runs.values() for row in perform(run)]
    assert len(rows) == 2 * 3 * 2
    assert {row["calls"] for row in rows if row["updates"] == 14 and row["arm"] != "wild"} == {12 + 14 * 10}
    by = {(row["arm"], row["seed"], row["updates"]): row for row in rows}
    for seed in (0, 1):
        for updates in (1, 14):
            assert by["batch", seed, updates]["gap"] == pytest.approx(by["leave_one_out", seed, updates]["gap"], abs=1e-4)
        assert by["wild", seed, 14]["gap"] == MOST and by["wild", seed, 14]["diverged"] == 1
        assert by["wild", seed, 14]["component_tv"] <= 1
    assert abs(factor(rows, 2, "batch", "leave_one_out").mean) < 1e-3
    assert "**steps of any size**: gap 1e+04 nats (1e+04 to 1e+04)" in said
    assert "2 of 2 trainings further from the target than the prior" in said and "against leave-one-out" in said
    assert (tmp_path / "study" / "figure.png").stat().st_size > 20_000


def test_the_answer_of_a_comparison_is_of_factors_seed_by_seed() -> None:
    """Gaps that differ between seeds by far more than between arms decide all the same."""
    shared = {"dim": 2, "updates": 1, "component_tv": 0.1, "gap_prior": 1e4}
    rows = [
        {**shared, "arm": arm, "seed": seed, "gap": 10.0**seed * times * (1 + 0.01 * seed)}
        for seed in range(3)
        for arm, times in (("one", 1.0), ("half", 0.5), ("same", (0.5, 1.0, 2.0)[seed]))
    ]
    said = answer(rows, "Which?", {name: name for name in ("one", "half", "same")}, {"one": None, "half": "one", "same": "one"})
    assert "against one: closer to the target, 0.5 times its gap" in said and "against one: not shown to differ" in said


@pytest.mark.parametrize("arms", [ARMS, clipping_arms(), behavior_arms(TINY)], ids=["baselines", "clipping", "behaviors"])
def test_every_arm_is_a_training_and_is_compared_with_one_that_there_is(arms: dict[str, Arm]) -> None:
    for arm in arms.values():
        config_of(arm, TINY, 0)
        assert arm.against is None or arm.against in arms
    assert len({arm.label for arm in arms.values()}) == len(arms)


def test_behaviors_spend_the_same_energy_calls() -> None:
    small = replace(TINY, updates=(3,), seeds=2, batch_size=20)
    runs = comparison("behaviors", "Where?", behavior_arms(small), small).runs.values()
    calls = {run.name: perform(run)[0]["calls"] for run in runs if run.seed == 0}
    assert set(calls.values()) == {12 + 3 * 20}, calls


def test_estimators_have_one_mean_and_cost_what_they_say() -> None:
    """100 estimates each at a policy that has left its prior: 10 projections within 4 standard errors of the whole path's
    (p = .004 in all of 60)."""
    problem = problem_of(2, 0.3, 0, 6, 40)
    policy = make_policy(problem.prior)
    generator = torch.Generator().manual_seed(0)
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data.add_(0.05 * torch.randn(weight.shape, generator=generator))
    network = policy.denoiser
    assert isinstance(network, ResidualDenoiser)
    directions = torch.randn(sum(weight.numel() for weight in weights), 10, generator=generator)
    found = {}
    unbiased = {name: estimator for name, estimator in ESTIMATORS.items() if estimator.unbiased}
    for name, estimator in unbiased.items():
        each = []
        spent, meter = 0, Evaluations(network.residual)
        with meter:
            for _ in range(100):
                policy.zero_grad()
                spent = estimate(name, problem, policy, 16, generator)
                each.append(torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]) @ directions)
        rows = 16 * max(1, round(6 * estimator.share))
        assert spent == ROLLOUT * 6 * 16 + ROW * rows
        again = 6 * 16 if name == "split" else 0  # it computes shifts that the rollout has known
        assert meter.count == 100 * (6 * 16 + rows + again)
        found[name] = torch.stack(each)
    whole = found["whole"]
    assert (whole.mean(0).abs() > 5 * whole.std(0) / 10).any()  # there is something to agree on
    for name, own in found.items():
        error = ((own.var(0) + whole.var(0)) / 100).sqrt()
        assert ((own.mean(0) - whole.mean(0)).abs() < 4 * error).all(), name


def test_trust_pcl_repeats_rtb_under_sgd_and_parts_from_it_where_a_step_sees_the_size_of_the_gradient() -> None:
    tiny = replace(equivalence.SIZES["quick"], steps=5, updates=4, batch_size=10, samples=20)
    rows = {row["setting"]: row for row in equivalence.perform(equivalence.Run(2, 0.1, 0, tiny))}
    assert max(row["loss_error"] for row in rows.values()) < 1e-12 > max(row["gradient_error"] for row in rows.values())
    assert rows["sgd"]["parted"] < 1e-12 and rows["sgd"]["gap_rtb"] == pytest.approx(rows["sgd"]["gap_pcl"], rel=1e-6)
    assert min(rows[name]["parted"] for name in ("adam, large epsilon", "adam, gradient clipped", "adam, V learned")) > 1e-3


def test_the_kl_of_the_tilted_law_is_that_of_its_densities() -> None:
    """By 20,000 exact samples on each side: energies of spread 2 at most, so that a difference of .08 is 4 standard errors."""
    for alpha in (0.5, 2.0):
        problem = problem_of(2, 0.05, 0, 20, 1000, alpha)
        x = problem.target.sample(20_000, torch.Generator().manual_seed(1))
        kl = (problem.target.log_density(x) - random_mixture(2, 0).log_density(x)).mean().item()
        assert temperature.truth(problem)["kl_exact"] == pytest.approx(kl, abs=0.08)
    assert temperature.truth(problem)["energy_exact"] == pytest.approx(problem.energy(x).mean().item(), abs=0.05)


def test_the_plane_is_measured_against_its_target() -> None:
    problem = plane_problem("brownian", 20, 0, 2000)
    assert problem.gap_exact < 0.2 * problem.gap_prior
    x = target_mixture().means.float()
    expected = -(target_mixture().log_density(x) - prior_mixture().log_density(x)).exp()
    assert torch.allclose(reward.exponentiated_twice(x).double(), expected.double(), rtol=1e-4)
    assert torch.allclose(-(-energy(x)).exp().double(), expected.double(), rtol=1e-4)
    tiny = replace(reward.SIZES["quick"], steps=5, updates=(1, 2), batch_size=10, samples=50)
    rows = reward.perform(reward.Run("ddpo, r = -E", 0, tiny))
    assert [row["calls"] for row in rows] == [12 + 10, 12 + 20]
    assert all(len(row["histogram"]) == BINS**2 and 0 < sum(row["histogram"]) <= 50 for row in rows)


def test_estimators_and_temperatures_leave_a_row_each() -> None:
    tiny = estimators.Settings(
        dims=(2,), ess=0.3, steps=4, stages=(1, 2), estimates=3, batch_size=4, updates=2, samples=20, seeds=2
    )
    rows = [row for run in estimators.study_of(tiny).runs.values() for row in estimators.perform(run)]
    assert len(rows) == 2 * 2 * len(ESTIMATORS)
    assert {row["efficiency"] for row in rows if row["estimator"] == "whole"} == {1.0}
    assert "| no baseline, all steps |" in estimators.answer(rows)
    few = temperature.Settings(dims=(2,), alphas=(0.7, 2.0), steps=4, updates=2, epochs=2, batch_size=4, samples=20, seeds=2)
    rows = [row for run in temperature.study_of(few).runs.values() for row in temperature.perform(run)]
    assert "| 0.7 |" in temperature.answer(rows) and all(row["kl"] >= 0 for row in rows)


OTHERS = ("dimension", "horizon")  # have such a test beside their own


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "equivalence" else pytest.mark.slow)
        for name in get_args(Name)
        if name not in OTHERS
    ],
)
def test_the_quick_study(name: str, tmp_path: Path) -> None:
    """`tiltune study NAME --quick`."""
    said = study.carry_out(study.named(name, "quick", None), tmp_path / "quick", 2)
    assert said.startswith("# ") and "2 seeds" in said
    assert {path.name for path in (tmp_path / "quick").iterdir()} >= {"rows.csv", "table.md", "figure.png", "figure.pdf"}
