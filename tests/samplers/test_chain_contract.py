"""One contract for every chain: its rows are the sampler's, its bridge keeps the levels, and at E = 0 nothing moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from tiltune.samplers.bridge import bridge_of, noise_back
from tiltune.samplers.chain import SIGMA_ZERO, Chain
from tiltune.samplers.condition import Condition
from tiltune.samplers.denoiser import Denoiser, ResidualDenoiser, evaluate
from tiltune.samplers.log_ratio import rows_of
from tiltune.samplers.prior import Prior
from tiltune.samplers.rollout import draw_start, prior_last_states, rollout
from tiltune.samplers.schedulers.brownian import brownian_chain
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler
from tiltune.samplers.schedulers.placement import place_timesteps
from tiltune.samplers.trained_steps import with_trained_steps
from tiltune.samplers.trajectory import Trajectories
from tiltune.tasks.gaussian_mixture import GaussianMixture, MixtureDenoiser

BAR = 1e-6
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Case(NamedTuple):
    """A scheduler and how a chain is made of it."""

    scheduler: Callable[[], Any]
    options: dict[str, Any]

    def chain(self, num_steps: int | None) -> Chain:
        steps = {} if num_steps is None else {"num_steps": num_steps}
        return chain_from_scheduler(self.scheduler(), **steps, **self.options)


def ddpm(**config: Any) -> Case:
    return Case(lambda: DDPMScheduler(**config), {})


def ddim(eta: float, **config: Any) -> Case:
    return Case(lambda: DDIMScheduler(**config), {"eta": eta})


def euler(**config: Any) -> Case:
    return Case(lambda: EulerAncestralDiscreteScheduler(**config), {})


def flow(shift: float, noise: str | None = None) -> Case:
    config = {"shift": shift, "stochastic_sampling": noise is None}
    return Case(lambda: FlowMatchEulerDiscreteScheduler(**config), {} if noise is None else {"noise": noise})


def _ddpm_cases() -> dict[str, Case]:
    cases = {}
    for variance in ("fixed_small", "fixed_large"):
        for prediction in PREDICTIONS:
            for clip in (False, True):
                for spacing in SPACINGS:
                    name = f"ddpm-{variance}-{prediction}-{'clip' if clip else 'noclip'}-{spacing}"
                    cases[name] = ddpm(
                        variance_type=variance, prediction_type=prediction, clip_sample=clip, timestep_spacing=spacing
                    )
    return cases


def _ddim_cases() -> dict[str, Case]:
    cases = {}
    for eta in (0.5, 1.0):
        for prediction in PREDICTIONS:
            for clip in (False, True):
                for spacing in SPACINGS:
                    name = f"ddim-{eta:g}-{prediction}-{'clip' if clip else 'noclip'}-{spacing}"
                    cases[name] = ddim(eta, prediction_type=prediction, clip_sample=clip, timestep_spacing=spacing)
    return cases


COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}
# Steps as the scheduler takes them; every one has a real `step` to be compared with.
STEPPED: dict[str, Case] = {
    **_ddpm_cases(),
    **_ddim_cases(),
    "ddpm-cosine": ddpm(variance_type="fixed_large", **COSINE),
    "ddpm-stable-diffusion": ddpm(steps_offset=1, clip_sample=False, **STABLE_DIFFUSION),
    "ddpm-small-log": ddpm(variance_type="fixed_small_log"),
    "ddpm-zero-snr": ddpm(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"),
    "ddim-stable-diffusion": ddim(0.5, steps_offset=1, clip_sample=False, set_alpha_to_one=False, **STABLE_DIFFUSION),
    "ddim-cosine": ddim(0.2, timestep_spacing="trailing", **COSINE),
    "euler-epsilon": euler(prediction_type="epsilon"),
    "euler-v": euler(prediction_type="v_prediction"),
    "euler-leading": euler(timestep_spacing="leading", steps_offset=1, **STABLE_DIFFUSION),
    "euler-trailing": euler(timestep_spacing="trailing", prediction_type="v_prediction"),
    "flow-stochastic-shift1": flow(1.0),
    "flow-stochastic-shift3": flow(3.0),
}
SDES: dict[str, Case] = {
    f"flow-{noise}-shift{shift:g}": flow(shift, noise) for noise in ("flow_grpo", "memoryless") for shift in (1.0, 3.0)
}


def placed(num_steps: int, variance: str) -> Chain:
    scheduler = DDPMScheduler(variance_type=variance, **COSINE)
    timesteps = place_timesteps(scheduler, num_steps, log_snr=(-3.0, 3.5))
    return chain_from_scheduler(scheduler, timesteps=timesteps)


EVERY: dict[str, Callable[[], Chain]] = {
    **{name: (lambda case=case: case.chain(10)) for name, case in (STEPPED | SDES).items()},
    "brownian": lambda: brownian_chain(10),
    "brownian-1": lambda: brownian_chain(1),
    "ddpm-placed-large": lambda: placed(10, "fixed_large"),
    "ddpm-placed-small": lambda: placed(10, "fixed_small"),
    "ddpm-1000": lambda: STEPPED["ddpm-fixed_small-epsilon-clip-leading"].chain(1000),
    "last-step-sigma": lambda: chain_from_scheduler(DDPMScheduler(clip_sample=False), 10, last_step=0.05),
}


def levels(scheduler: Any, k: int) -> tuple[float, float]:
    """(signal, noise) of the state before step k, from the scheduler's own fields."""
    if isinstance(scheduler, DDPMScheduler | DDIMScheduler):
        alpha_bar = scheduler.alphas_cumprod[int(scheduler.timesteps[k])].item()
        return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    sigma = scheduler.sigmas[k].item()
    return (1.0, sigma) if isinstance(scheduler, EulerAncestralDiscreteScheduler) else (1 - sigma, sigma)


def output_for(scheduler: Any, k: int, state: Tensor, clean: Tensor) -> Tensor:
    """What a network says when it believes in ``clean``: each parametrisation by its definition."""
    signal, noise = levels(scheduler, k)
    epsilon = (state - signal * clean) / noise
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return epsilon - clean
    if isinstance(scheduler, EulerAncestralDiscreteScheduler):  # v in the variance-preserving units it is fed
        signal, noise = 1 / math.sqrt(noise**2 + 1), noise / math.sqrt(noise**2 + 1)
    kind = scheduler.config.prediction_type
    return {"epsilon": epsilon, "v_prediction": signal * epsilon - noise * clean, "sample": clean}[kind]


def their_step(scheduler: Any, k: int, state: Tensor, output: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(scheduler.step's result, the noise it drew)."""
    t, generator = scheduler.timesteps[k], torch.Generator().manual_seed(k)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):  # draws float32 from the global generator
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(k)
            result = scheduler.step(output, t, state.float(), return_dict=False)[0]
        return result.double(), torch.randn(state.shape, generator=generator).double()
    if isinstance(scheduler, EulerAncestralDiscreteScheduler):
        scheduler.scale_model_input(state, t)
    result = scheduler.step(output, t, state, generator=generator, return_dict=False, **options)[0]
    noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    return result, noise


def row_misfit(scheduler: Any, chain: Chain, options: dict[str, Any]) -> float:
    """Largest |table - scheduler.step| over all rows, relative to max(1, |state|, |result|): schedulers work in float32."""
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    for k in range(chain.num_steps):
        signal, noise = levels(scheduler, k)
        # Clean samples up to 1.5, so that where x_hat is clipped at 1 both sides of the clip are seen.
        x, believed = 3 * torch.rand(2, 4, 3, 5, generator=generator, dtype=torch.float64) - 1.5
        state = signal * x + noise * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        state = state.float().double()
        output = output_for(scheduler, k, state, believed).float().double()
        theirs, drawn = their_step(scheduler, k, state, output, options)
        ours = chain.kernel.mean(state, k, output) + chain.kernel.row(k, state).sigma * drawn
        scale = max(1.0, state.abs().max().item(), theirs.abs().max().item())
        worst = max(worst, (ours - theirs).abs().max().item() / scale)
    return worst


@pytest.mark.parametrize("name", STEPPED)
def test_rows_are_the_schedulers_own_steps(name: str) -> None:
    case = STEPPED[name]
    for num_steps in (3, 10, 50):
        scheduler = case.scheduler()
        scheduler.set_timesteps(num_steps)
        chain = case.chain(num_steps)
        assert chain.timesteps.tolist() == scheduler.timesteps.double().tolist()
        assert row_misfit(scheduler, chain, case.options) <= BAR


def test_rows_of_a_thousand_steps() -> None:
    case = STEPPED["ddpm-fixed_small-epsilon-clip-leading"]
    scheduler = case.scheduler()
    scheduler.set_timesteps(1000)
    assert row_misfit(scheduler, case.chain(1000), {}) <= BAR


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_rows_of_custom_timesteps(variance: str) -> None:
    for timesteps in ([900, 500, 333, 100, 7, 0], [999, 3, 2, 1], [720, 400, 90]):
        scheduler = DDPMScheduler(variance_type=variance, clip_sample=False)
        chain = chain_from_scheduler(scheduler, timesteps=timesteps)
        scheduler.set_timesteps(timesteps=timesteps)
        assert chain.timesteps.tolist() == timesteps
        assert row_misfit(scheduler, chain, {}) <= BAR


def test_custom_timesteps_of_a_flow_are_the_users() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    chain = chain_from_scheduler(scheduler, timesteps=[1000, 800, 350, 20], noise="flow_grpo")
    assert torch.allclose(chain.timesteps, torch.tensor([1000.0, 800, 350, 20]).double(), atol=1e-3)
    assert torch.allclose(chain.noise[:-1], chain.timesteps / 1000, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [3, 10, 50])
def test_flow_grpo_rows_are_its_equation_9(num_steps: int, shift: float) -> None:
    """arXiv 2505.05470, eq. 9: dt > 0 toward the data; sigma_t = a sqrt(t / (1 - t)), a = .7."""
    case = SDES[f"flow-flow_grpo-shift{shift:g}"]
    scheduler, chain = case.scheduler(), case.chain(num_steps)
    scheduler.set_timesteps(num_steps)
    t = scheduler.sigmas.double()
    state, velocity = torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k in range(num_steps):
        dt, below_one = t[k] - t[k + 1], t[k] if t[k] < 1 else t[k + 1]
        sigma = 0.7 * (t[k] / (1 - below_one)).sqrt()
        score_part = sigma**2 / (2 * t[k]) * (state + (1 - t[k]) * velocity)
        torch.testing.assert_close(
            chain.kernel.mean(state, k, velocity), state - (velocity + score_part) * dt, rtol=0, atol=1e-12
        )
        assert chain.sigma[k].item() == pytest.approx((sigma * dt.sqrt()).item(), abs=1e-14)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [3, 10, 50])
def test_memoryless_rows_are_those_of_adjoint_matching(num_steps: int, shift: float) -> None:
    """arXiv 2409.08861, table 1, for flow matching: dX = (2 v - X / tau) d tau + sqrt(2 (1 - tau) / tau) dB, tau = 1 - t."""
    case = SDES[f"flow-memoryless-shift{shift:g}"]
    scheduler, chain = case.scheduler(), case.chain(num_steps)
    scheduler.set_timesteps(num_steps)
    tau = 1 - scheduler.sigmas.double()
    state, velocity = torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k in range(num_steps):
        # At tau = 0 both terms are infinite; as in Flow-GRPO the next level stands in.
        here = tau[k] if tau[k] > 0 else tau[k + 1]
        step = tau[k + 1] - tau[k]
        variance = 2 * (1 - tau[k]) / here * step
        # One v is the flow's, the other the noise's drift, which holds (1 - t) v and so none at t = 1.
        speeds = 2 if tau[k] > 0 else 1
        mean = state + (speeds * -velocity - state / here) * step
        torch.testing.assert_close(chain.kernel.mean(state, k, velocity), mean, rtol=0, atol=1e-12)
        assert chain.sigma[k].item() == pytest.approx(variance.sqrt().item(), abs=1e-14)


@pytest.mark.parametrize("num_steps", [1, 5, 100])
def test_brownian_rows_are_those_of_the_rtb_paper(num_steps: int) -> None:
    """s' = s + dt f + sqrt(5 dt) eps from a start at 0."""
    chain = brownian_chain(num_steps)
    state, drift = torch.randn(2, 64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert chain.start_std == 0
    for k in range(num_steps):
        torch.testing.assert_close(chain.kernel.mean(state, k, drift), state + drift / num_steps, rtol=0, atol=1e-12)
        assert chain.sigma[k].item() == pytest.approx(math.sqrt(5 / num_steps), abs=1e-14)


@pytest.mark.parametrize("name", EVERY)
def test_kernel_shift_is_the_difference_of_means_over_sigma(name: str) -> None:
    chain = EVERY[name]()
    generator = torch.Generator().manual_seed(2)
    for k in range(chain.num_kernels):
        state, prior, policy = torch.randn(3, 8, 6, generator=generator, dtype=torch.float64)
        shift = chain.kernel.shift(state, k, policy, prior)
        expected = (chain.kernel.mean(state, k, policy) - chain.kernel.mean(state, k, prior)) / chain.kernel.row(k, state).sigma
        torch.testing.assert_close(shift, expected, rtol=1e-8, atol=1e-8 * max(1.0, expected.abs().max().item()))
        z = (policy - chain.kernel.mean(state, k, prior)) / chain.kernel.row(k, state).sigma
        standardized = chain.kernel.standardize(policy, state, k, prior)
        torch.testing.assert_close(standardized, z, rtol=1e-8, atol=1e-8 * max(1.0, z.abs().max().item()))


@pytest.mark.parametrize("name", EVERY)
def test_a_tensor_of_steps_is_those_steps(name: str) -> None:
    """The chunks of the second gradient pass mix steps; they must see the rows that a rollout sees."""
    chain = EVERY[name]()
    generator = torch.Generator().manual_seed(2)
    step = torch.randint(chain.num_kernels, (16,), generator=generator)
    state, prior, policy = torch.randn(3, 16, 2, 3, generator=generator, dtype=torch.float64)
    mean, shift = chain.kernel.mean(state, step, policy), chain.kernel.shift(state, step, policy, prior)
    z = chain.kernel.standardize(state, prior, step, policy)
    fed, label = chain.network_input(state, step), chain.timestep(step, state)
    for n, k in enumerate(step.tolist()):
        row = slice(n, n + 1)
        torch.testing.assert_close(mean[row], chain.kernel.mean(state[row], k, policy[row]), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(shift[row], chain.kernel.shift(state[row], k, policy[row], prior[row]))
        torch.testing.assert_close(z[row], chain.kernel.standardize(state[row], prior[row], k, policy[row]))
        torch.testing.assert_close(fed[row], chain.network_input(state[row], k), rtol=1e-14, atol=1e-14)
        assert label[n] == chain.timestep(k, state) == chain.timesteps[k]


# Chains that samples can be noised back along; DDIM on 'linspace' is refused (test_chain_refusals).
NOISED = [
    name for name in EVERY if not (name.startswith("ddim") and name.endswith("linspace")) and not name.startswith("ddpm-1000")
]


def data() -> GaussianMixture:
    """Three narrow modes inside [-1, 1]²: x_hat never meets a clip, so clipping chains are held to the same identity."""
    means = torch.tensor([[0.55, -0.3], [-0.5, 0.5], [0.1, -0.6]], dtype=torch.float64)
    covariances = torch.tensor([0.01, 0.02, 0.005], dtype=torch.float64)[:, None, None] * torch.eye(2, dtype=torch.float64)
    return GaussianMixture(torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64), means, covariances)


def exact_prior(chain: Chain) -> Prior:
    exact = MixtureDenoiser(data(), replace(chain, input_scale=torch.ones(chain.num_steps)))

    def unscaled(fed: Tensor, timestep: Tensor, condition: Condition | None = None) -> Tensor:
        step = (timestep.reshape(-1, 1) - chain.timesteps).abs().argmin(-1)
        return exact(fed / chain.input_scale[step, None], timestep)

    return Prior(unscaled if chain.input_scale.ne(1).any() else exact, chain, (2,))


class Probe(nn.Module):
    """A residual network that sees level and state, linearly and not, so that no systematic pull stays hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2, dtype=torch.float64)
        self.features = torch.empty(0)

    def forward(self, state: Tensor, timestep: Tensor, condition: Condition | None = None) -> Tensor:
        t = timestep.reshape(-1, 1).expand(len(state), 1) / 1000
        self.features = torch.cat([torch.ones_like(t), t, state, t * state, torch.tanh(3 * state)], 1)
        return self.layer(self.features)


def tlm_gradient(prior: Prior, trajectories: Trajectories) -> Tensor:
    """Gradient of tlm = -mean Λ with respect to the zeroed last layer, in standard errors: [2, 8].

    Per trajectory it is Σ_k (∂Λ/∂output_k) (features_k)ᵀ, so the standard error is the plain one over trajectories.
    """
    probe = Probe()
    policy: Denoiser = ResidualDenoiser(prior.denoiser, probe)
    chain = prior.chain
    state, following, step, _ = rows_of(trajectories, chain, slice(None))
    prior_output = evaluate(prior.denoiser, chain, state, step, None)
    output = evaluate(policy, chain, state, step, None)
    assert torch.equal(output, prior_output)
    z = chain.kernel.standardize(following, state, step, prior_output)
    ratio = chain.kernel.log_ratio_from_states(z, chain.kernel.shift(state, step, output, prior_output))
    (on_output,) = torch.autograd.grad(-ratio.sum(), output)
    per_row = torch.einsum("nd,nf->ndf", on_output, probe.features)
    each = per_row.reshape(chain.num_kernels, len(trajectories), 2, 8).sum(0)
    error = each.std(0) / len(trajectories) ** 0.5
    return torch.where(error > 0, each.mean(0) / error, 0.0)


COUNT = 8192


@pytest.mark.parametrize("name", NOISED)
def test_bridge_and_exact_network_agree(name: str) -> None:
    """For the network that says x_hat = x, the chain's mean is the bridge's: c s + d x."""
    chain = EVERY[name]()
    bridge = bridge_of(chain)
    c, d = bridge.c, bridge.d
    generator = torch.Generator().manual_seed(4)
    for k in range(chain.num_kernels):
        x = 2 * torch.rand(32, 2, generator=generator, dtype=torch.float64) - 1
        state = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        state = chain.signal[k] * x + chain.noise[k] * state
        row = chain.kernel.row(k, state)
        output = (x - row.p * state) / row.q
        # The inner clip must not bite by rounding at |x| = 1: x is strictly inside.
        torch.testing.assert_close(chain.kernel.mean(state, k, output), c[k] * state + d[k] * x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NOISED)
def test_noised_samples_keep_every_level_and_tlm_leaves_the_prior_unchanged(name: str) -> None:
    """With E = 0. 4 standard errors an entry: p = 6e-5 two-sided, 16 entries a chain; fixed seed."""
    chain = EVERY[name]()
    generator = torch.Generator().manual_seed(6)
    prior, samples = exact_prior(chain), data().sample(COUNT, generator)
    trajectories = noise_back(prior, samples, generator)
    for k in range(chain.num_kernels):
        rest = trajectories.states[k] - chain.signal[k] * samples
        variance = chain.noise[k] ** 2
        assert (rest.mean(0).abs() <= 4 * (variance / COUNT).sqrt()).all()
        assert ((rest.var(0) - variance).abs() <= 4 * variance * (2 / COUNT) ** 0.5).all()
        cross = ((samples - samples.mean(0)) * rest).mean(0) / samples.std(0)
        assert (cross.abs() <= 4 * (variance / COUNT).sqrt()).all()
    assert tlm_gradient(prior, trajectories).abs().max() < 4


@pytest.mark.parametrize("name", {name.partition("-")[0]: name for name in NOISED}.values())
def test_tlm_on_a_window_of_trained_steps_leaves_the_prior_unchanged(name: str) -> None:
    """With E = 0, on paths noised back and on the prior's own, a chain of every family; 4 standard errors an entry."""
    chain = EVERY[name]()
    first = min(1, chain.last_trained)
    window = with_trained_steps(chain, first, max(first, chain.last_trained - 1))
    generator = torch.Generator().manual_seed(6)
    prior = exact_prior(window)
    assert tlm_gradient(prior, noise_back(prior, data().sample(COUNT, generator), generator)).abs().max() < 4
    start = draw_start(prior, COUNT, generator, torch.float64)
    assert tlm_gradient(prior, rollout(prior, None, COUNT, generator, start=start)).abs().max() < 4


def markov(chain: Chain, samples: Tensor, generator: torch.Generator, prior: Prior) -> Trajectories:
    """Plain forward noising, x → s_{K-1} → … → s_0: right for DDPM, wrong for the rest."""
    states = [samples]
    last = chain.num_steps
    for k in reversed(range(last)):
        ratio = chain.signal[k] / chain.signal[k + 1]
        spread = (chain.noise[k] ** 2 - ratio**2 * chain.noise[k + 1] ** 2).clamp(min=0).sqrt()
        states.append(ratio * states[-1] + spread * torch.randn(samples.shape, generator=generator, dtype=samples.dtype))
    stacked = torch.stack(states[::-1])
    if chain.prior_last_steps:
        stacked[chain.num_kernels + 1 :] = torch.stack(prior_last_states(prior, stacked[chain.num_kernels], generator))
    return Trajectories(states=stacked)


def test_control_markov_noising_is_right_for_ddpm_and_caught_on_ddim() -> None:
    for name, right in (
        ("ddpm-fixed_small-epsilon-noclip-leading", True),
        ("ddpm-fixed_large-v_prediction-noclip-trailing", True),
        ("ddim-0.5-epsilon-noclip-leading", False),
        ("ddim-0.5-v_prediction-clip-leading", False),
    ):
        chain = EVERY[name]()
        generator = torch.Generator().manual_seed(10)
        prior, samples = exact_prior(chain), data().sample(4 * COUNT, generator)
        worst = tlm_gradient(prior, markov(chain, samples, generator, prior)).abs().max()
        assert worst < 4 if right else worst > 8


@pytest.mark.parametrize("name", SDES)
def test_control_a_bridge_with_the_kernels_sigma_is_caught(name: str) -> None:
    """tau_k is not sigma_k: where they differ, the wrong one leaves the nominal levels and teaches at E = 0."""
    chain = EVERY[name]()
    bridge = bridge_of(chain)
    c, d, tau = bridge.c, bridge.d, bridge.tau
    assert not torch.allclose(tau, chain.sigma[: chain.num_kernels], rtol=0.05)
    generator = torch.Generator().manual_seed(12)
    prior, samples = exact_prior(chain), data().sample(COUNT, generator)

    def gaussian() -> Tensor:
        return torch.randn(samples.shape, generator=generator, dtype=torch.float64)

    states = [chain.signal[0] * samples + chain.noise[0] * gaussian()]
    for k in range(chain.num_kernels):
        states.append(c[k] * states[-1] + d[k] * samples + chain.sigma[k] * gaussian())
    wrong = Trajectories(states=torch.stack([*states, samples]))
    assert tlm_gradient(prior, wrong).abs().max() > 8


def test_bridge_noise_equals_the_known_ones() -> None:
    """DDPM: the posterior's (small) variance whatever the kernel's; DDIM and Euler ancestral: their own sigma."""
    small = EVERY["ddpm-fixed_small-epsilon-noclip-leading"]()
    large = EVERY["ddpm-fixed_large-epsilon-noclip-leading"]()
    torch.testing.assert_close(bridge_of(large).tau, small.sigma[:9], rtol=1e-5, atol=1e-8)
    for name in ("ddim-0.5-epsilon-noclip-leading", "ddim-1-sample-clip-leading", "euler-v", "flow-stochastic-shift3"):
        chain = EVERY[name]()
        torch.testing.assert_close(bridge_of(chain).tau, chain.sigma[: chain.num_kernels], rtol=1e-4, atol=1e-6)
    brownian = brownian_chain(20)
    left = 1 - torch.arange(20, dtype=torch.float64) / 20
    torch.testing.assert_close(bridge_of(brownian).tau ** 2, 5 / 20 * (left - 1 / 20) / left, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_the_last_rows_belong_to_the_prior_or_draw_noise(name: str) -> None:
    chain = EVERY[name]()
    assert (chain.sigma[: chain.num_kernels] >= SIGMA_ZERO).all()
    assert chain.prior_last_steps == chain.num_steps - chain.num_kernels
    stated = chain.conditions()
    assert set(stated) == {"start", "last_step", "sigma", "sum"}
    assert ("to the prior" in stated["last_step"]) == bool(chain.prior_last_steps)


def test_placed_steps_are_distinct_and_follow_the_kl() -> None:
    scheduler = DDPMScheduler(**COSINE)
    even = place_timesteps(scheduler, 20, log_snr=(-3.0, 3.5))
    measured = ([-3.0, 2.0, 2.5, 3.5], [0.0, 0.0, 1.0, 1.0])
    late = place_timesteps(scheduler, 20, log_snr=(-3.0, 3.5), profile=measured, even=0.1)
    for timesteps in (even, late):
        assert len(set(timesteps)) == 20
        assert timesteps == sorted(timesteps, reverse=True)
    alpha_bar = scheduler.alphas_cumprod.double()
    log_snr = 0.5 * (alpha_bar.log() - (-alpha_bar).log1p())
    # Even in log-SNR up to the rounding to integer labels, which is widest at the clean end.
    gaps = log_snr[even].diff()
    assert (gaps - gaps.mean()).abs().max() < 0.15
    assert (log_snr[late] > 2).sum() > 2 * (log_snr[even] > 2).sum()
    dense = place_timesteps(scheduler, 200, log_snr=(3.0, 4.5))
    assert len(set(dense)) == 200
    with pytest.raises(ValueError, match="do not fit"):
        place_timesteps(scheduler, 1001, log_snr=(-3.0, 3.5))
