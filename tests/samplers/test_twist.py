"""Twisted proposals: weights stay right whatever the value is, and more of them count where it is good."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from tiltune.finetune.estimators import log_mean_exp
from tiltune.samplers.chain import Chain
from tiltune.samplers.denoiser import ResidualDenoiser
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.policy import Policy
from tiltune.samplers.prior import Prior
from tiltune.samplers.resample_move import move
from tiltune.samplers.resampling import importance_resample
from tiltune.samplers.rollout import rollout
from tiltune.samplers.schedulers.brownian import brownian_chain
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler
from tiltune.samplers.trained_steps import with_trained_steps
from tiltune.samplers.twist import Twist, strength_of
from toys.linear_gaussian import LinearGaussian

VP = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}
CHAINS = {
    "ddpm": lambda: chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", **VP), 6),
    "ddim, eta .5": lambda: chain_from_scheduler(DDIMScheduler(**VP), 6, eta=0.5),
    "brownian": lambda: brownian_chain(6),
    "trained window": lambda: with_trained_steps(chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", **VP), 6), 2, 4),
}


def problem(chain: Chain) -> LinearGaussian:
    return LinearGaussian(chain, torch.zeros(2, dtype=torch.float64), torch.tensor([1.2, -0.8], dtype=torch.float64))


def crooked(state: Tensor, timestep: Tensor, condition: object = None) -> Tensor:
    return 0.6 * torch.tanh(1.3 * state.roll(1, 1)) + 0.1 * state


def crooked_policy(prior: Prior) -> Policy:
    """Somewhere beside prior and target."""
    torch.manual_seed(0)
    network = MLPDenoiser(width=16, depth=1, fourier_features=4)
    torch.nn.init.normal_(network.outward.weight, std=0.05)
    return Policy(prior, ResidualDenoiser(prior.denoiser, network))


def wrong(state: Tensor, k: int) -> Tensor:
    """A value that has nothing to do with the target."""
    return 2 * torch.sin(3 * state[:, 0] + k) + state[:, 1]


def exact(task: LinearGaussian) -> Any:
    slope, offset = task.soft_value
    return lambda state, k: (state.double() @ slope[k] + offset[k]).float()


def weights(task: LinearGaussian, twist: Twist, strength: float, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(log-weights, those that leave out how the candidates were chosen, noise)."""
    policy = crooked_policy(task.prior())
    drawn, noise = twist.rollout(policy, strength, count, torch.Generator().manual_seed(seed), keep=False)
    assert drawn.log_behavior is not None and drawn.step_log_ratio is not None
    potential = -task.energy(policy.prior.to_data(drawn.terminal)) / task.alpha
    return (potential - drawn.log_behavior).double(), (potential - drawn.step_log_ratio.sum(0)).double(), noise


@pytest.mark.parametrize("name", CHAINS)
def test_the_weights_are_right_whatever_the_value_is(name: str) -> None:
    """The mean weight is that of 200,000 prior paths, by a wrong value and a strong one: within 4 standard errors of 20,000
    (p < 1e-4). Without the factor of the choice it is not."""
    chain = CHAINS[name]()
    prior, slope = Prior(crooked, chain, (2,)), torch.tensor([1.2, -0.8])
    generator = torch.Generator().manual_seed(0)
    ends = torch.cat([rollout(prior, None, 20_000, generator, keep=False).terminal for _ in range(10)])
    slope /= (ends @ slope).std()
    log_z, error = log_mean_exp(-(ends @ slope))
    misses = list[float]()
    for seed, value in enumerate((lambda state, k: -(state @ slope), wrong)):
        policy = crooked_policy(prior)
        drawn, _ = Twist(value, 5).rollout(policy, 0.8, 20_000, torch.Generator().manual_seed(seed), keep=False)
        assert drawn.log_behavior is not None and drawn.step_log_ratio is not None
        potential = -(drawn.terminal @ slope)
        right, own = log_mean_exp(potential - drawn.log_behavior)
        assert abs(right - log_z) < 4 * math.hypot(error, own)
        misses.append(abs(log_mean_exp(potential - drawn.step_log_ratio.sum(0))[0] - log_z) / math.hypot(error, own))
    assert max(misses) > 8


def test_strength_zero_is_the_policy_and_its_noise_has_no_mean() -> None:
    task = problem(CHAINS["ddpm"]())
    right, without, noise = weights(task, Twist(wrong, 3), 0.0, 20_000, 0)
    torch.testing.assert_close(right, without)
    assert abs(noise.mean()) < 4 * noise.std() / math.sqrt(20_000)


def test_the_strength_is_one_for_an_exact_value_and_nothing_for_a_wrong_one() -> None:
    """With the exact value the regression's slope is 1 as the candidates grow, and more proposals count. A wrong value is not
    followed."""
    task = problem(CHAINS["ddpm"]())
    plain, _, noise = weights(task, Twist(exact(task), 32), 0.0, 2000, 0)
    assert strength_of(plain, noise) > 0.9
    chosen, _, _ = weights(task, Twist(exact(task), 32), 1.0, 2000, 1)
    assert chosen.std() < 0.4 * plain.std()
    plain, _, noise = weights(task, Twist(wrong, 32), 0.0, 2000, 0)
    assert strength_of(plain, noise) < 0.2  # not 0: its noise holds the step log-ratios too
    chosen, _, _ = weights(task, Twist(wrong, 32), 1.0, 2000, 1)
    assert chosen.std() > 1.1 * plain.std()


def test_the_strength_of_nothing_known_is_zero() -> None:
    """Proposals of zero density, and one far outlier, have no part in it."""
    noise = torch.linspace(-1, 1, 50)
    assert strength_of(torch.full((50,), -math.inf), noise) == 0
    assert strength_of(torch.zeros(50), torch.zeros(50)) == 0
    weight = 0.5 * noise
    weight[0], weight[1] = -math.inf, -1e6
    assert strength_of(weight, noise) == pytest.approx(0.5)


def test_resampled_with_a_twist_and_moved_on() -> None:
    """A pilot of the policy alone, then the measured strength; every chosen proposal is found again by its part's noise."""
    task = problem(CHAINS["ddpm"]())
    policy, generator = crooked_policy(task.prior()), torch.Generator().manual_seed(0)
    potential = lambda x: -task.energy(x)  # noqa: E731
    counted: list[int] = []
    twist = Twist(exact(task), 8)
    drawn = importance_resample(
        policy, potential, 400, generator, proposals=1600, batch=300, twist=twist, on_progress=counted.append
    )
    assert counted == [200, 300, 300, 300, 300, 200] and [part.first for part in drawn.parts] == [0, 200, 500, 800, 1100, 1400]
    assert drawn.parts[0].strength == 0 and drawn.strength == drawn.parts[1].strength > 0.8
    plain = importance_resample(policy, potential, 400, generator, proposals=1600, batch=300)
    assert plain.strength is None and drawn.ess > 1.2 * plain.ess
    samples, moved = move(policy, potential, drawn, generator, 0)
    torch.testing.assert_close(samples, drawn.samples, rtol=0, atol=1e-5)
    assert not moved.any()


def test_one_candidate_is_no_choice() -> None:
    with pytest.raises(ValueError, match="2 or more"):
        Twist(wrong, 1)
