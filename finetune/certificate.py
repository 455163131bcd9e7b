"""How close the policy came to p_prior · exp(-E/alpha): evidence from both sides, figures, and a three-valued verdict.

The policy side alone proves nothing: a policy that lost modes reports a healthy ELBO and ESS. The target side, prior
trajectories weighted by exp(-E/alpha), sees what the policy does not visit: ELBO ≤ log Z ≤ EUBO, and the gap is the
symmetrised KL. Both sides are judged with the task's own energy, whatever the training used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..samplers.policy import Denoiser, Prior
from ..samplers.rollout import rollout
from ..samplers.trajectory import rows_at_once
from .energy import Energy, EnergyMeter
from .estimators import ess, log_mean_exp, mean, pareto_k, start_variance, weighted_mean

Verdict = Literal["pass", "fail", "inconclusive"]
EXIT_STATUS: dict[str, int] = {"pass": 0, "fail": 1, "inconclusive": 3}

# Thresholds of the target side's own reliability (docs/theory.md, "The verdict", holds the calibration).
MIN_TARGET_ESS = 300.0
MAX_TARGET_WEIGHT = 0.02
MAX_PARETO_K = 0.7
MAX_START_VARIANCE = 0.05


@dataclass(frozen=True, eq=False)
class Evidence:
    """Both sides' samples and log-ratios, float32.

    Policy side, [N]: ``samples`` [N, ...], ``energy``, ``log_ratio`` of policy rollouts.
    Target side, [M]: ``prior_samples`` [M, ...], ``prior_energy``, ``prior_log_ratio`` (the policy's Λ on prior paths).
    step_kl: [num_kernels] mean log-ratio a step on policy rollouts. start_log_weight: [starts, rollouts] or None.
    """

    alpha: float
    samples: Tensor
    energy: Tensor
    log_ratio: Tensor
    prior_samples: Tensor
    prior_energy: Tensor
    prior_log_ratio: Tensor
    step_kl: Tensor
    start_log_weight: Tensor | None
    energy_calls: int

    @property
    def log_weight(self) -> Tensor:
        """lw [N] of policy trajectories; -inf where the energy is +inf or invalid."""
        return _finite_log_weight(self.energy, self.alpha) - self.log_ratio

    @property
    def target_log_weight(self) -> Tensor:
        """-E/alpha [M] of prior trajectories: their weights toward the tilted path law."""
        return _finite_log_weight(self.prior_energy, self.alpha)

    def resampled(self, policy: Tensor, target: Tensor) -> Evidence:
        """The evidence of policy trajectories ``policy`` and prior trajectories ``target`` (indices)."""
        return replace(
            self,
            samples=self.samples[policy],
            energy=self.energy[policy],
            log_ratio=self.log_ratio[policy],
            prior_samples=self.prior_samples[target],
            prior_energy=self.prior_energy[target],
            prior_log_ratio=self.prior_log_ratio[target],
        )

    @property
    def target_weight(self) -> Tensor:
        """[M] float64, sums to 1."""
        return self.target_log_weight.double().softmax(0)


def _finite_log_weight(energy: Tensor, alpha: float) -> Tensor:
    return (-energy / alpha).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


@torch.no_grad()
def gather_evidence(
    prior: Prior,
    policy: Denoiser,
    energy: Energy,
    alpha: float,
    generator: torch.Generator,
    *,
    size: int = 40_000,
    starts: int = 128,
    rollouts: int = 8,
    on_progress: Callable[[int], None] | None = None,
) -> Evidence:
    """Fresh rollouts of policy and prior, ``size`` each, and ``starts`` x ``rollouts`` from common starts.

    A pinned start needs no start test. ``on_progress`` receives the number of trajectories just done.
    """
    meter = EnergyMeter(energy, max_invalid=1.0)
    chain = prior.chain
    policy_side: list[tuple[Tensor, ...]] = []
    prior_side: list[tuple[Tensor, ...]] = []
    step_kl = torch.zeros(chain.num_kernels, dtype=torch.float64)
    chunk = rows_at_once(prior.shape)
    for first in range(0, size, chunk):
        count = min(chunk, size - first)
        for drawn, side in (
            (rollout(prior, policy, count, generator, keep=False), policy_side),
            (rollout(prior, None, count, generator, keep=False, compared=policy), prior_side),
        ):
            assert drawn.step_log_ratio is not None
            data = prior.to_data(drawn.terminal)
            side.append((data, meter(data, **prior.context(count)), drawn.step_log_ratio.sum(0)))
            if side is policy_side:
                step_kl += drawn.step_log_ratio.double().sum(1).cpu() / size
        if on_progress:
            on_progress(2 * count)
    start_log_weight = None
    if chain.start_std > 0:
        start = chain.start_std * torch.randn((starts, *prior.shape), generator=generator, device=prior.device)
        log_weights = []
        for part in start.repeat_interleave(rollouts, 0).split(chunk):
            drawn = rollout(prior, policy, len(part), generator, start=part, keep=False)
            assert drawn.step_log_ratio is not None
            energies = meter(prior.to_data(drawn.terminal), **prior.context(len(part)))
            log_weights.append(_finite_log_weight(energies, alpha) - drawn.step_log_ratio.sum(0))
            if on_progress:
                on_progress(len(part))
        start_log_weight = torch.cat(log_weights).reshape(starts, rollouts)
    samples, energies, ratios = (torch.cat(part) for part in zip(*policy_side, strict=True))
    prior_samples, prior_energies, prior_ratios = (torch.cat(part) for part in zip(*prior_side, strict=True))
    return Evidence(
        alpha,
        samples,
        energies,
        ratios,
        prior_samples,
        prior_energies,
        prior_ratios,
        step_kl,
        start_log_weight,
        meter.calls,
    )


def path_figures(evidence: Evidence) -> dict[str, Any]:
    """ELBO, EUBO, log Z from both sides, ESS, Pareto-k, start dependence: every figure with its standard error (_se)."""
    lw, target = evidence.log_weight, evidence.target_weight
    finite = torch.isfinite(lw)
    elbo = mean(lw) if bool(finite.all()) else (-math.inf, math.inf)
    target_lw = evidence.target_log_weight - evidence.prior_log_ratio
    reverse, forward = log_mean_exp(lw), log_mean_exp(evidence.target_log_weight)
    eubo = weighted_mean(target_lw, target)
    inverse = weighted_mean((target_lw.double() - forward[0]).exp(), target)[0]
    residual = -(lw[finite] - reverse[0])
    figures: dict[str, Any] = {
        "log_z": reverse[0],
        "log_z_se": reverse[1],
        "log_z_forward": forward[0],
        "log_z_forward_se": forward[1],
        "elbo": elbo[0],
        "elbo_se": elbo[1],
        "elbo_finite": mean(lw[finite])[0] if bool(finite.any()) else -math.inf,
        "eubo": eubo[0],
        "eubo_se": eubo[1],
        "gap": eubo[0] - elbo[0],
        "gap_se": math.hypot(eubo[1], elbo[1]),
        "ess": ess(lw),
        "ess_forward": 1 / inverse,
        "pareto_k": pareto_k(lw),
        "residual_mean": residual.mean().item() if len(residual) else math.nan,
        "residual_std": residual.std().item() if len(residual) > 1 else math.nan,
        "violation_rate": (~finite).double().mean().item(),
        "target_ess": ess(evidence.target_log_weight) * len(target),
        "target_max_weight": target.max().item(),
        "target_pareto_k": pareto_k(evidence.target_log_weight),
        "kl_per_step": [round(value, 6) for value in evidence.step_kl.tolist()],
    }
    if evidence.start_log_weight is None:
        figures |= {"start_variance": 0.0, "start_variance_se": 0.0}
    else:
        variance, error = start_variance(evidence.start_log_weight)
        figures |= {"start_variance": variance, "start_variance_se": error}
    return figures


def expectation(evidence: Evidence, function: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Self-normalized E_{p*}[f] from policy samples and from weighted prior samples, with 95% half-widths."""
    value, error = weighted_mean(function(evidence.samples), evidence.log_weight.double().softmax(0))
    other, other_error = weighted_mean(function(evidence.prior_samples), evidence.target_weight)
    return {"policy": value, "policy_ci": 1.96 * error, "target": other, "target_ci": 1.96 * other_error}


def target_side_doubts(figures: dict[str, Any]) -> list[str]:
    """Why the weighted prior sample cannot carry a verdict; empty where it can."""
    doubts = []
    if figures["target_ess"] < MIN_TARGET_ESS:
        doubts.append(f"the target side has {figures['target_ess']:.0f} effective samples, fewer than {MIN_TARGET_ESS:.0f}")
    if figures["target_max_weight"] > MAX_TARGET_WEIGHT:
        doubts.append(f"one prior sample carries {figures['target_max_weight']:.1%} of the target's weight")
    if figures["target_pareto_k"] > MAX_PARETO_K:
        doubts.append(f"the target side's Pareto-k is {figures['target_pareto_k']:.2f}, above {MAX_PARETO_K}")
    return doubts


def flags(figures: dict[str, Any]) -> list[str]:
    """What is wrong with the setting rather than with the policy; only another chain, or reweighting, removes it."""
    variance, error = figures["start_variance"], figures["start_variance_se"]
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


@dataclass(frozen=True)
class Criterion:
    """One line of a verdict: ``value`` must not exceed ``bar``."""

    name: str
    value: float
    bar: float

    @property
    def met(self) -> bool:
        return self.value <= self.bar  # a NaN is not met


def conclude(criteria: list[Criterion], doubts: list[str]) -> tuple[Verdict, list[str]]:
    """Verdict and reasons. A failed criterion fails only where the evidence behind it can be trusted."""
    missed = [f"{item.name} is {item.value:.3g}, above {item.bar:.3g}" for item in criteria if not item.met]
    if doubts:
        return "inconclusive", [*doubts, *missed]
    if missed:
        return "fail", missed
    return "pass", [f"all {len(criteria)} criteria met: " + ", ".join(f"{c.name} {c.value:.3g}" for c in criteria)]


def judge_known(figures: dict[str, Any]) -> tuple[Verdict, list[str]]:
    """The verdict where the truth is known: terminal samples against exact ones, and the gap against its reference.

    ``figures`` needs mode_tv, log_z_error, w2_ratio, mode_spread_error, and gap with gap_reference (None to leave out).
    """
    criteria = [
        Criterion("mode TV", figures["mode_tv"], 0.04),
        Criterion("|log Z error|", figures["log_z_error"], 0.05),
        Criterion("W2 ratio", figures["w2_ratio"], 1.15),
        Criterion("mode spread error", figures["mode_spread_error"], 0.10),
    ]
    if figures["gap_reference"] is not None:
        criteria.append(Criterion("gap - gap_reference", figures["gap"] - figures["gap_reference"], 0.35))
    return conclude(criteria, target_side_doubts(figures))


def judge_unknown(evidence: Evidence, figures: dict[str, Any], seed: int = 0) -> tuple[Verdict, list[str], dict[str, float]]:
    """The verdict where only the two sides can be compared; returns also its own figures.

    Fails when the two estimates of log Z differ by more than max(.1, 3.3 standard errors), or when the policy's shares of
    25 cells (k-means on held-out target samples) or of ten energy bins lie farther from the weighted prior sample than .03
    beyond what sampling explains (bootstrap, 99.7%), or its spread within cells by .03 beyond 3.3 standard errors. A
    remembered start takes a pass back to inconclusive; it excuses no failure.
    """
    generator = torch.Generator().manual_seed(seed)
    doubts = target_side_doubts(figures)
    weight = evidence.target_weight.cpu()
    order = torch.randperm(len(weight), generator=generator)
    fit, held = order[: len(order) // 2], order[len(order) // 2 :]
    target = evidence.prior_samples.flatten(1).double().cpu()
    policy = evidence.samples.flatten(1).double().cpu()
    own: dict[str, float] = {}

    halves = [log_mean_exp(evidence.target_log_weight.cpu()[half]) for half in (fit, held)]
    own["target_halves_z"] = abs(halves[0][0] - halves[1][0]) / max(math.hypot(halves[0][1], halves[1][1]), 1e-12)
    if own["target_halves_z"] > 3:
        doubts.append(f"the target side's halves disagree on log Z by {own['target_halves_z']:.1f} standard errors")

    if min(int((weight[half] > 0).sum()) for half in (fit, held)) < 25:
        return "inconclusive", [*doubts, "fewer than 25 prior samples of a half carry any weight"], own

    error = math.hypot(figures["log_z_se"], figures["log_z_forward_se"])
    own["log_z_difference"] = abs(figures["log_z"] - figures["log_z_forward"])
    criteria = [Criterion("|log Z forward - reverse|", own["log_z_difference"], max(0.1, 3.3 * error))]

    centers = k_means(target[fit], weight[fit], 25, generator)
    cells = (_nearest(policy, centers), _nearest(target[held], centers))
    edges = weighted_quantiles(evidence.prior_energy.double().cpu()[fit], weight[fit], 10)
    bins = (
        torch.bucketize(evidence.energy.double().cpu(), edges),
        torch.bucketize(evidence.prior_energy.double().cpu()[held], edges),
    )
    for name, (mine, theirs), count in (("cell TV", cells, 25), ("energy TV", bins, 10)):
        distance, null = share_distance(mine, theirs, weight[held], count, generator)
        own |= {name.replace(" ", "_").lower(): distance, name.replace(" ", "_").lower() + "_null": null}
        criteria.append(Criterion(name, distance, 0.03 + null))
    spread, spread_se = spread_ratio(policy, target[held], weight[held], centers, cells)
    own |= {"cell_spread_ratio": spread, "cell_spread_ratio_se": spread_se}
    criteria.append(Criterion("|cell spread ratio - 1|", abs(spread - 1), 0.03 + 3.3 * spread_se))
    verdict, reasons = conclude(criteria, doubts)
    if verdict == "pass" and flags(figures):
        verdict, reasons = "inconclusive", flags(figures)
    reasons.append(f"regions of prior mass below {3 / len(weight):.1g} are unseen by this test")
    return verdict, reasons, own


def k_means(x: Tensor, weight: Tensor, count: int, generator: torch.Generator, rounds: int = 20) -> Tensor:
    """Weighted Lloyd iterations from weighted draws; x [N, D], weight [N] → centers [count, D]."""
    centers = x[torch.multinomial(weight, count, generator=generator)]
    for _ in range(rounds):
        cell = _nearest(x, centers)
        mass = torch.zeros(count, dtype=x.dtype).index_add_(0, cell, weight)
        total = torch.zeros_like(centers).index_add_(0, cell, weight[:, None] * x)
        centers = torch.where(mass[:, None] > 0, total / mass.clamp(min=1e-300)[:, None], centers)
    return centers


def _nearest(x: Tensor, centers: Tensor) -> Tensor:
    return torch.cat([torch.cdist(part, centers).argmin(1) for part in x.split(8192)])


def weighted_quantiles(value: Tensor, weight: Tensor, count: int) -> Tensor:
    """[count - 1] edges that cut a weighted sample into equal shares."""
    ordered, order = value.sort()
    cumulative = weight[order].cumsum(0) / weight.sum()
    points = torch.arange(1, count, dtype=cumulative.dtype) / count
    return ordered[torch.searchsorted(cumulative, points).clamp(max=len(value) - 1)]


def share_distance(
    mine: Tensor, theirs: Tensor, weight: Tensor, count: int, generator: torch.Generator, bootstraps: int = 1000
) -> tuple[float, float]:
    """Total variation between the shares of ``count`` cells, and its 99.7% quantile when nothing but sampling differs."""
    share = weight / weight.sum()
    own = torch.bincount(mine, minlength=count).double() / len(mine)
    target = torch.zeros(count, dtype=torch.float64).index_add_(0, theirs, share)
    distance = 0.5 * (own - target).abs().sum().item()
    # The weighted shares' noise, by the delta method: one influence share_i (e_i - target) a sample.
    influence = share[:, None] * (torch.nn.functional.one_hot(theirs, count).double() - target)
    values, vectors = torch.linalg.eigh(influence.T @ influence)
    normal = torch.randn(bootstraps, count, generator=generator, dtype=torch.float64)
    noise = normal * values.clamp(min=0).sqrt() @ vectors.T
    # The policy's own sampling noise, around the target's shares: what an exact sampler would show.
    seed = int(torch.randint(2**31, (), generator=generator))
    counts = np.random.default_rng(seed).multinomial(len(mine), (target / target.sum()).numpy(), bootstraps)
    draws = torch.from_numpy(counts).double() / len(mine)
    null = 0.5 * (noise - (draws - target)).abs().sum(1)
    return distance, null.quantile(0.997).item()


def spread_ratio(
    policy: Tensor, target: Tensor, weight: Tensor, centers: Tensor, cells: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """Root mean square distance to the cell's center, policy over target, cells weighted by the target's shares."""
    count = len(centers)
    share = weight / weight.sum()
    mine = (policy - centers[cells[0]]).square().sum(1)
    theirs = (target - centers[cells[1]]).square().sum(1)
    mass = torch.zeros(count, dtype=torch.float64).index_add_(0, cells[1], share)
    own_mass = torch.bincount(cells[0], minlength=count).double().clamp(min=1) / len(mine)
    own_weight = (mass / own_mass)[cells[0]] / len(mine)
    # A cell that the policy never visits contributes nothing; the share test is what fails it.
    ours = weighted_mean(mine, own_weight / own_weight.sum())
    target_mean = weighted_mean(theirs, share)
    if not (ours[0] > 0 and target_mean[0] > 0):
        return math.inf, 0.0
    ratio = math.sqrt(ours[0] / target_mean[0])
    return ratio, 0.5 * ratio * math.hypot(ours[1] / ours[0], target_mean[1] / target_mean[0])
