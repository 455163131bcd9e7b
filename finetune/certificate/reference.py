"""Paths of a target's exact denoiser: where it is known, the target side needs no prior paths, however few of those count."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...samplers.denoiser import Denoiser
from ...samplers.log_ratio import step_log_ratio
from ...samplers.prior import Prior
from ...samplers.rollout import rollout
from ...samplers.trajectory import rows_at_once
from ..energies.energy import Energy
from ..estimators import ess, log_mean_exp, mean, weighted_mean

MIN_EFFECTIVE = 300.0


@dataclass(frozen=True, eq=False)
class ReferencePaths:
    """Paths that the exact denoiser drew: log_weight = -E/alpha - log(reference / prior), target_log_weight = -E/alpha,
    policy_log_ratio = log(policy / prior) on them; nats.

    The target is a law of paths, p_prior(path) exp(-E/alpha) / Z, on the chain as it is run. The exact denoiser's own path law
    differs from it by the size of the steps alone. Weighted by exp(log_weight), its paths are the target's for any chain, and
    their mean weight estimates the chain's own Z without bias. The density of the prior's paths cancels out of
    exp(-E/alpha) · prior / reference, so no prior path is ever drawn.
    """

    log_weight: Float[Tensor, " n"]
    target_log_weight: Float[Tensor, " n"]
    policy_log_ratio: Float[Tensor, " n"]


@torch.no_grad()
def reference_paths(
    prior: Prior,
    reference: Denoiser,
    policy: Denoiser,
    energy: Energy,
    alpha: float,
    generator: torch.Generator,
    *,
    size: int = 4000,
    most: int = 40_000,
) -> ReferencePaths:
    """Paths of ``reference`` on the prior's chain, with their energies and the policy's log-ratio on them: ``size`` of them, and
    as many again while too few count, up to ``most``."""
    chunk = rows_at_once(prior.shape, prior.device)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    drawn, effective = 0, 0.0
    while not drawn or (effective < MIN_EFFECTIVE and drawn < most):
        for first in range(0, size, chunk):
            paths = rollout(prior, reference, min(chunk, size - first), generator)
            assert paths.step_log_ratio is not None
            target = -energy(prior.to_data(paths.terminal), **paths.context).float() / alpha
            ratio = step_log_ratio(prior.chain, prior.denoiser, policy, paths).sum(0)
            parts.append((target - paths.step_log_ratio.sum(0), target, ratio))
        drawn += size
        effective = ess(torch.cat([part[0] for part in parts])) * drawn
    return ReferencePaths(*(torch.cat(part) for part in zip(*parts, strict=True)))


def reference_metrics(paths: ReferencePaths, metrics: dict[str, Any]) -> dict[str, Any]:
    """What the reference reaches on this chain, and EUBO and gap of policy and prior by its paths, in place of those in
    ``metrics``, which are by the prior's.

    EUBO of any sampler = E_target[-E/alpha - log(sampler / prior)], over paths. It is a mean over the target's paths, which the
    reference's are by weight, whatever sampler is asked about: so the policy cannot hide what it does not visit, and a thin
    prior side plays no part.
    """
    weight = paths.log_weight.double().softmax(0)
    log_z, elbo = log_mean_exp(paths.log_weight), mean(paths.log_weight)
    eubo = weighted_mean(paths.log_weight, weight)
    policy = weighted_mean(paths.target_log_weight - paths.policy_log_ratio, weight)
    prior = weighted_mean(paths.target_log_weight, weight)
    return {
        **_gap(metrics, policy),
        "prior": metrics["prior"] | _gap(metrics["prior"], prior),
        "log_z_chain": log_z[0],
        "log_z_chain_se": log_z[1],
        "elbo_reference": elbo[0],
        "eubo_reference": eubo[0],
        "gap_reference": eubo[0] - elbo[0],
        "ess_reference": ess(paths.log_weight),
        "reference_effective": ess(paths.log_weight) * len(paths.log_weight),
    }


def _gap(metrics: dict[str, Any], eubo: tuple[float, float]) -> dict[str, float]:
    gap = eubo[0] - metrics["elbo"]
    return {"eubo": eubo[0], "eubo_se": eubo[1], "gap": gap, "gap_se": math.hypot(eubo[1], metrics["elbo_se"])}


def thin_reference(metrics: dict[str, Any]) -> list[str]:
    """Why the reference's paths cannot carry a verdict: too few of them count, which more steps would change."""
    if metrics["reference_effective"] >= MIN_EFFECTIVE:
        return []
    return [
        f"the exact denoiser has {metrics['reference_effective']:.0f} effective paths on this chain, fewer than"
        f" {MIN_EFFECTIVE:.0f}; take more steps"
    ]
