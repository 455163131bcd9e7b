"""The difference form of the log-ratio: the same number as two log-densities, without their float32 error."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.distributions import Normal

from tiltune.samplers.chain import Chain
from tiltune.samplers.condition import Condition, ConditionTable
from tiltune.samplers.inflated import inflated_rollout
from tiltune.samplers.log_ratio import rows_of, step_log_ratio
from tiltune.samplers.prior import Prior
from tiltune.samplers.rollout import draw_start, rollout
from tiltune.samplers.schedulers.brownian import brownian_chain
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler


class Toy:
    """A cheap, smooth, nonlinear denoiser; ``push`` moves it away from the prior's."""

    def __init__(self, push: float = 0.0) -> None:
        self.push = push

    def __call__(self, state: Tensor, timestep: Tensor, condition: Condition | None = None) -> Tensor:
        t = timestep.reshape(-1, *[1] * (state.ndim - 1)) / 1000
        return torch.tanh(state) * (1 - t) + self.push * torch.cos(3 * state + t)


CHAINS = {
    "ddpm": lambda: chain_from_scheduler(DDPMScheduler(clip_sample=False), 12),
    "ddpm clip": lambda: chain_from_scheduler(DDPMScheduler(clip_sample=True), 12),
    "flow": lambda: chain_from_scheduler(FlowMatchEulerDiscreteScheduler(), 12),
    "brownian": lambda: brownian_chain(12),
}
KERNEL = brownian_chain(1).kernel


def densities(chain: Chain, states: Tensor, denoiser: Toy) -> Tensor:
    """log-density of every kernel by torch.distributions, float64: [num_kernels, B]."""
    rows = []
    for k in range(chain.num_kernels):
        mean = chain.kernel.mean(states[k], k, denoiser(states[k], chain.timestep(k, states)))
        rows.append(Normal(mean, chain.sigma[k]).log_prob(states[k + 1]).flatten(1).sum(1))
    return torch.stack(rows)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("behavior", ["policy", "prior", "compared", "inflated"])
def test_log_ratio_is_the_difference_of_log_densities(name: str, behavior: str) -> None:
    chain, policy = CHAINS[name](), Toy(0.3)
    prior = Prior(Toy(), chain, (2, 3))
    generator = torch.Generator().manual_seed(0)
    start = draw_start(prior, 32, generator, torch.float64)
    if behavior == "inflated":
        drawn = inflated_rollout(prior, policy, 32, generator, 2.0, start=start)
    elif behavior == "compared":
        drawn = rollout(prior, policy, 32, generator, drawn_by="prior", start=start)
        own = torch.Generator().manual_seed(0)
        alone = rollout(prior, None, 32, own, start=draw_start(prior, 32, own, torch.float64))
        assert torch.equal(drawn.states, alone.states)  # the policy has no part in them
    else:
        drawn = rollout(prior, None if behavior == "prior" else policy, 32, generator, start=start)
    expected = densities(chain, drawn.states, policy) - densities(chain, drawn.states, Toy())
    ratio = step_log_ratio(chain, Toy(), policy, drawn)
    assert ratio.shape == (chain.num_kernels, 32)
    torch.testing.assert_close(ratio, expected, rtol=1e-9, atol=1e-9)
    if drawn.step_log_ratio is not None:  # from the noise that was drawn
        torch.testing.assert_close(drawn.step_log_ratio, expected, rtol=1e-9, atol=1e-9)


def test_noise_form_is_state_form() -> None:
    """z = eps + delta."""
    noise, shift = torch.randn(2, 16, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(KERNEL.log_ratio_from_noise(noise, shift), KERNEL.log_ratio_from_states(noise + shift, shift))


def test_log_ratio_is_a_sum_not_a_mean() -> None:
    """Copying every coordinate n times multiplies the log-ratio by n."""
    z, shift = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    once, often = KERNEL.log_ratio_from_states(z, shift), KERNEL.log_ratio_from_states(z.repeat(1, 7), shift.repeat(1, 7))
    torch.testing.assert_close(often, 7 * once)
    by_hand = Normal(shift, 1.0).log_prob(z).sum(1) - Normal(torch.zeros(()).double(), 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(once, by_hand)


def test_log_ratio_does_not_depend_on_the_chunk() -> None:
    chain = CHAINS["ddpm"]()
    prior, generator = Prior(Toy(), chain, (3,)), torch.Generator().manual_seed(0)
    drawn = rollout(prior, None, 32, generator, start=draw_start(prior, 32, generator, torch.float64))
    whole = step_log_ratio(chain, Toy(), Toy(0.2), drawn)
    torch.testing.assert_close(step_log_ratio(chain, Toy(), Toy(0.2), drawn, chunk=7), whole, rtol=1e-12, atol=1e-12)


TABLE = ConditionTable(tuple("abcde"))


def test_rows_pair_each_state_with_its_successor_step_and_condition() -> None:
    chain = CHAINS["ddpm"]()
    drawn = rollout(
        Prior(Toy(), chain, (3,)),
        None,
        5,
        torch.Generator().manual_seed(0),
        condition=Condition(TABLE, torch.tensor([4, 3, 2, 1, 0])),
    )
    state, following, step, condition = rows_of(drawn, chain, slice(7, 23))
    assert condition is not None
    for n, flat in enumerate(range(7, 23)):
        k, b = divmod(flat, 5)
        assert torch.equal(state[n], drawn.states[k, b])
        assert torch.equal(following[n], drawn.states[k + 1, b])
        assert (step[n], condition.group[n]) == (k, 4 - b)


def test_expected_log_ratio_under_the_policy_is_a_kl() -> None:
    """E_policy[exp(-Λ)] = 1: the policy's density ratio integrates to one. 20000 rollouts, |z| < 4 (p = 6e-5)."""
    chain = brownian_chain(5)
    prior, generator = Prior(Toy(), chain, (2,)), torch.Generator().manual_seed(0)
    drawn = rollout(prior, Toy(1.5), 20_000, generator, start=draw_start(prior, 20_000, generator, torch.float64))
    assert drawn.step_log_ratio is not None
    weight = (-drawn.step_log_ratio.sum(0)).exp()
    assert abs(weight.mean() - 1) < 4 * weight.std() / 20_000**0.5
    assert drawn.step_log_ratio.sum(0).mean() > 0.1


class Linear:
    """out = w s + push, one multiplication a coordinate: the cheapest denoiser of 16384 dimensions."""

    def __init__(self, push: Tensor) -> None:
        self.weight, self.push = torch.linspace(0.1, 0.9, 16384), push

    def __call__(self, state: Tensor, timestep: Tensor, condition: Condition | None = None) -> Tensor:
        return self.weight.to(state) * state + self.push.to(state)


def test_float32_error_at_16384_dimensions_and_1000_steps() -> None:
    """≤ 1e-5 nats from drawn noise and from stored states, |Λ| ≤ 10, beside float64 on the same float32 states and outputs.

    Control: subtracting two float32 log-densities misses by more than 1e-2 nats.
    """
    dim, batch = 16384, 2
    chain = chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", clip_sample=False), 1000)
    generator = torch.Generator().manual_seed(0)
    still, moved = Linear(torch.zeros(dim)), Linear(0.008 * torch.randn(dim, generator=generator))
    drawn = rollout(Prior(still, chain, (dim,)), moved, batch, torch.Generator().manual_seed(1))
    assert drawn.step_log_ratio is not None
    assert drawn.states.dtype == torch.float32
    from_noise = drawn.step_log_ratio.sum(0)
    from_states = step_log_ratio(chain, still, moved, drawn, chunk=64).sum(0)

    replay = torch.Generator().manual_seed(1)  # the noise that the rollout drew, in its order
    torch.randn(batch, dim, generator=replay)
    exact_noise, exact_states = torch.zeros(2, batch, dtype=torch.float64)
    subtracted = torch.zeros(batch)
    for k in range(chain.num_kernels):
        state, following = drawn.states[k], drawn.states[k + 1]
        outputs = [denoiser(state, chain.timestep(k, state)) for denoiser in (still, moved)]
        means = [chain.kernel.mean(state.double(), k, output.double()) for output in outputs]
        sigma = chain.sigma[k]
        shift = (means[1] - means[0]) / sigma
        noise = torch.randn(batch, dim, generator=replay).double()
        exact_noise = exact_noise + (noise * shift + 0.5 * shift**2).sum(1)
        z = (following.double() - means[0]) / sigma
        exact_states = exact_states + (z * shift - 0.5 * shift**2).sum(1)
        logs = [
            Normal(chain.kernel.mean(state, k, output), sigma.float(), validate_args=False).log_prob(following).sum(1)
            for output in outputs
        ]
        subtracted = subtracted + (logs[1] - logs[0])
    assert 1 < exact_noise.abs().max() <= 10
    assert (from_noise - exact_noise).abs().max() <= 1e-5
    assert (from_states - exact_states).abs().max() <= 1e-5
    assert (subtracted - exact_states).abs().max() > 1e-2
