"""Held-out mixtures with exact denoisers in 2, 10 and 50 dimensions: samplers that are right, and samplers with planted faults.

The verdict by the two sides is calibrated on them (`tests/calibrate.py`), and on nothing else that it was built with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tiltune.finetune.certificate.evidence import Evidence, gather_evidence
from tiltune.tasks.gaussian_mixture import GaussianMixture, MixtureDenoiser

DIMENSIONS = (2, 10, 50)
COMPONENTS = 4
STD, MEAN_VARIANCE = 0.5, 0.75  # of a component, and of a component's mean in each coordinate: unit variance in all
PRIOR_ESS = 0.1


@dataclass(frozen=True, eq=False)
class HeldOut:
    """A mixture prior and a linear energy E(x) = slope · x, alpha = 1, whose tilted prior is a mixture again."""

    prior: GaussianMixture
    slope: Tensor

    def energy(self, x: Tensor) -> Tensor:
        """x [N, D] → [N]."""
        return x @ self.slope.to(x)

    def target(self, alpha: float = 1.0) -> GaussianMixture:
        """p_prior · exp(-E/alpha), normalized, in closed form."""
        return self._tilt(alpha)[0]

    @property
    def prior_ess(self) -> float:
        """Effective share of prior samples weighted by exp(-E): Z(E)² / Z(2 E)."""
        return (2 * self._tilt(1.0)[1] - self._tilt(0.5)[1]).exp().item()

    def _tilt(self, alpha: float) -> tuple[GaussianMixture, Tensor]:
        dim = len(self.slope)
        flat = torch.zeros(dim, dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
        return self.prior.tilt_quadratic(*flat, self.slope / alpha)


@cache
def held_out(dim: int, seed: int = 0) -> HeldOut:
    """The mixture of ``dim`` dimensions: random means and weights, and a slope that leaves a tenth of the prior effective."""
    generator = torch.Generator().manual_seed(1000 * seed + dim)
    means = math.sqrt(MEAN_VARIANCE) * torch.randn(COMPONENTS, dim, generator=generator, dtype=torch.float64)
    weights = 0.5 + torch.rand(COMPONENTS, generator=generator, dtype=torch.float64)
    covariances = (STD**2 * torch.eye(dim, dtype=torch.float64)).expand(COMPONENTS, dim, dim)
    prior = GaussianMixture(weights / weights.sum(), means, covariances)
    direction = torch.randn(dim, generator=generator, dtype=torch.float64)
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if HeldOut(prior, middle * direction).prior_ess > PRIOR_ESS else (low, middle)
    return HeldOut(prior, low * direction)


def scaled(mixture: GaussianMixture, factor: float) -> GaussianMixture:
    """The same components, ``factor`` times as wide."""
    return GaussianMixture(mixture.weights, mixture.means, mixture.covariances * factor**2)


def reweighted(mixture: GaussianMixture, weights: Tensor) -> GaussianMixture:
    """The same components with other weights, which need not sum to 1."""
    return GaussianMixture(weights / weights.sum(), mixture.means, mixture.covariances)


def lightest_lost(truth: GaussianMixture) -> GaussianMixture:
    """The mixture without the lightest component whose loss is a total variation of .1 or more: the hardest to miss."""
    for lost in truth.weights.argsort().tolist():
        weights = truth.weights.clone()
        weights[lost] = 1e-12
        if total_variation(truth, reweighted(truth, weights)) >= 0.1:
            return reweighted(truth, weights)
    raise AssertionError("no component of this mixture matters")


def planted(task: HeldOut) -> dict[str, GaussianMixture]:
    """What each sampler aims at; the first is the truth. All others are off by a total variation of .1 and more."""
    truth = task.target()
    width = 1 + 0.6 / math.sqrt(len(task.slope))  # what it does to the law grows with the dimension
    return {
        "exact denoiser": truth,
        "a component lost": lightest_lost(truth),
        "component weights to the power 2": reweighted(truth, truth.weights**2),
        "alpha 1.5 times too large": task.target(alpha=1.5),
        "components too narrow": scaled(truth, 1 / width),
        "components too wide": scaled(truth, width),
        "the prior": task.prior,
    }


def total_variation(truth: GaussianMixture, other: GaussianMixture, count: int = 20_000) -> float:
    """Between two mixtures, E_truth[(1 - other/truth)₊] over ``count`` samples."""
    x = truth.sample(count, torch.Generator().manual_seed(0))
    return (1 - (other.log_density(x) - truth.log_density(x)).exp()).clamp(min=0).mean().item()


def certificate(task: HeldOut, sampler: GaussianMixture, size: int, noise: float, generator: torch.Generator) -> Evidence:
    """Fresh evidence of ``size`` exact samples a side, the policy's from ``sampler``, without any chain.

    A path is a sample and one normal number z, N(0, 1) under the policy and N(noise, 1) under the target, so that log r =
    log target(x)/sampler(x) + noise · z - noise²/2. The latter part stands for what the steps of a chain add to the log-ratio of
    a sampler whose samples are right; the effective share of an exact sampler is exp(-noise²).
    """
    mine, theirs = sampler.sample(size, generator), task.prior.sample(size, generator)
    z = torch.randn(2, size, generator=generator, dtype=torch.float64)
    z[1] += noise  # weighted by exp(-E), prior paths are the target's

    def log_ratio(x: Tensor, z: Tensor) -> Tensor:
        return (sampler.log_density(x) - task.prior.log_density(x) - (noise * z - 0.5 * noise**2)).float()

    first = mine.float(), task.energy(mine).float(), log_ratio(mine, z[0])
    second = theirs.float(), task.energy(theirs).float(), log_ratio(theirs, z[1])
    return Evidence(1.0, *first, *second, torch.zeros(1), None, 2 * size)


def rollouts(task: HeldOut, sampler: GaussianMixture, size: int) -> Evidence:
    """``size`` rollouts a side of a real chain, the exact denoiser of ``sampler`` as policy on that of the prior."""
    from tiltune.samplers.prior import Prior
    from toys.gaussian_images import build_chain

    chain = build_chain()
    prior = Prior(MixtureDenoiser(task.prior, chain), chain, (len(task.slope),))
    policy = MixtureDenoiser(sampler, chain)
    return gather_evidence(prior, policy, task.energy, 1.0, torch.Generator().manual_seed(0), size=size, starts=8)
