"""The verdict by shown closeness, where only the two sides of the evidence can be compared.

A pass needs an upper bound on the difference below the tolerance, a fail a lower bound above it. Anything else is inconclusive,
with the number of rollouts that would decide. That no difference was found is no pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ...samplers.shapes import Index
from .closeness import bridge, effective, path_tv, total_variation, undercovered, unseen
from .criteria import MAX_PARETO_K, MIN_TARGET_ESS, STANDARD_ERRORS, Verdict, flags, thin_target, worse_than_prior
from .evidence import Evidence
from .partition import PARTS, partition_of

MOST_ROLLOUTS = 10_000_000  # beyond which no number of rollouts is named
WHERE = {
    "cell_tv": "shares of regions",
    "energy_tv": "shares of energy ranges",
    "distance_tv": "shares of distances from a region's center",
}


@dataclass(frozen=True)
class Bounds:
    """What the evidence shows of the largest difference: found[name] = (total variation, standard error), one a partition."""

    found: dict[str, tuple[float, float]]
    target_ess: float

    def lower(self, times: float = 1.0) -> tuple[float, str]:
        """The bound from below, and the partition behind it, with ``times`` as many rollouts of the same kind."""
        return max((value - STANDARD_ERRORS * error / times**0.5 - self.unseen(times), name) for name, value, error in self._rows)

    def upper(self, times: float = 1.0) -> tuple[float, str]:
        return max((value + STANDARD_ERRORS * error / times**0.5 + self.unseen(times), name) for name, value, error in self._rows)

    def unseen(self, times: float = 1.0) -> float:
        """The share of the target that so many effective samples may miss."""
        return unseen(self.target_ess * times)

    @property
    def _rows(self) -> list[tuple[str, float, float]]:
        return [(name, value, error) for name, (value, error) in self.found.items()]

    def times_to_decide(self, tolerance: float, most: float) -> float | None:
        """How many times the rollouts would decide if they showed the same difference; None above ``most``."""
        times = 1.0
        while times <= most:
            thick = self.target_ess * times >= MIN_TARGET_ESS
            if self.lower(times)[0] > tolerance or (thick and self.upper(times)[0] <= tolerance):
                return times
            times *= 1.1
        return None


def judge_unknown(
    evidence: Evidence, metrics: dict[str, Any], tolerance: float = 0.05, seed: int = 0
) -> tuple[Verdict, list[str], dict[str, Any]]:
    """The verdict where only the two sides can be compared, by shown closeness; returns also its own metrics.

    Pass: no region of 25 cells, no range of ten bins of energy, nor of ten of the distance to a cell's center, gets a share
    that is off by more than ``tolerance`` (99% confidence). Doubts about the target side, weights with a heavy tail, a
    remembered start and a gap above the prior's take a pass back to inconclusive; they excuse no failure.
    """
    if not (evidence.target_weight > 0).any():
        return "inconclusive", ["no prior sample has a finite energy, so nothing is known of the target"], {}
    bounds, own = _measure(evidence, torch.Generator().manual_seed(seed))
    doubts = [*closeness_doubts(metrics), *worse_than_prior(metrics), *flags(metrics)]
    (lower, below), (upper, above) = bounds.lower(), bounds.upper()
    own |= {"lower": max(0.0, lower), "upper": min(1.0, upper), "tolerance": tolerance, "rollouts_to_decide": None}
    if lower > tolerance:
        verdict: Verdict = "fail"
        reasons = [f"{_said(bounds, below)}, at least {lower:.3f}, above the tolerance of {tolerance:g}", *doubts]
    elif upper <= tolerance and not doubts:
        verdict = "pass"
        reasons = [f"no share is off by more than {upper:.3f}, within the tolerance of {tolerance:g} (99% confidence)"]
    else:
        verdict, reasons = "inconclusive", doubts
        if upper > tolerance:
            reasons = [
                f"{_said(bounds, above)}, between {max(0.0, lower):.3f} and {min(1.0, upper):.3f}, of which"
                f" {bounds.unseen():.3f} is what {bounds.target_ess:.0f} effective target samples may miss; the tolerance is"
                f" {tolerance:g}",
                *doubts,
            ]
        size = len(evidence.samples)
        times = bounds.times_to_decide(tolerance, MOST_ROLLOUTS / size)
        if times is None:
            reasons.append("no number of rollouts up to ten million would decide, as the difference lies at the tolerance")
        elif times > 1:
            own["rollouts_to_decide"] = math.ceil(times * size / 100) * 100
            reasons.append(f"about {own['rollouts_to_decide']:,} rollouts a side would decide")
    own["decided_by"] = below if lower > tolerance else above
    return verdict, [*reasons, "what neither the policy nor the prior's rollouts found is unseen"], own


def _said(bounds: Bounds, name: str) -> str:
    value, error = bounds.found[name]
    return f"{WHERE[name]} are off by {value:.3f} ± {error:.3f}"


def closeness_doubts(metrics: dict[str, Any]) -> list[str]:
    """Why a small difference may be one that the evidence cannot show."""
    doubts = [*thin_target(metrics), *metrics.get("climb_doubts", [])]
    if metrics["pareto_k"] > MAX_PARETO_K:
        doubts.append(f"the Pareto-k of the policy's weights is {metrics['pareto_k']:.2f}, above {MAX_PARETO_K}")
    return doubts


def _measure(evidence: Evidence, generator: torch.Generator) -> tuple[Bounds, dict[str, Any]]:
    """The differences by each partition, and all metrics beside them."""
    partition = partition_of(evidence, generator)
    mine = partition.labels(evidence.samples, evidence.energy)
    theirs = partition.labels(evidence.target_samples, evidence.target_energy)
    weight, effect = evidence.target_weight.cpu(), 1.0
    if evidence.climbed is not None:
        effect = max(evidence.climbed.design_effect(theirs[name], weight, count) for name, count in PARTS.items())
    joined = bridge(evidence, effect)
    own: dict[str, Any] = {"log_z_bridge": joined.log_z}
    found = {}
    for name, count in PARTS.items():
        found[name] = total_variation(*joined.differences(mine[name], theirs[name], count), generator)
        own |= {name: found[name][0], f"{name}_se": found[name][1]}
    own["path_tv"], own["path_tv_se"] = path_tv(evidence, joined.log_z)
    own["undercovered"] = undercovered(evidence, joined.log_z)
    bounds = Bounds(found, effective(weight) / effect)
    own["unseen"] = bounds.unseen()
    of_prior = partition.labels(evidence.prior_samples, evidence.prior_energy)["cell_tv"]
    own["prior_cell_tv"], own["prior_cell_tv_se"] = _cell_tv_of_prior(evidence, of_prior, theirs["cell_tv"], effect, generator)
    return bounds, own


def _cell_tv_of_prior(
    evidence: Evidence, mine: Index, theirs: Int[Tensor, " t"], design_effect: float, generator: torch.Generator
) -> tuple[float, float]:
    """The prior's cell difference from the target: its paths as a policy's with Λ = 0. Where they are the target side too, one
    half of them, the other by weight."""
    own, target = torch.arange(len(mine)), torch.arange(len(theirs))
    if evidence.climbed is None:
        own, target = own[::2], target[1::2]
    device = evidence.energy.device
    sides = evidence.as_prior().resampled(own.to(device), target.to(device))
    if not (sides.target_weight > 0).any():
        return math.nan, math.nan
    joined = bridge(sides, design_effect)
    return total_variation(*joined.differences(mine[own], theirs[target], PARTS["cell_tv"]), generator)
