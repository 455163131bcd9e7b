"""The random mixtures and the energies on them: closed forms against quadrature, Monte Carlo and automatic differentiation.

Every statistical bound is 4.5 standard errors, a false alarm in 150,000.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tiltune.finetune.estimators import log_mean_exp
from tiltune.tasks.gaussian_mixture import GaussianMixture
from tiltune.tasks.random_mixture import random_mixture
from tiltune.tasks.tilts import Kind, linear, mixture, quadratic, tilt

KINDS: tuple[Kind, ...] = ("linear", "quadratic", "mixture")


@pytest.mark.parametrize("dim", [1, 2, 10, 100])
def test_a_random_mixture_has_mean_0_and_variance_1_in_every_coordinate(dim: int) -> None:
    mean, covariance = random_mixture(dim, 3).moments()
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)
    torch.testing.assert_close(covariance.diagonal(), torch.ones_like(mean), rtol=1e-12, atol=0)
    assert not torch.equal(random_mixture(dim, 3).means, random_mixture(dim, 4).means)


@pytest.mark.parametrize(("kind", "ess"), [*((kind, ess) for kind in KINDS for ess in (0.2, 0.003)), ("linear", 1e-6)])
def test_log_z_and_the_effective_share_are_those_of_quadrature_on_a_line(kind: Kind, ess: float) -> None:
    own = tilt(kind, 1, ess, 0)
    x = torch.linspace(-14, 14, 280_001, dtype=torch.float64)[:, None]
    log_prior, energy = random_mixture(1).log_density(x), own.energy(x)
    step = math.log(28 / 280_000)
    log_z, log_z_of_twice = ((log_prior - times * energy).logsumexp(0).item() + step for times in (1, 2))
    assert own.target(1.0)[1].item() == pytest.approx(log_z, abs=1e-6)
    assert 2 * log_z - log_z_of_twice == pytest.approx(math.log(ess), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 2, 10, 50])
def test_the_target_is_the_tilted_prior_at_every_point(kind: Kind, dim: int) -> None:
    for alpha in (1.0,) if kind == "mixture" else (1.0, 0.3):
        own = tilt(kind, dim, 1e-4, 1)
        target, log_z = own.target(alpha)
        x = torch.cat([side.sample(50, torch.Generator().manual_seed(0)) for side in (target, random_mixture(dim, 1))])
        tilted = random_mixture(dim, 1).log_density(x) - own.energy(x) / alpha - log_z
        torch.testing.assert_close(target.log_density(x), tilted, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_log_z_and_component_shares_by_weighted_prior_samples(kind: Kind) -> None:
    own = tilt(kind, 10, 0.2, 0)
    target, log_z = own.target(1.0)
    x = random_mixture(10).sample(40_000, torch.Generator().manual_seed(1))
    found, error = log_mean_exp(-own.energy(x))
    assert abs(found - log_z.item()) < 4.5 * error
    weight = (-own.energy(x)).softmax(0)
    share = target.responsibilities(x)
    errors = (weight[:, None].square() * (share - target.weights) ** 2).sum(0).sqrt()
    heavy = target.weights > 0.01
    assert ((weight @ share - target.weights).abs() < 4.5 * errors)[heavy].all()
    # A target at another temperature is told apart.
    assert kind == "mixture" or abs(found - own.target(1.1)[1].item()) > 4.5 * error


def noised_log_density(law: GaussianMixture, state: Tensor, signal: float, noise: float) -> Tensor:
    eye = torch.eye(state.shape[1], dtype=torch.float64)
    return GaussianMixture(law.weights, signal * law.means, signal**2 * law.covariances + noise**2 * eye).log_density(state)


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("dim", [1, 3, 10])
def test_the_exact_denoiser_is_the_gradient_of_the_log_density(kind: Kind | None, dim: int) -> None:
    """Tweedie: signal E[x | s] = s + noise² grad log q(s); isotropic components (the prior) and others (quadratic) alike."""
    law = random_mixture(dim) if kind is None else tilt(kind, dim, 0.01, 0).target(1.0)[0]
    for signal, noise in ((0.9, math.sqrt(0.19)), (0.3, math.sqrt(0.91)), (0.999, 0.04)):
        state = signal * law.sample(40, torch.Generator().manual_seed(2))
        state = (
            state + noise * torch.randn(40, dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        ).requires_grad_()
        [gradient] = torch.autograd.grad(noised_log_density(law, state, signal, noise).sum(), state)
        clean = law.denoise(state.detach(), *torch.tensor([signal, noise], dtype=torch.float64))
        torch.testing.assert_close(clean, (state.detach() + noise**2 * gradient) / signal, rtol=1e-8, atol=1e-9)


def test_energies_learn_their_dimension_from_the_samples_and_refuse_what_is_none() -> None:
    for make in (linear, quadratic, mixture):
        assert make(0.1, seed=2)(torch.zeros(3, 4)).shape == (3,)
        for wrong in (0.0, 1.0, 2, -0.1, "x"):
            with pytest.raises(ValueError, match="the share of the prior that stays effective"):
                make(wrong)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="seed is -1"):
            make(0.1, seed=-1)
    with pytest.raises(ValueError, match="has its closed form at 1 alone"):
        mixture(0.1).at(2).target(0.5)
