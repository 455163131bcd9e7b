"""Criteria, doubts and flags: what passes, what fails, and what cannot be said."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tiltune.finetune.certificate.criteria import (
    EXIT_STATUS,
    Criterion,
    against_prior,
    conclude,
    judge_known,
    rollouts_to_trust,
    target_side_doubts,
    worse_than_prior,
)

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
    "target_unseen": 0.001,
}

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


@pytest.mark.parametrize(
    "side",
    [{"target_ess": 250.0}, {"target_max_weight": 0.03}, {"target_pareto_k": 0.8, "target_unseen": 0.1}],
)
def test_doubts_about_the_target_side_are_inconclusive_never_a_failure(side: dict[str, float]) -> None:
    metrics = {**KNOWN, **side}
    assert len(target_side_doubts(metrics)) == 1
    assert judge_known(metrics)[0] == "inconclusive"
    assert judge_known({**metrics, "mode_tv": 0.5})[0] == "inconclusive"


@pytest.mark.parametrize(
    ("k", "unseen", "doubts"), [(0.9, 0.03, 0), (0.9, 0.06, 1), (1.2, math.inf, 1), (0.3, 0.06, 0), (math.nan, math.nan, 1)]
)
def test_a_heavy_tail_is_a_doubt_where_it_may_hold_much(k: float, unseen: float, doubts: int) -> None:
    assert len(target_side_doubts({**KNOWN, "target_pareto_k": k, "target_unseen": unseen})) == doubts


def test_a_criterion_that_is_expected_and_not_there_is_a_doubt() -> None:
    absent = Criterion("share", None, 0.03)
    for others, count in (([MET], 1), ([MET, MISSED], 2)):
        verdict, reasons = conclude([absent, *others], [])
        assert verdict == "inconclusive"
        assert reasons[0] == "share is a criterion of this task and was not measured"
        assert len(reasons) == count


def gaps(policy: float, prior: float, error: float = 0.1) -> dict[str, Any]:
    return {"gap": policy, "gap_se": error, "prior": {"gap": prior, "gap_se": error}}


@pytest.mark.parametrize(
    ("policy", "prior", "error", "worse"),
    [(1.0, 2.0, 0.1, False), (2.3, 2.0, 0.1, False), (2.5, 2.0, 0.1, True), (math.inf, 2.0, math.inf, True)],
)
def test_a_policy_that_is_worse_than_its_prior_is_called_so(policy: float, prior: float, error: float, worse: bool) -> None:
    """2.6 standard errors of both gaps, .37 here; an ELBO of minus infinity is no excuse."""
    metrics = gaps(policy, prior, 0.1) | {"gap_se": error}
    assert against_prior(metrics).met is not worse
    assert [("worse than the model you started from" in line) for line in worse_than_prior(metrics)] == [True] * worse


def test_the_rollouts_that_the_target_side_lacks() -> None:
    enough = {"target_ess": 400.0, "target_max_weight": 0.01, "target_pareto_k": 0.3, "target_unseen": 0.01}
    assert rollouts_to_trust(enough, 1000) is None
    assert rollouts_to_trust(enough | {"target_ess": 150.0}, 1000) == 2200  # twice as many, and a tenth more
    assert rollouts_to_trust(enough | {"target_max_weight": 0.06}, 1000) == 3300
    heavy = {"target_ess": 150.0, "target_pareto_k": 0.9, "target_unseen": 0.2}
    assert rollouts_to_trust(enough | heavy, 1000) is None  # no number mends a tail
