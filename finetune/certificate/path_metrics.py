"""The figures of paths: ELBO, EUBO, log Z, effective numbers, each with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..estimators import ess, log_mean_exp, mean, start_variance, weighted_mean
from ..weight_tail import pareto_k, weight_tail
from .bins import BINS, filled, weighted_quantiles
from .evidence import Evidence
from .reference import reference_metrics


def path_metrics(evidence: Evidence) -> dict[str, Any]:
    """ELBO, EUBO, log Z from both sides, ESS, Pareto-k, start dependence: every figure with its standard error (_se).

    kl_to_prior: KL(policy || prior), how far the policy moved; kl_to_target: KL(policy || target); kl_from_target: KL(target ||
    policy), which grows with what the policy lost. All are over paths, nats. ``prior`` holds ELBO, EUBO and gap of the prior
    itself, the model that was started from. EUBO and gap are by the prior's weighted paths,
    or by those of the target's exact denoiser where there are any (`reference_metrics`).
    """
    lw, target = evidence.log_weight, evidence.target_weight
    finite = torch.isfinite(lw)
    target_lw = evidence.log_weight_on_target
    reverse, forward = log_mean_exp(lw), forward_log_z(evidence)
    inverse = weighted_mean((target_lw.double() - forward[0]).exp(), target)[0]
    tail = weight_tail(evidence.target_log_weight)
    residual = -(lw[finite] - reverse[0])
    metrics: dict[str, Any] = {
        "log_z": reverse[0],
        "log_z_se": reverse[1],
        "log_z_forward": forward[0],
        "log_z_forward_se": forward[1],
        **_sandwich(evidence),
        "prior": _sandwich(evidence.as_prior()),
        "elbo_finite": mean(lw[finite])[0] if bool(finite.any()) else -math.inf,
        "ess": ess(lw),
        "ess_forward": 1 / inverse,
        "pareto_k": pareto_k(lw),
        "residual_mean": residual.mean().item() if len(residual) else math.nan,
        "residual_std": residual.std().item() if len(residual) > 1 else math.nan,
        "violation_rate": (~finite).double().mean().item(),
        "target_ess": target_effective(evidence),
        "target_max_weight": target.max().item(),
        "target_pareto_k": tail.k,
        "target_unseen": tail.unseen,
        "kl_per_step": [round(value, 6) for value in evidence.step_kl.tolist()],
    }
    if evidence.climbed is not None:
        metrics |= {"climb_doubts": list(evidence.climbed.doubts)}
    if evidence.start_log_weight is None:
        metrics |= {"start_variance": 0.0, "start_variance_se": 0.0}
    else:
        variance, error = start_variance(evidence.start_log_weight)
        metrics |= {"start_variance": variance, "start_variance_se": error}
    if evidence.reference is not None:
        metrics |= reference_metrics(evidence.reference, metrics)
    return metrics | _divergences(evidence, metrics)


def forward_log_z(evidence: Evidence) -> tuple[float, float]:
    """log Z by the target side, and its standard error."""
    return log_mean_exp(evidence.target_log_weight) if evidence.climbed is None else evidence.climbed.log_z_estimate


def target_effective(evidence: Evidence) -> float:
    """How many independent samples of the target the target side is worth; of a climb, by what its islands say of energies."""
    number = ess(evidence.target_log_weight) * len(evidence.target_energy)
    if evidence.climbed is None or number == 0:
        return number
    energy, weight = filled(evidence.target_energy), evidence.target_weight.cpu()
    label = torch.bucketize(energy, weighted_quantiles(energy, weight, BINS))
    return number / evidence.climbed.design_effect(label, weight, BINS)


def _sandwich(evidence: Evidence) -> dict[str, float]:
    """ELBO, EUBO and the gap between them, and the mean of the finite energies."""
    lw = evidence.log_weight
    elbo = mean(lw) if bool(lw.isfinite().all()) else (-math.inf, math.inf)
    bound, weight = evidence.log_weight_on_target, evidence.target_weight
    eubo = weighted_mean(bound, weight) if evidence.climbed is None else evidence.climbed.mean(bound, weight)
    known = evidence.energy[evidence.energy.isfinite()]
    energy = mean(known) if len(known) > 1 else (math.nan, math.nan)
    return {
        "mean_energy": energy[0],
        "mean_energy_se": energy[1],
        "elbo": elbo[0],
        "elbo_se": elbo[1],
        "eubo": eubo[0],
        "eubo_se": eubo[1],
        "gap": eubo[0] - elbo[0],
        "gap_se": math.hypot(eubo[1], elbo[1]),
    }


def _divergences(evidence: Evidence, metrics: dict[str, Any]) -> dict[str, float]:
    """The policy's KL to the prior, and to and from the target by the best log Z there is, each with its standard error."""
    moved = mean(evidence.log_ratio)
    name = "log_z_forward" if evidence.reference is None else "log_z_chain"
    log_z, error = metrics[name], metrics[f"{name}_se"]
    return {
        "kl_to_prior": moved[0],
        "kl_to_prior_se": moved[1],
        "kl_to_target": log_z - metrics["elbo"],
        "kl_to_target_se": math.hypot(error, metrics["elbo_se"]),
        "kl_from_target": metrics["eubo"] - log_z,
        "kl_from_target_se": math.hypot(error, metrics["eubo_se"]),
    }


def expectation(evidence: Evidence, function: Callable[[Float[Tensor, " n *data"]], Float[Tensor, " n"]]) -> dict[str, float]:
    """Self-normalized E_{p*}[f] from policy samples and from weighted prior samples, with 95% half-widths."""
    value, error = weighted_mean(function(evidence.samples), evidence.log_weight.double().softmax(0))
    other, other_error = weighted_mean(function(evidence.target_samples), evidence.target_weight)
    return {"policy": value, "policy_ci": 1.96 * error, "target": other, "target_ci": 1.96 * other_error}
