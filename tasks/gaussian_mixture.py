"""Gaussian mixtures with everything in closed form: densities, tilts, and exact denoisers in any dimension."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .exact_denoiser import ExactDenoiser


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """sum_i weights_i N(means_i, covariances_i), float64; weights [n], means [n, D], covariances [n, D, D]."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.covariances)
        return values, vectors

    def component_log_density(self, x: Tensor, signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log [w_i N(x; signal m_i, signal² S_i + noise² I)] [N, n], with the eigen-coordinates behind it.

        x [N, D]; signal, noise [] or [N].
        """
        values, vectors = (part.to(x) for part in self._spectrum)
        signal, noise = signal.reshape(-1, 1, 1).to(x), noise.reshape(-1, 1, 1).to(x)
        centered = x[:, None] - signal * self.means.to(x)
        projected = torch.einsum("Nnd,nde->Nne", centered, vectors)
        # A pinned start has neither signal nor noise: nothing is known there, and nothing may be divided by zero.
        variance = (signal**2 * values + noise**2).clamp(min=1e-12)
        log_density = -0.5 * (projected**2 / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
        return log_density + self.weights.to(x).log(), projected, variance

    def log_density(self, x: Tensor) -> Tensor:
        """[N, D] → [N], nats."""
        one = torch.ones((), dtype=x.dtype)
        return self.component_log_density(x, one, torch.zeros_like(one))[0].logsumexp(-1)

    def denoise(self, state: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """E[x | state] for state = signal x + noise eps: sum_i r_i [m_i + signal S_i (signal² S_i + noise² I)^-1 (.)]."""
        if self._variances is not None:
            return self._denoise_isotropic(state, signal, noise, self._variances.to(state))
        log_density, projected, variance = self.component_log_density(state, signal, noise)
        values, vectors = (part.to(state) for part in self._spectrum)
        gain = signal.reshape(-1, 1, 1).to(state) * values / variance
        component = self.means.to(state) + torch.einsum("Nne,nde->Nnd", gain * projected, vectors)
        return torch.einsum("Nn,Nnd->Nd", log_density.softmax(-1), component)

    @cached_property
    def _variances(self) -> Tensor | None:
        """[n] where each component is isotropic, else None."""
        variances = self.covariances.diagonal(dim1=1, dim2=2)[:, 0]
        isotropic = variances[:, None, None] * torch.eye(self.means.shape[1], dtype=variances.dtype)
        return variances.clone() if torch.equal(isotropic, self.covariances) else None

    def _denoise_isotropic(self, state: Tensor, signal: Tensor, noise: Tensor, variances: Tensor) -> Tensor:
        """`denoise` without the covariances' eigenvectors, which costs a D-th of it."""
        means, dim = self.means.to(state), self.means.shape[1]
        signal, noise = signal.reshape(-1, 1).to(state), noise.reshape(-1, 1).to(state)
        total = (signal**2 * variances + noise**2).clamp(min=1e-12)
        distance = state.square().sum(1, keepdim=True) - 2 * signal * (state @ means.T) + signal**2 * means.square().sum(1)
        share = (self.weights.log().to(state) - 0.5 * (distance / total + dim * total.log())).softmax(-1)
        gain = share * signal * variances / total
        return (share - gain * signal) @ means + gain.sum(1, keepdim=True) * state

    def responsibilities(self, x: Tensor) -> Tensor:
        """Posterior component weights [N, n]."""
        one = torch.ones((), dtype=x.dtype)
        return self.component_log_density(x, one, torch.zeros_like(one))[0].softmax(-1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, D] float64."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        factor = torch.linalg.cholesky(self.covariances)
        return self.means[component] + torch.einsum("Nde,Ne->Nd", factor[component], noise)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D]."""
        mean = self.weights @ self.means
        centered = self.means - mean
        covariance = self.covariances + torch.einsum("nd,ne->nde", centered, centered)
        return mean, torch.einsum("n,nde->de", self.weights, covariance)

    def tilt_quadratic(self, precision: Tensor, center: Tensor, slope: Tensor) -> tuple[GaussianMixture, Tensor]:
        """Tilt by E/alpha = ½ (x - a)ᵀ L (x - a) + bᵀx → (mixture, log Z). L [D, D] may be zero."""
        inverse = torch.linalg.inv(self.covariances)
        covariances = torch.linalg.inv(inverse + precision)
        pull = torch.einsum("nde,ne->nd", inverse, self.means)
        means = torch.einsum("nde,ne->nd", covariances, pull + precision @ center - slope)
        log_c = 0.5 * (torch.logdet(covariances) - torch.logdet(self.covariances))
        log_c = log_c - 0.5 * (self.means * pull).sum(-1) - 0.5 * center @ precision @ center
        log_c = log_c + 0.5 * torch.einsum("nd,nde,ne->n", means, torch.linalg.inv(covariances), means)
        logits = self.weights.log() + log_c
        return GaussianMixture(logits.softmax(0), means, covariances), logits.logsumexp(0)

    def tilt_mixture(self, reward: GaussianMixture) -> tuple[GaussianMixture, Tensor]:
        """Tilt by exp(-E/alpha) = the density of ``reward`` → (mixture of all pairs, log Z)."""
        dim = self.means.shape[1]
        first, second = self.covariances[:, None], reward.covariances[None]
        both = first + second
        gap = self.means[:, None] - reward.means[None]
        solved = torch.linalg.solve(both, gap[..., None])[..., 0]
        log_c = -0.5 * ((gap * solved).sum(-1) + torch.logdet(2 * torch.pi * both))
        logits = self.weights.log()[:, None] + reward.weights.log()[None] + log_c
        covariances = first @ torch.linalg.solve(both, second.expand_as(both))
        means = self.means[:, None] - torch.einsum("ijde,ije->ijd", first.expand_as(both), solved)
        mixture = GaussianMixture(logits.flatten().softmax(0), means.reshape(-1, dim), covariances.reshape(-1, dim, dim))
        return mixture, logits.logsumexp((0, 1))


class MixtureDenoiser(ExactDenoiser):
    """The exact denoiser of a `GaussianMixture` on a chain."""

    law: GaussianMixture
