"""The study of horizons: a tiny one end to end, and the closed form that its values are judged by."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tiltune.launch.study import horizon, study
from tiltune.launch.study.horizon import Settings, log_h
from tiltune.launch.study.horizon_answer import answer
from tiltune.launch.study.problem import problem_of
from tiltune.samplers.rollout import denoise, rollout

TINY = Settings(
    dims=(2,), horizons=(1, 4, 0), steps=8, population=100, value_updates=3, updates=2, batch_size=10, samples=40, seeds=2
)


def test_a_tiny_study_spends_the_same_on_every_horizon_and_answers(tmp_path: Path) -> None:
    said = study.carry_out(horizon.study_of(TINY), tmp_path / "study", 1)
    rows = (tmp_path / "study" / "rows.csv").read_text().splitlines()
    assert len(rows) == 1 + 6 and (tmp_path / "study" / "figure.png").exists()
    calls = {row.split(",")[rows[0].split(",").index("calls")] for row in rows[1:]}
    assert len(calls) == 1
    assert "**D = 2**, 2 seeds" in said and "- d = 1:" in said and "- d = 4:" in said and "- d = 0" not in said


def test_the_answer_is_of_paired_seeds() -> None:
    """Gaps that differ between seeds by far more than between horizons decide all the same."""
    rows = [
        {
            "dim": 2,
            "horizon": d,
            "seed": seed,
            "gap": 10.0 * seed + more,
            "gap_prior": 50.0,
            "value_error": 0.1,
            "value_error_before": 0.2,
        }
        for seed in range(5)
        for d, more in ((0, 1.0), (1, 2.0 + 0.01 * seed), (5, 1.0 + (-1) ** seed))
    ]
    said = answer(rows)
    assert "- d = 1: further from the target, by +1.02 nats" in said and "- d = 5: not shown to differ" in said


def test_the_values_closed_form_is_what_rollouts_of_the_prior_say() -> None:
    """log E_prior[exp(-E) | s_k] less log Z, over 4000 rollouts a state: within .15 nats at K = 100, where values differ by 2."""
    problem, generator = problem_of(2, 0.05, 0, 100, 500), torch.Generator().manual_seed(0)
    paths = rollout(problem.prior, None, 6, generator)
    for k in (50, 80):
        state = paths.states[k].repeat_interleave(4000, 0)
        *_, end = denoise(problem.prior, problem.prior.denoiser, state, generator, first=k)
        value = (-problem.energy(problem.prior.to_data(end)).double()).view(6, 4000).logsumexp(1) - math.log(4000)
        found = log_h(problem, paths.states[k], k)
        assert (value - problem.log_z - found).abs().max() < 0.15 and found.max() - found.min() > 1


@pytest.mark.slow
def test_the_quick_study(tmp_path: Path) -> None:
    """`tiltune study horizon --quick`."""
    said = study.carry_out(study.named("horizon", "quick", None), tmp_path / "quick", 2)
    assert "**D = 10**, 2 seeds" in said
