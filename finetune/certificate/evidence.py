"""How close the policy came to p_prior · exp(-E/alpha): evidence from both sides, and the metrics of paths.

The policy side alone proves nothing: a policy that lost modes reports a healthy ELBO and ESS. The target side, prior
trajectories weighted by exp(-E/alpha), or a climb of prior trajectories where too few of them have weight (`target_side`), sees
what the policy does not visit: ELBO ≤ log Z ≤ EUBO, and the gap is the
symmetrised KL. Both sides are judged with the task's own energy, whatever the training used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...samplers.denoiser import Denoiser
from ...samplers.prior import Prior
from ...samplers.rollout import Drawing, in_parts, rollout
from ...samplers.trajectory import rows_at_once
from ..energies.energy import Energy, EnergyMeter
from ..populations.smc import ClimbError
from .climbed import Climbed, climbed_side, climbs
from .reference import ReferencePaths


@dataclass(frozen=True, eq=False)
class Evidence:
    """Both sides' samples and log-ratios, float32.

    Policy side: ``samples``, ``energy``, ``log_ratio`` of policy rollouts.
    Prior side: ``prior_samples``, ``prior_energy``, ``prior_log_ratio`` (the policy's Λ on prior paths). It is the target side as
    well (``target_samples`` and so on), unless there is a ``climbed`` one.
    step_kl: mean log-ratio of each trained step on policy rollouts. start_log_weight: of rollouts from common starts, or
    None. energy_calls: of all; target_calls: of them, those for prior and target. reference: paths of the target's exact
    denoiser, where the task knows it.
    """

    alpha: float
    samples: Float[Tensor, " n *data"]
    energy: Float[Tensor, " n"]
    log_ratio: Float[Tensor, " n"]
    prior_samples: Float[Tensor, " m *data"]
    prior_energy: Float[Tensor, " m"]
    prior_log_ratio: Float[Tensor, " m"]
    step_kl: Float[Tensor, " kernels"]
    start_log_weight: Float[Tensor, " starts rollouts"] | None
    energy_calls: int
    target_calls: int = 0
    climbed: Climbed | None = None
    reference: ReferencePaths | None = None

    @property
    def target_samples(self) -> Float[Tensor, " t *data"]:
        return self.prior_samples if self.climbed is None else self.climbed.samples

    @property
    def target_energy(self) -> Float[Tensor, " t"]:
        return self.prior_energy if self.climbed is None else self.climbed.energy

    @property
    def target_log_ratio(self) -> Float[Tensor, " t"]:
        """The policy's Λ on the paths of the target side."""
        return self.prior_log_ratio if self.climbed is None else self.climbed.log_ratio

    @property
    def log_weight(self) -> Float[Tensor, " n"]:
        """lw of policy trajectories; -inf where the energy is +inf or invalid."""
        return _finite_log_weight(self.energy, self.alpha) - self.log_ratio

    @property
    def target_log_weight(self) -> Float[Tensor, " t"]:
        """Weights of the target side toward the tilted path law: -E/alpha over what drew each path."""
        log_weight = _finite_log_weight(self.target_energy, self.alpha)
        return log_weight if self.climbed is None else log_weight - self.climbed.log_proposal

    @property
    def log_weight_on_target(self) -> Float[Tensor, " t"]:
        """lw = -E/alpha - Λ of the paths of the target side."""
        return _finite_log_weight(self.target_energy, self.alpha) - self.target_log_ratio

    def resampled(self, policy: Int[Tensor, " _"], target: Int[Tensor, " _"]) -> Evidence:
        """The evidence of policy trajectories ``policy`` and target trajectories ``target`` (indices)."""
        own = replace(self, samples=self.samples[policy], energy=self.energy[policy], log_ratio=self.log_ratio[policy])
        if self.climbed is not None:
            return replace(own, climbed=self.climbed.select(target))
        return replace(
            own,
            prior_samples=self.prior_samples[target],
            prior_energy=self.prior_energy[target],
            prior_log_ratio=self.prior_log_ratio[target],
        )

    def joined(self, other: Evidence) -> Evidence:
        """This evidence and that of more rollouts of the same policy and prior; the common starts stay this one's."""
        names = ("samples", "energy", "log_ratio", "prior_samples", "prior_energy", "prior_log_ratio")
        rows = {name: torch.cat([getattr(self, name), getattr(other, name)]) for name in names}
        share = len(self.samples) / len(rows["samples"])
        step_kl = share * self.step_kl + (1 - share) * other.step_kl
        calls = {name: getattr(self, name) + getattr(other, name) for name in ("energy_calls", "target_calls")}
        climbed = self.climbed
        if climbed is not None and other.climbed is not None:  # a second climb may have failed
            climbed = climbed.joined(other.climbed)
        return replace(self, **rows, **calls, step_kl=step_kl, climbed=climbed)

    def as_prior(self) -> Evidence:
        """The evidence of the prior as its own policy, with Λ = 0."""
        zero = torch.zeros_like(self.prior_log_ratio)
        climbed = None if self.climbed is None else replace(self.climbed, log_ratio=torch.zeros_like(self.climbed.log_ratio))
        own = replace(self, samples=self.prior_samples, energy=self.prior_energy, log_ratio=zero)
        return replace(own, prior_log_ratio=zero, climbed=climbed)

    @property
    def target_weight(self) -> Float[Tensor, " t"]:
        """float64, sums to 1."""
        return self.target_log_weight.double().softmax(0)


def _finite_log_weight(energy: Float[Tensor, " n"], alpha: float) -> Float[Tensor, " n"]:
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
    population: str = "auto",
    bar: Any = None,
    on_progress: Callable[[int], None] | None = None,
) -> Evidence:
    """Fresh rollouts of policy and prior, ``size`` each, and ``starts`` x ``rollouts`` from common starts.

    The prior has one condition, or none (`Prior.only`): each has a law of its own. A pinned start needs no start test, nor do 0
    ``starts``. ``on_progress`` receives the number of trajectories just done, those of a batch in parts, one with every step.
    population: what the target side is, as in `TrainConfig`; bar: a climb shows itself on a bar that this makes of its label.
    """
    assert prior.num_conditions == 1, "evidence is of one law"
    meter = EnergyMeter(energy, max_invalid=1.0)
    chain = prior.chain
    policy_side: list[tuple[Tensor, ...]] = []
    prior_side: list[tuple[Tensor, ...]] = []
    step_kl = torch.zeros(chain.num_kernels, dtype=torch.float64)
    chunk = rows_at_once(prior.shape, prior.device)
    for first in range(0, size, chunk):
        count = min(chunk, size - first)
        sides: tuple[tuple[Drawing, list[tuple[Tensor, ...]]], ...] = (("policy", policy_side), ("prior", prior_side))
        for drawn_by, side in sides:
            step = in_parts(count, chain.num_steps, on_progress)
            drawn = rollout(prior, policy, count, generator, drawn_by=drawn_by, keep=False, on_step=step)
            assert drawn.step_log_ratio is not None
            data = prior.to_data(drawn.terminal)
            side.append((data, meter(data, **drawn.context), drawn.step_log_ratio.sum(0)))
            if drawn_by == "policy":
                step_kl += drawn.step_log_ratio.double().sum(1).cpu() / size
    start_log_weight = None
    if chain.start_std > 0 and starts:
        start_log_weight = _from_common_starts(prior, policy, meter, alpha, generator, starts, rollouts, on_progress)
    samples, energies, ratios = (torch.cat(part) for part in zip(*policy_side, strict=True))
    prior_samples, prior_energies, prior_ratios = (torch.cat(part) for part in zip(*prior_side, strict=True))
    of_policy = size + (0 if start_log_weight is None else start_log_weight.numel())
    climbed = None
    if climbs(prior_energies, alpha, population):
        with suppress(ClimbError):  # the weighted prior paths are the target side then, too thin to decide
            climbed = climbed_side(prior, policy, meter, alpha, size, generator, bar)
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
        meter.calls - of_policy,
        climbed,
    )


def _from_common_starts(
    prior: Prior,
    policy: Denoiser,
    meter: EnergyMeter,
    alpha: float,
    generator: torch.Generator,
    starts: int,
    rollouts: int,
    on_progress: Callable[[int], None] | None,
) -> Float[Tensor, " {starts} {rollouts}"]:
    """Log-weights of ``rollouts`` of the policy from each of ``starts`` starts."""
    chain = prior.chain
    start = chain.start_std * torch.randn((starts, *prior.shape), generator=generator, device=prior.device)
    log_weights: list[Tensor] = []
    for part in start.repeat_interleave(rollouts, 0).split(rows_at_once(prior.shape, prior.device)):
        step = in_parts(len(part), chain.num_steps, on_progress)
        drawn = rollout(prior, policy, len(part), generator, start=part, keep=False, on_step=step)
        assert drawn.step_log_ratio is not None
        energies = meter(prior.to_data(drawn.terminal), **drawn.context)
        log_weights.append(_finite_log_weight(energies, alpha) - drawn.step_log_ratio.sum(0))
    return torch.cat(log_weights).reshape(starts, rollouts)
