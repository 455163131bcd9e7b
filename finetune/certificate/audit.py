"""What a policy is that was trained without a known alpha: the tilt that it is closest to, and how close it is to that."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

from ..estimators import even, pairwise_distance, weighted_mean
from .closest_alpha import ClosestAlpha, closest_alpha, least_kl
from .criteria import EXIT_STATUS, SEVEREST, STANDARD_ERRORS
from .evidence import Evidence
from .path_metrics import path_metrics
from .verdict import judge_unknown

TOLD = ("verdict", "reasons", "kl_to_prior", "kl_to_prior_se", "kl_to_target", "kl_from_target", "gap", "gap_se")


def audit(
    sides: dict[str, Evidence], tolerance: float, remembers: bool = False
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], Evidence]]]:
    """(what is found of all laws and of each; of each the whole certificate at the closest alpha, and the evidence at it).

    sides: by condition, rollouts of both sides, at any alpha, on the CPU. One alpha is matched over all of them, as a training
    has one. remembers: whether samples depend on the start that base and policy share, so that the tilt of paths is not that of
    samples; it takes a pass back.

    "untouched": no rollout of either side met a state at which the policy differs from the base. "moved": some law's KL is above
    0 for certain. Each condition has "kl_from_common", KL(common tilt || base), and besides the closest alpha of its own with
    "least_kl", KL(that tilt || base).

    Errors: ValueError where a side has hardly any finite energy.
    """
    closest = closest_alpha([side.energy for side in sides.values()], [side.prior_energy for side in sides.values()])
    tilted = [replace(side, alpha=closest.alpha) for side in sides.values()]
    judged = [(_certificate(side, tolerance), side) for side in tilted]
    conditions = [
        {"condition": name, **_figures(side, certificate, closest_alpha([side.energy], [side.prior_energy]))}
        for name, (certificate, side) in zip(sides, judged, strict=True)
    ]
    untouched = all(bool((ratio == 0).all()) for side in sides.values() for ratio in (side.log_ratio, side.prior_log_ratio))
    moved = any(one["kl_to_prior"] - STANDARD_ERRORS * one["kl_to_prior_se"] > 0 for one in conditions)
    verdict = next(severe for severe in SEVEREST if any(one["verdict"] == severe for one in conditions))
    if untouched or closest.alpha == math.inf:  # of a tilt there is nothing to see
        verdict = "fail"
    elif remembers and verdict == "pass":
        verdict = "inconclusive"
    found = {"untouched": untouched, "moved": moved, "remembers": remembers, "closest": asdict(closest), "verdict": verdict}
    return {**found, "exit_status": EXIT_STATUS[verdict], "conditions": conditions}, judged


def _certificate(side: Evidence, tolerance: float) -> dict[str, Any]:
    """The figures of paths and the verdict of the two sides."""
    metrics = path_metrics(side)
    verdict, reasons, own = judge_unknown(side, metrics, tolerance)
    return metrics | own | {"verdict": verdict, "reasons": reasons, "alpha": side.alpha}


def _figures(side: Evidence, certificate: dict[str, Any], closest: ClosestAlpha) -> dict[str, Any]:
    """What is told of one law. closest: of this one alone."""
    own = pairwise_distance(side.samples, even(len(side.samples)))[0]
    return {
        **asdict(closest),
        "least_kl": least_kl(side.prior_energy, closest.alpha),
        "kl_from_common": least_kl(side.prior_energy, side.alpha),
        "energy_prior": certificate["prior"]["mean_energy"],
        "energy_policy": certificate["mean_energy"],
        "energy_target": weighted_mean(side.prior_energy, side.target_weight)[0],
        "diversity": own / pairwise_distance(side.prior_samples, side.target_weight)[0],
        "diversity_of_prior": own / pairwise_distance(side.prior_samples, even(len(side.prior_samples)))[0],
        "undercovered": certificate.get("undercovered"),
        "cell_tv": certificate.get("cell_tv"),
        **{name: certificate[name] for name in TOLD},
    }
