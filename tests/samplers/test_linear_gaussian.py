"""The exact-zero test of the residual log Z + Λ + E/alpha, and the control that must fail it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from tiltune.samplers.bridge import noise_back
from tiltune.samplers.chain import Chain
from tiltune.samplers.inflated import inflated_rollout
from tiltune.samplers.log_ratio import step_log_ratio
from tiltune.samplers.rollout import draw_start, rollout
from tiltune.samplers.schedulers.brownian import brownian_chain
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler
from tiltune.samplers.trajectory import Trajectories
from toys.linear_gaussian import LinearGaussian

BEHAVIORS = ("policy", "prior", "inflated", "noised back", "arbitrary")


def forgotten(num_steps: int) -> Chain:
    """Each step noises x_hat anew, and the first one starts at signal 0: nothing of s_0 is left. The last kernel, of little
    noise, carries a ratio here too: no policy explains the noise of a step of the prior."""
    chain = chain_from_scheduler(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, shift=3.0), num_steps)
    return replace(chain, trained=tuple(range(num_steps - 1)))


CHAINS = {
    "brownian K=1": lambda: brownian_chain(1),
    "brownian K=5": lambda: brownian_chain(5),
    "brownian K=50": lambda: brownian_chain(50),
    "forgotten start K=5": lambda: forgotten(5),
    "forgotten start K=50": lambda: forgotten(50),
}


def make_task(chain: Chain, dim: int = 3, alpha: float = 0.7) -> LinearGaussian:
    mean = torch.linspace(-1, 2, dim, dtype=torch.float64)
    slope = torch.linspace(1.5, -0.5, dim, dtype=torch.float64)
    return LinearGaussian(chain, mean, slope, variance=1.8, alpha=alpha)


def draw(task: LinearGaussian, behavior: str, count: int = 64, seed: int = 0) -> Trajectories:
    generator = torch.Generator().manual_seed(seed)
    prior = task.prior()
    if behavior == "noised back":
        samples = 3 * torch.randn(count, len(task.mean), generator=generator, dtype=torch.float64)
        return noise_back(prior, samples, generator)
    policy = None if behavior == "prior" else task.policy()
    start = draw_start(prior, count, generator, torch.float64)
    if behavior == "inflated":
        return inflated_rollout(prior, task.policy(), count, generator, 1.7, start=start)
    drawn = rollout(prior, policy, count, generator, start=start)
    if behavior == "arbitrary":  # no sampler's states: kicks of 5 sigma, shared by the batch; start and decoder are kept
        inner = drawn.states[1 : task.chain.num_kernels + 1]
        sigma = task.chain.sigma[: task.chain.num_kernels, None, None]
        inner += 5 * sigma * torch.randn(len(inner), 1, inner.shape[-1], generator=generator, dtype=torch.float64)
        if task.chain.prior_last_steps:
            last = task.chain.num_steps - 1
            label = task.chain.timestep(last, inner)
            drawn.states[-1] = task.chain.kernel.mean(drawn.states[-2], last, prior.denoiser(drawn.states[-2], label, None))
    return drawn


def residual(task: LinearGaussian, trajectories: Trajectories) -> tuple[torch.Tensor, torch.Tensor]:
    """(log Z + Λ + E/alpha, its scale max(1, Σ |l_k|)), both [B]."""
    ratio = step_log_ratio(task.chain, task.prior().denoiser, task.policy(), trajectories)
    total = task.log_z + ratio.sum(0) + task.energy(trajectories.terminal) / task.alpha
    return total, ratio.abs().sum(0).clamp(min=1)


@pytest.mark.parametrize("alpha", [0.3, 4.0])
@pytest.mark.parametrize("behavior", BEHAVIORS)
@pytest.mark.parametrize("name", CHAINS)
def test_residual_is_zero_on_any_trajectory(name: str, behavior: str, alpha: float) -> None:
    task = make_task(CHAINS[name](), alpha=alpha)
    gap, scale = residual(task, draw(task, behavior))
    assert (gap.abs() / scale).max() <= 1e-10


def test_residual_is_zero_with_an_explicit_last_sigma() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    task = make_task(chain_from_scheduler(scheduler, 8, last_step=0.05))
    assert task.chain.num_kernels == 8
    for behavior in BEHAVIORS:
        gap, scale = residual(task, draw(task, behavior))
        assert (gap.abs() / scale).max() <= 1e-10


@pytest.mark.parametrize("dim", [1, 10, 100])
def test_residual_is_zero_in_any_dimension(dim: int) -> None:
    task = make_task(brownian_chain(20), dim=dim)
    gap, scale = residual(task, draw(task, "policy"))
    assert (gap.abs() / scale).max() <= 1e-10


@pytest.mark.parametrize("num_steps", [5, 50])
def test_control_gaussian_start_leaves_the_spread_of_the_soft_value(num_steps: int) -> None:
    """Brownian noise with a Gaussian start: the residual is V(s_0)/alpha's spread, and no constant log Z removes it."""
    task = make_task(replace(brownian_chain(num_steps), start_std=1.0))
    gap, _ = residual(task, draw(task, "policy", count=4096))
    assert gap.std() >= 0.1
    # The residual is Gaussian: its sample std has a relative standard error of 1/sqrt(2 N) = .011; 4 of them.
    assert abs(gap.std().item() / task.start_spread - 1) < 4 * (2 * 4096) ** -0.5


@pytest.mark.parametrize("num_steps", [5, 50])
def test_control_residual_equals_the_soft_value_of_the_start(num_steps: int) -> None:
    """Start by start, not only in spread: residual = log Z - V(s_0)/alpha."""
    task = make_task(replace(brownian_chain(num_steps), start_std=1.0))
    drawn = draw(task, "inflated")
    gap, scale = residual(task, drawn)
    g, h = task.soft_value
    value = drawn.states[0] @ g[0] + h[0]
    assert ((gap - (task.log_z - value)).abs() / scale).max() <= 1e-10


def test_control_the_prior_is_not_optimal() -> None:
    task = make_task(brownian_chain(50))
    drawn = draw(task, "prior")
    assert (task.log_z + task.energy(drawn.terminal) / task.alpha).std() > 0.5


def test_a_cosine_chain_remembers_little_and_shows_exactly_that() -> None:
    """On a VP cosine chain the spread is small but far above 1e-10: a loose tolerance would pass it."""
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, timestep_spacing="trailing")
    task = make_task(chain_from_scheduler(scheduler, 20))
    gap, _ = residual(task, draw(task, "policy", count=4096))
    assert 1e-6 < task.start_spread < 0.1
    assert abs(gap.std().item() / task.start_spread - 1) < 4 * (2 * 4096) ** -0.5


@pytest.mark.parametrize("name", CHAINS)
def test_log_z_agrees_with_monte_carlo(name: str) -> None:
    """Self-normalized over 20000 prior rollouts at a mild tilt; |z| < 4 (p = 6e-5)."""
    task = make_task(CHAINS[name](), alpha=2.5)
    weight = (-task.energy(draw(task, "prior", count=20_000, seed=3).terminal) / task.alpha).exp()
    error = (weight.std() / weight.mean() / len(weight) ** 0.5).item()
    assert abs(weight.mean().log().item() - task.log_z) < 4 * error


@pytest.mark.parametrize("name", CHAINS)
def test_policy_samples_the_tilted_law(name: str) -> None:
    """Terminal mean of the optimal policy = the self-normalized one of the prior's chain: mean moved by -variance b/alpha."""
    task = make_task(CHAINS[name](), alpha=2.5)
    prior, policy = (draw(task, behavior, count=20_000, seed=5).terminal for behavior in ("prior", "policy"))
    # For a Gaussian terminal law the tilt moves the mean and keeps the covariance.
    moved = prior.mean(0) - prior.var(0) * task.slope / task.alpha
    error = (prior.var(0) * (2 + 2 * prior.var(0) * (task.slope / task.alpha) ** 2) / 20_000).sqrt()
    assert ((policy.mean(0) - moved).abs() < 4 * error).all()


def test_soft_value_forgets_what_the_chain_forgets() -> None:
    """The spread of V(s_0)/alpha in one dimension follows from the remembered share of the same Gaussian."""
    chain = replace(brownian_chain(20), start_std=1.0)
    task = LinearGaussian(chain, torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), variance=2.0)
    drawn = draw(task, "prior", count=200_000, seed=1)
    share = (task.start_spread**2 / drawn.terminal.var()).item()
    start, end = drawn.states[0, :, 0], drawn.terminal[:, 0]
    correlation = torch.corrcoef(torch.stack([start, end]))[0, 1].item()
    assert correlation**2 == pytest.approx(share, abs=4 * 2 * abs(correlation) / 200_000**0.5)


def test_unfit_chains_are_refused() -> None:
    with pytest.raises(ValueError, match="clips"):
        make_task(chain_from_scheduler(DDPMScheduler(clip_sample=True), 10))
    with pytest.raises(ValueError, match="last step of the prior that draws noise"):
        make_task(chain_from_scheduler(FlowMatchEulerDiscreteScheduler(), 10, noise="memoryless"))
    task = make_task(brownian_chain(5))
    with pytest.raises(ValueError, match="timestep"):
        task.policy()(torch.zeros(2, 3), torch.tensor(123.0))
