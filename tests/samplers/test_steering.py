"""Importance resampling against closed forms: right with its weights, wrong without."""

import math

import pytest
import torch
from scipy import stats
from torch import nn

from tiltune.samplers.policy import Policy
from tiltune.samplers.prior import Prior
from tiltune.samplers.resampling import importance_resample, systematic
from tiltune.samplers.schedulers.brownian import brownian_chain
from tiltune.tasks.gaussian_mixture import GaussianMixture, MixtureDenoiser
from tiltune.tasks.metrics.known_truth import mode_tv
from tiltune.tasks.mixture_chains import build_chain, in_states, shipped_prior
from tiltune.tasks.mixture_target import energy, target_mixture
from toys.linear_gaussian import LinearDenoiser, LinearGaussian


class AsModule(nn.Module):
    """A closed-form denoiser where a policy wants a module."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, state, timestep, condition=None):
        return self.denoiser(state, timestep, condition)


def half_way(task):
    """A policy that goes half of the optimal policy's way from the prior."""
    (slope, start), end = task.output, task.policy().offset
    return Policy(task.prior(), AsModule(LinearDenoiser(task.chain, slope, 0.5 * (start + end))))


@pytest.fixture(scope="module")
def linear():
    return LinearGaussian(
        brownian_chain(12),
        mean=torch.tensor([0.5, -1.0], dtype=torch.float64),
        slope=torch.tensor([1.2, -0.6], dtype=torch.float64),
        variance=1.8,
        alpha=0.8,
    )


@pytest.fixture(scope="module")
def drawn(linear):
    generator = torch.Generator().manual_seed(0)
    potential = lambda x: -linear.energy(x) / linear.alpha  # noqa: E731
    return importance_resample(half_way(linear), potential, 2000, generator, proposals=20_000, batch=4096)


def tilted_law(task):
    """(mean [D], standard deviation) of the chain's tilted marginal: the chain is linear, and a linear tilt moves its mean."""
    factor, shift = task.kernel
    mean, variance = torch.zeros(2, dtype=torch.float64), 0.0
    for k in range(task.chain.num_steps):
        mean, variance = factor[k] * mean + shift[k], factor[k] ** 2 * variance + task.chain.sigma[k] ** 2
    return mean - variance * task.slope / task.alpha, math.sqrt(variance)


def ks_p(samples, mean, std):
    return min(stats.kstest(samples[:, axis].numpy(), "norm", (mean[axis].item(), std)).pvalue for axis in range(2))


def test_the_linear_gaussian_posterior_is_recovered(linear, drawn):
    """2000 samples of about 5000 effective proposals are near independent: Kolmogorov-Smirnov, p > .01 on both axes."""
    mean, std = tilted_law(linear)
    assert ks_p(drawn.samples, mean, std) > 0.01
    assert drawn.samples.mean(0).numpy() == pytest.approx(mean.numpy(), abs=4 * std / math.sqrt(2000))


def test_the_same_proposals_without_weights_are_not(linear):
    mean, std = tilted_law(linear)
    assert ks_p(half_way(linear).sample(2000), mean, std) < 1e-20


def test_the_weights_estimate_log_z(linear, drawn):
    """The mean weight is Z, whatever the policy: within 4 standard errors of the closed form."""
    value = drawn.log_weight.double().logsumexp(0).item() - math.log(len(drawn.log_weight))
    error = math.sqrt(1 / drawn.ess - 1 / len(drawn.log_weight))
    assert abs(value - linear.log_z) < 4 * error < 0.05


def test_effective_number_and_copies(drawn):
    weight = drawn.log_weight.double().softmax(0)
    assert drawn.ess == pytest.approx(1 / (weight**2).sum().item())
    assert 3000 < drawn.ess < 20_000
    assert drawn.largest_weight == pytest.approx(weight.max().item())
    assert drawn.unique == len(set(map(tuple, drawn.samples.tolist())))
    # A proposal comes more than once only where 2000 times its weight exceeds 1.
    assert drawn.unique >= 2000 - int((2000 * weight).ceil().clamp(min=1).sub(1).sum())


def test_wrong_mode_weights_are_set_right():
    """The policy draws nine modes evenly; the target weighs them 4 to 15. 2000 of 5000: the chain itself is .013 from the
    ideal weights, sampling adds about .03; without weights the total variation is that of the two sets of weights, .28."""
    truth = target_mixture()
    even = GaussianMixture(torch.full((9,), 1 / 9, dtype=torch.float64), truth.means, truth.covariances)
    prior = shipped_prior("ddpm", build_chain("ddpm"))
    policy = Policy(prior, AsModule(MixtureDenoiser(in_states(even, "ddpm"), prior.chain)))
    generator = torch.Generator().manual_seed(0)
    drawn = importance_resample(policy, lambda x: -energy(x), 2000, generator, proposals=5000, batch=2500)
    assert mode_tv(drawn.samples, truth) < 0.06
    assert mode_tv(policy.sample(2000, batch=2000), truth) > 0.2


def test_a_prior_without_a_tilt_comes_back_as_it_is(linear):
    prior = linear.prior()
    policy = Policy(prior, AsModule(prior.denoiser))
    steps = []
    drawn = importance_resample(
        policy, lambda x: torch.zeros(len(x)), 100, torch.Generator(), proposals=100, batch=32, on_progress=steps.append
    )
    assert torch.equal(drawn.log_weight, torch.zeros(100))
    assert drawn.unique == 100 and drawn.ess == pytest.approx(100)
    assert steps == [32, 32, 32, 4]


def test_batches_follow_the_size_of_the_states():
    class Silent(nn.Module):
        def forward(self, state, timestep, condition=None):
            return 0 * state

    for shape, expected in (((1, 256, 128), [2, 1]), ((2,), [3])):
        policy, steps = Policy(Prior(Silent(), brownian_chain(2), shape), Silent()), []
        potential = lambda x: torch.zeros(len(x))  # noqa: E731
        importance_resample(policy, potential, 1, torch.Generator(), proposals=3, on_progress=steps.append)
        assert steps == expected


def test_systematic_copies_are_floor_or_ceil_and_zero_weights_never_come():
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(50, generator=generator, dtype=torch.float64)
    weight[[0, 17, 49]] = 0
    for count in (7, 50, 1000):
        copies = torch.bincount(systematic(weight, count, generator), minlength=50)
        expected = count * weight / weight.sum()
        assert ((copies == expected.floor()) | (copies == expected.ceil())).all()
        assert copies[[0, 17, 49]].eq(0).all() and copies.sum() == count


def test_any_part_of_the_samples_is_a_draw():
    """Systematic draws come sorted; in random order the first tenth has the mean index of all, 499.5 ± 29."""
    index = systematic(torch.ones(1000), 1000, torch.Generator().manual_seed(0))
    assert abs(index[:100].double().mean() - 499.5) < 4 * 29


def test_nan_is_zero_density(linear):
    def potential(x):
        return torch.where(x[:, 0] > 0, torch.nan, 0.0)

    drawn = importance_resample(half_way(linear), potential, 50, torch.Generator().manual_seed(0), proposals=400)
    assert (drawn.samples[:, 0] <= 0).all()


@pytest.mark.parametrize(
    ("potential", "count", "message"),
    [
        (lambda x: torch.zeros(len(x)), 101, "at least as many proposals"),
        (lambda x: torch.zeros(len(x)), 0, "at least one sample"),
        (lambda x: torch.full((len(x),), -math.inf), 10, "none of 100 proposals"),
        (lambda x: torch.full((len(x),), math.inf), 10, "infinite density"),
    ],
)
def test_refusals(linear, potential, count, message):
    with pytest.raises(ValueError, match=message):
        importance_resample(half_way(linear), potential, count, torch.Generator(), proposals=100)
