"""The closed forms of Gaussian mixtures at D = 2, 10, 50, and the 25 → 9 mode task that stands on them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from tiltune.samplers.denoiser import evaluate
from tiltune.samplers.prior import Prior
from tiltune.samplers.rollout import rollout
from tiltune.samplers.schedulers.brownian import brownian_chain
from tiltune.tasks import mixture_chains as chains
from tiltune.tasks import mixture_target as task
from tiltune.tasks.gaussian_mixture import GaussianMixture, MixtureDenoiser

DIMS = (2, 10, 50)


def random_mixture(dim: int, count: int, seed: int, spread: float = 1.0) -> GaussianMixture:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(count, generator=generator, dtype=torch.float64) + 0.2
    means = spread * torch.randn(count, dim, generator=generator, dtype=torch.float64)
    factor = torch.randn(count, dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    covariances = factor @ factor.mT + 0.4 * torch.eye(dim, dtype=torch.float64)
    return GaussianMixture(weights / weights.sum(), means, covariances)


def quadratic(dim: int, seed: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """(L, a, b) of E/alpha = ½ (x - a)ᵀ L (x - a) + bᵀx, L not symmetric in the axes and of low rank."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, 2, generator=generator, dtype=torch.float64) / dim**0.5
    center, slope = torch.randn(2, dim, generator=generator, dtype=torch.float64)
    return root @ root.T, center, 0.6 * slope / dim**0.5


def reference(mixture: GaussianMixture, signal: float = 1.0, noise: float = 0.0) -> MixtureSameFamily:
    """The law of signal x + noise eps by torch.distributions."""
    covariances = signal**2 * mixture.covariances + noise**2 * torch.eye(mixture.means.shape[1], dtype=torch.float64)
    return MixtureSameFamily(Categorical(mixture.weights), MultivariateNormal(signal * mixture.means, covariances))


def points(mixture: GaussianMixture, count: int = 256, seed: int = 3) -> Tensor:
    """Samples, and as many points that are none."""
    generator = torch.Generator().manual_seed(seed)
    near = mixture.sample(count, generator)
    return torch.cat([near, near + 2 * torch.randn(near.shape, generator=generator, dtype=torch.float64)])


@pytest.mark.parametrize("dim", DIMS)
def test_log_density_is_that_of_torch(dim: int) -> None:
    mixture = random_mixture(dim, 5, seed=dim)
    x = points(mixture)
    torch.testing.assert_close(mixture.log_density(x), reference(mixture).log_prob(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dim", DIMS)
def test_quadratic_tilt_is_prior_times_exp_minus_energy_over_z(dim: int) -> None:
    mixture, (precision, center, slope) = random_mixture(dim, 4, seed=dim), quadratic(dim)
    tilted, log_z = mixture.tilt_quadratic(precision, center, slope)
    x = points(mixture)
    energy = 0.5 * ((x - center) @ precision * (x - center)).sum(1) + x @ slope
    expected = mixture.log_density(x) - energy - log_z
    torch.testing.assert_close(tilted.log_density(x), expected, rtol=1e-10, atol=1e-10)
    assert tilted.weights.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dim", DIMS)
def test_linear_tilt_needs_no_precision(dim: int) -> None:
    """L = 0: covariances stay, every mean moves by -S b, and log Z is the cumulant generating function at -b."""
    mixture, (_, center, slope) = random_mixture(dim, 4, seed=dim), quadratic(dim)
    tilted, log_z = mixture.tilt_quadratic(torch.zeros(dim, dim, dtype=torch.float64), center, slope)
    torch.testing.assert_close(tilted.covariances, mixture.covariances, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(tilted.means, mixture.means - mixture.covariances @ slope, rtol=1e-9, atol=1e-9)
    cumulants = -mixture.means @ slope + 0.5 * torch.einsum("d,nde,e->n", slope, mixture.covariances, slope)
    assert log_z.item() == pytest.approx((mixture.weights.log() + cumulants).logsumexp(0).item(), abs=1e-10)


@pytest.mark.parametrize("dim", DIMS)
def test_mixture_tilt_is_prior_times_reward_over_z(dim: int) -> None:
    mixture, reward = random_mixture(dim, 4, seed=dim), random_mixture(dim, 3, seed=dim + 1)
    tilted, log_z = mixture.tilt_mixture(reward)
    x = points(mixture)
    expected = mixture.log_density(x) + reference(reward).log_prob(x) - log_z
    torch.testing.assert_close(tilted.log_density(x), expected, rtol=1e-10, atol=1e-10)
    assert len(tilted.weights) == 12


@pytest.mark.parametrize("kind", ["quadratic", "mixture"])
@pytest.mark.parametrize("dim", DIMS)
def test_log_z_agrees_with_monte_carlo(dim: int, kind: str) -> None:
    """log mean exp(-E/alpha) over 50000 prior samples, delta-method standard error; |z| < 4 (p = 6e-5)."""
    mixture = random_mixture(dim, 4, seed=dim, spread=dim**-0.5)
    x = mixture.sample(50_000, torch.Generator().manual_seed(11))
    if kind == "quadratic":
        precision, center, slope = quadratic(dim)
        _, log_z = mixture.tilt_quadratic(precision, center, slope)
        log_weight = -0.5 * ((x - center) @ precision * (x - center)).sum(1) - x @ slope
    else:  # wide, so that the weights of 50 dimensions keep a finite variance
        reward = random_mixture(dim, 3, seed=dim + 1, spread=dim**-0.5)
        reward = GaussianMixture(reward.weights, reward.means, 4 * dim**0.5 * reward.covariances)
        _, log_z = mixture.tilt_mixture(reward)
        log_weight = reward.log_density(x)
    share = log_weight.softmax(0) * len(x)
    error = share.std().item() / len(x) ** 0.5
    assert error < 0.03
    assert abs(log_weight.logsumexp(0).item() - math.log(len(x)) - log_z.item()) < 4 * error


@pytest.mark.parametrize("dim", DIMS)
def test_denoiser_is_tweedies(dim: int) -> None:
    """E[x | s] = (s + noise² ∇ log p(s)) / signal, the gradient by autograd through torch.distributions."""
    mixture = random_mixture(dim, 4, seed=dim)
    generator = torch.Generator().manual_seed(5)
    for signal, noise in ((0.999, 0.05), (0.9, 0.44), (0.4, 0.92), (0.05, 0.999), (1.0, 20.0)):
        x = mixture.sample(64, generator)
        state = signal * x + noise * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        state.requires_grad_()
        (score,) = torch.autograd.grad(reference(mixture, signal, noise).log_prob(state).sum(), state)
        exact = mixture.denoise(state.detach(), torch.tensor(signal), torch.tensor(noise))
        scale = max(1.0, noise**2 / signal)
        torch.testing.assert_close(exact, (state + noise**2 * score).detach() / signal, rtol=1e-6, atol=1e-7 * scale)


def test_denoiser_takes_a_level_for_each_sample() -> None:
    mixture = random_mixture(3, 4, seed=0)
    state = points(mixture, count=4)
    signal, noise = torch.linspace(0.1, 1, 8, dtype=torch.float64), torch.linspace(1, 0.1, 8, dtype=torch.float64)
    together = mixture.denoise(state, signal, noise)
    for n in range(8):
        torch.testing.assert_close(together[n], mixture.denoise(state[n : n + 1], signal[n], noise[n])[0])


@pytest.mark.parametrize("dim", DIMS)
def test_samples_and_moments_agree(dim: int) -> None:
    """Mean and covariance of 40000 samples, 4.5 standard errors over D + D² entries (p < .02 at D = 50)."""
    mixture = random_mixture(dim, 4, seed=dim)
    x = mixture.sample(40_000, torch.Generator().manual_seed(13))
    mean, covariance = mixture.moments()
    centered = x - mean
    assert (centered.mean(0).abs() < 4.5 * (covariance.diagonal() / len(x)).sqrt()).all()
    second = centered.T @ centered / len(x)
    spread = ((centered**2).T @ centered**2 / len(x) - second**2).sqrt()
    assert ((second - covariance).abs() < 4.5 * spread / len(x) ** 0.5).all()


def test_responsibilities_are_bayes() -> None:
    mixture = random_mixture(10, 4, seed=1)
    x = points(mixture, count=16)
    joint = MultivariateNormal(mixture.means, mixture.covariances).log_prob(x[:, None]) + mixture.weights.log()
    torch.testing.assert_close(mixture.responsibilities(x), joint.softmax(1), rtol=1e-9, atol=1e-12)


def test_mixture_denoiser_is_the_exact_clean_sample_of_every_step() -> None:
    """In each parametrisation of the output, also at the pinned start, where nothing is known."""
    mixture = random_mixture(2, 3, seed=0)
    for chain in (brownian_chain(10), chains.build_chain("ddpm", 20), chains.build_chain("flow", 20)):
        prior = Prior(MixtureDenoiser(mixture, chain), chain, (2,))
        for k in (0, 7, chain.num_steps - 1):
            state = torch.zeros(4, 2, dtype=torch.float64)
            if chain.noise[k] > 0:
                state = torch.randn(4, 2, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
            output = evaluate(prior.denoiser, chain, state, k, None)
            clean = chain.kernel.clean(state, k, output)
            expected = mixture.denoise(state, chain.signal[k], chain.noise[k])
            torch.testing.assert_close(clean, expected, rtol=1e-7, atol=1e-7)
            if chain.signal[k] == chain.noise[k] == 0:
                torch.testing.assert_close(clean, mixture.moments()[0].expand(4, 2))
    with pytest.raises(ValueError, match="timestep that its chain does not have"):
        MixtureDenoiser(mixture, brownian_chain(10))(torch.zeros(1, 2), torch.tensor(123.0))


# --- the 25 → 9 mode task ---


def test_the_tasks_energy_is_log_p25_minus_log_p9() -> None:
    prior, target = task.prior_mixture(), task.target_mixture()
    assert (len(prior.weights), len(target.weights)) == (25, 9)
    assert target.weights.sum().item() == pytest.approx(1)
    x = points(prior)
    torch.testing.assert_close(task.energy(x), reference(prior).log_prob(x) - reference(target).log_prob(x))
    # At alpha = 1 the tilted prior is p9 itself, and log Z is 0.
    torch.testing.assert_close(prior.log_density(x) - task.energy(x) - task.ideal_log_z(), target.log_density(x))
    assert task.ideal_log_z() == 0
    assert task.tilt_error(1.0) == 0


def test_the_tasks_log_z_is_zero_by_monte_carlo() -> None:
    """mean exp(-E) over 50000 samples of p25 is 1; |z| < 4 (p = 6e-5)."""
    x = task.prior_mixture().sample(50_000, torch.Generator().manual_seed(2))
    weight = (-task.energy(x)).exp()
    assert abs(weight.mean().item() - 1) < 4 * weight.std().item() / 50_000**0.5


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_at_other_temperatures_the_stated_target_is_nearly_the_tilted_law(alpha: float) -> None:
    """Total variation on a grid; log Z from the mode weights, Σ (1/25) (25 v)^(1/alpha), agrees with the grid's."""
    assert task.tilt_error(alpha) < 1e-3
    share = torch.tensor(list(task.TARGET_MODES.values()), dtype=torch.float64)
    by_modes = ((25 * share / share.sum()) ** (1 / alpha) / 25).sum().log().item()
    assert task.ideal_log_z(alpha) == pytest.approx(by_modes, abs=1e-3)


@pytest.mark.parametrize("name", chains.CHAINS)
def test_shipped_priors_load_and_their_path_is_close_to_the_exact_one(name: str) -> None:
    """KL(exact path | shipped path) in nats, over 2000 rollouts of the exact denoiser on the default chain."""
    chain = chains.build_chain(name)
    prior = chains.shipped_prior(name, chain)
    exact = MixtureDenoiser(chains.in_states(task.prior_mixture(), name), chain)
    drawn = rollout(prior, exact, 2000, torch.Generator().manual_seed(0))
    assert drawn.step_log_ratio is not None
    kl = drawn.step_log_ratio.sum(0).mean().item()
    assert -0.02 < kl < 0.05
    x = prior.to_data(drawn.terminal).double()
    assert (task.prior_mixture().log_density(x) > -12).double().mean() > 0.9


@pytest.mark.parametrize("name", chains.CHAINS)
def test_states_and_data_differ_by_the_tasks_scale(name: str) -> None:
    convert = chains.to_data(name)
    state = torch.ones(1, 2)
    scale = 1.0 if convert is None else convert(state)[0, 0].item()
    assert scale == pytest.approx(chains.SCALE[chains.PROCESS[name]])
    in_states = chains.in_states(task.prior_mixture(), name)
    torch.testing.assert_close(in_states.means * scale, task.prior_mixture().means)
    torch.testing.assert_close(in_states.covariances * scale**2, task.prior_mixture().covariances)


def test_an_unknown_chain_is_refused() -> None:
    with pytest.raises(ValueError, match="the mixture task has ddpm"):
        chains.build_chain("dpm")
