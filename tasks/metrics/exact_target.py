"""Distances of samples to a target that is known exactly, and the criteria of a policy by its exact denoiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...finetune.certificate.criteria import Criterion, Verdict, conclude
from ...finetune.certificate.evidence import Evidence
from ...finetune.certificate.reference import thin_reference
from ...finetune.energies.energy import Energy
from ...finetune.estimators import log_mean_exp
from ...samplers.prior import Prior
from .known_truth import histogram_tv

BOOTSTRAPS = 20
MOST_TV = 0.05  # of any partition


def share_tv(share: Tensor, exact: Tensor) -> float:
    """Total variation between the mean of shares [N, n] of samples in n parts and the exact shares [n]."""
    return 0.5 * (share.double().mean(0) - exact).abs().sum().item()


def share_tv_of_exact(share: Tensor, generator: torch.Generator) -> float:
    """What `share_tv` is on average for as many exact samples [N, n]: by resampling them."""
    count = len(share)
    draws = [torch.randint(count, (count,), generator=generator) for _ in range(BOOTSTRAPS)]
    return sum(share_tv(share[index], share.mean(0)) for index in draws) / BOOTSTRAPS


def part_metrics(name: str, share: Tensor, exact_share: Tensor, weights: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """``name``_tv between a policy's shares [N, n] of n parts and the exact weights [n], ``name``_tv_exact for exact samples."""
    return {
        f"{name}_tv": share_tv(share, weights),
        f"{name}_tv_exact": share_tv_of_exact(exact_share, generator),
        f"{name}_shares": [round(value, 5) for value in share.mean(0).tolist()],
        f"{name}_weights": [round(value, 5) for value in weights.tolist()],
    }


def refuse_other_energy(energy: Energy, own: Energy, prior: Prior) -> None:
    """Errors: ValueError where ``energy`` differs from the task's ``own`` on points of the prior's state space."""
    x = prior.to_data(torch.randn(64, *prior.shape, generator=torch.Generator().manual_seed(0)))
    if not torch.allclose(energy(x).float().cpu(), own(x).float().cpu(), rtol=1e-3, atol=1e-3):
        raise ValueError("the target of this task is known for the task's own energy alone, and this is another one")


def energy_metrics(energy: Tensor, exact: Tensor) -> dict[str, float]:
    """energy_tv between energies [N] of a policy and of exact samples [2 N], on 20 bins; energy_tv_exact of their halves."""
    first, second = exact.chunk(2)
    return {"energy_tv": histogram_tv(energy, second), "energy_tv_exact": histogram_tv(first, second)}


def log_z_metrics(evidence: Evidence, log_z: float) -> dict[str, Any]:
    """The policy's log Z beside the chain's own and the closed form ``log_z`` of the continuous target.

    log_z_true: of the chain, by the exact denoiser's paths. A chain of finite steps is not quite the mixture that it stands for,
    and no policy can do anything about it. Without such paths it is the closed form.
    """
    estimate = log_mean_exp(evidence.log_weight)[0]
    own = (log_z, 0.0) if evidence.reference is None else log_mean_exp(evidence.reference.log_weight)
    return {
        "log_z_true": own[0],
        "log_z_true_se": own[1],
        "log_z_ideal": log_z,
        "log_z_error": abs(estimate - own[0]),
        "log_z_error_ideal": abs(estimate - log_z),
    }


def part_criteria(metrics: dict[str, Any], *parts: str) -> tuple[list[Criterion], list[str]]:
    """The bars of total variations by name, and the doubts where the samples are too few for them: exact ones would come near."""
    criteria, doubts = [], []
    for part in parts:
        value, exact = metrics[f"{part}_tv"], metrics[f"{part}_tv_exact"]
        criteria.append(Criterion(f"{part} TV", value, MOST_TV))
        if exact > 0.5 * MOST_TV and value < MOST_TV + 3 * exact:
            doubts.append(f"so few exact samples have a {part} TV of {exact:.3f} already; the bar is {MOST_TV:g}, draw more")
    return criteria, doubts


def judge_exact(metrics: dict[str, Any], parts: tuple[str, ...], *own: Criterion) -> tuple[Verdict, list[str]]:
    """The verdict by the total variations of ``parts``, further criteria, and the figures of the target's exact denoiser on the
    same chain.

    Nothing here uses the prior's weighted paths, so that a thin prior side is no doubt. Few effective paths of the exact
    denoiser are one, and so are too few samples.
    """
    reference = metrics.get("ess_reference")
    criteria, doubts = part_criteria(metrics, *parts)
    criteria += [
        *own,
        Criterion("|log Z error|", metrics["log_z_error"], 0.1),
        Criterion("ESS below the reference's, share", 1 - metrics["ess"] / reference if reference else None, 0.2),
        Criterion("gap - gap_reference", metrics["gap"] - metrics["gap_reference"] if reference else None, 0.35),
    ]
    return conclude(criteria, [*doubts, *(thin_reference(metrics) if reference else [])])
