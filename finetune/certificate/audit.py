"""What a policy is that was trained without a known alpha: the tilt that it is closest to, and how close it is to that."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import torch

from ..estimators import weighted_mean
from .closest_alpha import ClosestAlpha, closest_alpha, least_kl
from .criteria import EXIT_STATUS, SEVEREST
from .evidence import Evidence
from .path_metrics import path_metrics
from .spread import pairwise_distance
from .verdict import judge_unknown

TOLD = ("verdict", "reasons", "kl_to_prior", "kl_to_prior_se", "kl_to_target", "kl_from_target", "gap", "gap_se")


def audit(sides: dict[str, Evidence], tolerance: float, remembers: bool = False) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what is found of all laws and of each, the whole certificate of each at the closest alpha).

    sides: by condition, rollouts of both sides, at any alpha, on the CPU. One alpha is matched over all of them, as a training
    has one. remembers: whether samples depend on the start that base and policy share, so that the tilt of paths is not that of
    samples; it takes a pass back.

    "untouched": no rollout of either side met a state at which the policy differs from the base. "moved": some law's KL is above
    0 for certain. Each condition has "kl_from_common", KL(common tilt || base), and besides the closest alpha of its own with
    "least_kl", KL(that tilt || base).

    Errors: ValueError where a side has hardly any finite energy.
    """
    closest = closest_alpha([side.energy for side in sides.values()], [side.prior_energy for side in sides.values()])
    judged = [_certificate(side, closest.alpha, tolerance) for side in sides.values()]
    conditions = [
        {"condition": name, **_figures(side, certificate, closest_alpha([side.energy], [side.prior_energy]))}
        for (name, side), certificate in zip(sides.items(), judged, strict=True)
    ]
    untouched = all(bool((ratio == 0).all()) for side in sides.values() for ratio in (side.log_ratio, side.prior_log_ratio))
    moved = any(one["kl_to_prior"] - 2.6 * one["kl_to_prior_se"] > 0 for one in conditions)
    verdict = next(severe for severe in SEVEREST if any(one["verdict"] == severe for one in judged))
    if untouched or closest.alpha == math.inf:  # of a tilt there is nothing to see
        verdict = "fail"
    elif remembers and verdict == "pass":
        verdict = "inconclusive"
    found = {"untouched": untouched, "moved": moved, "remembers": remembers, "closest": asdict(closest), "verdict": verdict}
    return {**found, "exit_status": EXIT_STATUS[verdict], "conditions": conditions}, judged


def _certificate(side: Evidence, alpha: float, tolerance: float) -> dict[str, Any]:
    """The figures of paths and the verdict of the two sides at this alpha."""
    tilted = replace(side, alpha=alpha)
    metrics = path_metrics(tilted)
    verdict, reasons, own = judge_unknown(tilted, metrics, tolerance)
    return metrics | own | {"verdict": verdict, "reasons": reasons, "alpha": alpha}


def _figures(side: Evidence, certificate: dict[str, Any], closest: ClosestAlpha) -> dict[str, Any]:
    """What is told of one law. closest: of this one alone."""
    target = replace(side, alpha=certificate["alpha"]).target_weight
    evenly = [
        torch.full((len(samples),), 1 / len(samples), dtype=torch.float64) for samples in (side.samples, side.prior_samples)
    ]
    own = pairwise_distance(side.samples, evenly[0])[0]
    return {
        **asdict(closest),
        "least_kl": 0.0 if closest.alpha == math.inf else least_kl(side.prior_energy, closest.alpha),
        "kl_from_common": 0.0 if certificate["alpha"] == math.inf else least_kl(side.prior_energy, certificate["alpha"]),
        "energy_prior": certificate["prior"]["mean_energy"],
        "energy_policy": certificate["mean_energy"],
        "energy_target": weighted_mean(side.prior_energy, target)[0],
        "diversity": own / pairwise_distance(side.prior_samples, target)[0],
        "diversity_of_prior": own / pairwise_distance(side.prior_samples, evenly[1])[0],
        "undercovered": certificate.get("undercovered"),
        "cell_tv": certificate.get("cell_tv"),
        **{name: certificate[name] for name in TOLD},
    }
