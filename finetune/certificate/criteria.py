"""What a verdict is made of: criteria with their bars, doubts about the evidence, and flags about the setting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["pass", "fail", "inconclusive"]
SEVEREST: tuple[Verdict, ...] = ("fail", "inconclusive", "pass")
EXIT_STATUS: dict[str, int] = {"pass": 0, "fail": 1, "inconclusive": 3}

STANDARD_ERRORS = 2.6  # 99% of a normal law lie within
# Thresholds of the target side's own reliability (docs/theory.md, "The verdict", holds the calibration).
MIN_TARGET_ESS = 300.0
MAX_TARGET_WEIGHT = 0.02
MAX_PARETO_K = 0.7
MAX_UNSEEN = 0.05  # share of the target's weight that a tail with a larger k may hold beyond the largest weight drawn
MAX_START_VARIANCE = 0.05
# The shown difference from which a policy fails although the target side is too thin for a task's own criteria.
GROSS = 0.15


@dataclass(frozen=True)
class Criterion:
    """One line of a verdict: ``value`` must not exceed ``bar``. None: a figure that was expected and is not there."""

    name: str
    value: float | None
    bar: float

    @property
    def met(self) -> bool:
        return self.value is not None and self.value <= self.bar  # a NaN is not met


def conclude(criteria: list[Criterion], doubts: list[str]) -> tuple[Verdict, list[str]]:
    """Verdict and reasons. A failed criterion fails only where the evidence behind it can be trusted, and none is missing."""
    measured = {item.name: item.value for item in criteria if item.value is not None}
    absent = [f"{item.name} is a criterion of this task and was not measured" for item in criteria if item.value is None]
    missed = [f"{i.name} is {measured[i.name]:.3g}, above {i.bar:.3g}" for i in criteria if i.name in measured and not i.met]
    if doubts or absent:
        return "inconclusive", [*doubts, *absent, *missed]
    if missed:
        return "fail", missed
    return "pass", [f"all {len(criteria)} criteria met: " + ", ".join(f"{name} {value:.3g}" for name, value in measured.items())]


def judge_weighted(criteria: list[Criterion], metrics: dict[str, Any]) -> tuple[Verdict, list[str]]:
    """The verdict where the truth is the weighted prior sample: a task's own criteria, and the gap against the prior's.

    ``metrics`` are those of both sides and the task's, "verdict_unknown_truth" among them.
    """
    verdict, reasons = conclude([*criteria, against_prior(metrics)], target_side_doubts(metrics))
    return fail_gross_misses(verdict, reasons, metrics)


def fail_gross_misses(verdict: Verdict, reasons: list[str], metrics: dict[str, Any]) -> tuple[Verdict, list[str]]:
    """A failure in place of a verdict with doubts where the two sides show a difference above `GROSS`."""
    shown = metrics["verdict_unknown_truth"]
    if target_side_doubts(metrics) and shown.get("lower", 0.0) > GROSS:
        return "fail", [shown["reasons"][0], *reasons]
    return verdict, reasons


def judge_known(metrics: dict[str, Any]) -> tuple[Verdict, list[str]]:
    """The verdict where the truth is known: terminal samples against exact ones, and the gap against its reference.

    ``metrics`` needs mode_tv, log_z_error, w2_ratio, mode_spread_error, and gap with gap_reference (None to leave out).
    """
    criteria = [
        Criterion("mode TV", metrics["mode_tv"], 0.04),
        Criterion("|log Z error|", metrics["log_z_error"], 0.05),
        Criterion("W2 ratio", metrics["w2_ratio"], 1.15),
        Criterion("mode spread error", metrics["mode_spread_error"], 0.10),
    ]
    if metrics["gap_reference"] is not None:
        criteria.append(Criterion("gap - gap_reference", metrics["gap"] - metrics["gap_reference"], 0.35))
    return conclude(criteria, target_side_doubts(metrics))


def target_side_doubts(metrics: dict[str, Any]) -> list[str]:
    """Why the weighted prior sample cannot carry the verdict of a task or of a known truth; empty where it can."""
    doubts = [*thin_target(metrics), *metrics.get("climb_doubts", [])]
    if metrics["target_max_weight"] > MAX_TARGET_WEIGHT:
        doubts.insert(1, f"one prior sample carries {metrics['target_max_weight']:.1%} of the target's weight")
    return doubts


def thin_target(metrics: dict[str, Any]) -> list[str]:
    """Too few effective target samples, or weights with a tail so heavy that their number cannot be trusted.

    A large Pareto-k alone says how the tail falls, not what is in it: both are asked.
    """
    doubts = []
    if metrics["target_ess"] < MIN_TARGET_ESS:
        doubts.append(f"the target side has {metrics['target_ess']:.0f} effective samples, fewer than {MIN_TARGET_ESS:.0f}")
    if _heavy(metrics):
        unseen = metrics["target_unseen"]
        part = f"{unseen:.0%} of" if math.isfinite(unseen) else "any multiple of"
        doubts.append(
            f"the target side's Pareto-k is {metrics['target_pareto_k']:.2f}, above {MAX_PARETO_K}: samples that were not"
            f" drawn may hold {part} the weight of those that were"
        )
    return doubts


def _heavy(metrics: dict[str, Any]) -> bool:
    """Whether the tail of the target's weights may hold more than was drawn shows."""
    return not (metrics["target_pareto_k"] <= MAX_PARETO_K or metrics["target_unseen"] <= MAX_UNSEEN)


def rollouts_to_trust(metrics: dict[str, Any], size: int) -> int | None:
    """The rollouts a side with which `target_side_doubts` would find nothing, where their number is all that is missing."""
    times = max(MIN_TARGET_ESS / max(metrics["target_ess"], 1e-300), metrics["target_max_weight"] / MAX_TARGET_WEIGHT)
    if times <= 1 or _heavy(metrics):
        return None
    return math.ceil(11 * times * size / 1000) * 100


def against_prior(metrics: dict[str, Any]) -> Criterion:
    """The policy's gap may not exceed the prior's by more than 2.6 standard errors: that were worse than no training."""
    prior = metrics["prior"]
    # An infinite ELBO has an infinite error, which excuses nothing.
    errors = [error for error in (metrics["gap_se"], prior["gap_se"]) if math.isfinite(error)]
    return Criterion("gap against the prior's", metrics["gap"], prior["gap"] + STANDARD_ERRORS * math.hypot(*errors))


def worse_than_prior(metrics: dict[str, Any]) -> list[str]:
    """A sentence where the policy is farther from the target than the model that it started from."""
    if against_prior(metrics).met or math.isnan(metrics["gap"]):
        return []
    return [
        f"the policy is worse than the model you started from: its gap is {metrics['gap']:.3g} nats, the prior's"
        f" {metrics['prior']['gap']:.3g}"
    ]


def unjudged(metrics: dict[str, Any]) -> list[str]:
    """What `judge_known` left out of the verdict."""
    if metrics.get("gap_reference", math.nan) is not None:
        return []
    return ["no reference at this alpha and number of steps: the gap is reported, not judged"]


def flags(metrics: dict[str, Any]) -> list[str]:
    """What is wrong with the setting rather than with the policy; only another chain, or reweighting, removes it."""
    variance, error = metrics["start_variance"], metrics["start_variance_se"]
    if math.isnan(variance):
        return [
            "rollouts from one start weigh nothing, or too unequally, so what the chain remembers of its start is not measured"
        ]
    if variance - 1.64 * error > MAX_START_VARIANCE:
        return [
            f"the chain remembers its start: Var[log Z(s_0)] = {variance:.2f} ± {error:.2f}, above {MAX_START_VARIANCE}; the"
            " fine-tuned marginal is not the tilted prior. Use more noise (eta = 1, memoryless), or reweight"
        ]
    return []
