"""Energies on the random mixtures, whose tilted law is a mixture in closed form. Each is made as sharp as is asked for.

``ess`` says how sharp: the effective share of prior samples weighted by exp(-E), Z(E)² / Z(2E), which is found by bisection.
An energy learns its dimension from the samples it is given; ``seed`` must be that of the prior.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from .gaussian_mixture import GaussianMixture
from .random_mixture import STD, random_mixture

REWARD_COMPONENTS = 3
LEAST_ESS = 1e-12  # the bisection is in float64

Kind = Literal["linear", "quadratic", "mixture"]


@dataclass(frozen=True, eq=False)
class Tilt:
    """An energy at one dimension, E(x) = scale-free parts times what the bisection found.

    energy: x [N, D] → [N] nats. target: alpha → (the tilted mixture, log Z), exact.
    """

    energy: Callable[[Tensor], Tensor]
    target: Callable[[float], tuple[GaussianMixture, Tensor]]
    log_ess: float


@dataclass(frozen=True)
class TiltEnergy:
    """An energy of a kind and a sharpness in whatever dimension its samples have; called, x [N, D] → E(x) [N], nats."""

    kind: Kind
    ess: float
    seed: int

    @property
    def __name__(self) -> str:
        return f"{self.kind}(ess={self.ess:g}, seed={self.seed})"

    def at(self, dim: int) -> Tilt:
        """The energy in ``dim`` dimensions."""
        return tilt(self.kind, dim, float(self.ess), self.seed)

    def __call__(self, x: Tensor) -> Tensor:
        return self.at(x.shape[1]).energy(x)


def linear(ess: float = 0.003, seed: int = 0) -> TiltEnergy:
    """E(x) = b · x, with a random b on which two of the components have equal means.

    ess: effective share of prior samples weighted by exp(-E). seed: of the prior.

    Errors: ValueError for a share that is not between 0 and 1.
    """
    return _checked("linear", ess, seed)


def quadratic(ess: float = 0.003, seed: int = 0) -> TiltEnergy:
    """E(x) = ½ (x - a)ᵀ L (x - a) around a point between two components, with a random L; arguments as in `linear`."""
    return _checked("quadratic", ess, seed)


def mixture(ess: float = 0.003, seed: int = 0) -> TiltEnergy:
    """E(x) = -log sum_j v_j exp(-|x - a_j|² / 2 r²) with points in three of the components; ``ess`` sets r.

    Arguments as in `linear`.
    """
    return _checked("mixture", ess, seed)


def _checked(kind: Kind, ess: float, seed: int) -> TiltEnergy:
    if not (isinstance(ess, int | float) and LEAST_ESS <= ess < 1):
        raise ValueError(f"ess is {ess!r}; it is the share of the prior that stays effective, at least {LEAST_ESS:g} and below 1")
    if not (isinstance(seed, int) and seed >= 0):
        raise ValueError(f"seed is {seed!r}; it is the prior's, a whole number from 0 on")
    return TiltEnergy(kind, ess, seed)


@cache
def tilt(kind: Kind, dim: int, ess: float, seed: int) -> Tilt:
    """The energy of this kind that leaves the share ``ess`` of the prior effective."""
    make = {"linear": _linear, "quadratic": _quadratic, "mixture": _mixture}[kind]
    prior = random_mixture(dim, seed)
    generator = torch.Generator().manual_seed(2**29 + 1_000_003 * dim + seed)
    family = make(prior, generator)
    low, high = -20.0, 0.0  # of the logarithm of the sharpness
    while family(math.exp(high)).log_ess > math.log(ess):
        low, high = high, high + 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if family(math.exp(middle)).log_ess > math.log(ess) else (low, middle)
    return family(math.exp(high))


def _linear(prior: GaussianMixture, generator: torch.Generator) -> Callable[[float], Tilt]:
    dim = prior.means.shape[1]
    first, second = prior.means[:2]
    direction = 0.5 * _unit(torch.randn(dim, generator=generator, dtype=torch.float64)) - _unit(first + second)
    if dim > 1:
        direction = direction - (direction @ _unit(first - second)) * _unit(first - second)
    flat = torch.zeros(dim, dim, dtype=torch.float64)

    def of(sharpness: float) -> Tilt:
        slope = sharpness * direction
        return _from_quadratic(prior, flat, torch.zeros_like(direction), slope, lambda x: x @ slope.to(x))

    return of


def _quadratic(prior: GaussianMixture, generator: torch.Generator) -> Callable[[float], Tilt]:
    dim = prior.means.shape[1]
    center = prior.means[:2].mean(0) + STD * torch.randn(dim, generator=generator, dtype=torch.float64)
    factor = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / math.sqrt(dim)

    def of(sharpness: float) -> Tilt:
        precision = sharpness * (factor @ factor.T)

        def energy(x: Tensor) -> Tensor:
            return 0.5 * sharpness * ((x - center.to(x)) @ factor.to(x)).square().sum(1)

        return _from_quadratic(prior, precision, center, torch.zeros_like(center), energy)

    return of


def _from_quadratic(
    prior: GaussianMixture, precision: Tensor, center: Tensor, slope: Tensor, energy: Callable[[Tensor], Tensor]
) -> Tilt:
    def target(alpha: float) -> tuple[GaussianMixture, Tensor]:
        return prior.tilt_quadratic(precision / alpha, center, slope / alpha)

    return Tilt(energy, target, (2 * target(1.0)[1] - target(0.5)[1]).item())


def _mixture(prior: GaussianMixture, generator: torch.Generator) -> Callable[[float], Tilt]:
    dim = prior.means.shape[1]
    noise = torch.randn(REWARD_COMPONENTS, dim, generator=generator, dtype=torch.float64)
    points = prior.means[:REWARD_COMPONENTS] + STD * noise
    shares = 0.5 + torch.rand(REWARD_COMPONENTS, generator=generator, dtype=torch.float64)
    shares = shares / shares.sum()

    def of(sharpness: float) -> Tilt:
        variance = 1 / sharpness
        covariances = (variance * torch.eye(dim, dtype=torch.float64)).expand(REWARD_COMPONENTS, dim, dim)
        reward = GaussianMixture(shares, points, covariances)
        peak = 0.5 * dim * math.log(2 * math.pi * variance)  # log of what a normalized component is divided by

        def energy(x: Tensor) -> Tensor:
            distance = torch.cdist(x, points.to(x), compute_mode="donot_use_mm_for_euclid_dist").square()
            return -(shares.log().to(x) - 0.5 * distance / variance).logsumexp(1)

        def target(alpha: float) -> tuple[GaussianMixture, Tensor]:
            if alpha != 1:
                raise ValueError(
                    f"alpha is {alpha:g}: a power of a mixture is none, so mixture(…) has its closed form at 1 alone."
                )
            tilted, log_z = prior.tilt_mixture(reward)
            return tilted, log_z + peak

        squared, log_norm = reward.tilt_mixture(reward)  # the square of a mixture is one again
        log_z_of_twice = prior.tilt_mixture(squared)[1] + log_norm + 2 * peak
        return Tilt(energy, target, (2 * target(1.0)[1] - log_z_of_twice).item())

    return of


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()
