"""What does not fit is refused with an error that teaches; what fits only under a condition says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from tiltune.samplers.bridge import noise_back
from tiltune.samplers.chain import SIGMA_ZERO, Chain
from tiltune.samplers.prior import Prior
from tiltune.samplers.schedulers.brownian import brownian_chain
from tiltune.samplers.schedulers.check import LastStep
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "eta 0": (DDIMScheduler, {"num_steps": 10, "eta": 0.0}, r"deterministic.*set eta in \(0, 1\]"),
    "multistep": (DPMSolverMultistepScheduler, {"num_steps": 10}, "does not fit.*Use one of DDIMScheduler, DDPMScheduler"),
    "thresholding": (lambda: DDPMScheduler(thresholding=True), {"num_steps": 10}, "quantile.*Set thresholding=False"),
    "learned": (lambda: DDPMScheduler(variance_type="learned"), {"num_steps": 10}, "variance branch.*Use 'fixed_large'"),
    "learned range": (lambda: DDPMScheduler(variance_type="learned_range"), {"num_steps": 10}, "variance branch"),
    "fixed_large_log": (lambda: DDPMScheduler(variance_type="fixed_large_log"), {"num_steps": 10}, "negative.*'fixed_large'"),
    "zero-SNR ddpm": (lambda: DDPMScheduler(**ZERO_SNR), {"num_steps": 10}, "not finite at step 0.*ordinary beta"),
    "zero-SNR ddim": (lambda: DDIMScheduler(**ZERO_SNR), {"num_steps": 10}, "not finite at step 0.*ordinary beta"),
    "unsorted": (DDPMScheduler, {"timesteps": [900, 100, 500]}, "strictly descending"),
    "repeated": (DDPMScheduler, {"timesteps": [900, 500, 500]}, "strictly descending"),
    "empty": (DDPMScheduler, {"timesteps": []}, "at least one step"),
    "outside": (DDPMScheduler, {"timesteps": [1000, 10]}, "1000"),
    "no steps": (DDPMScheduler, {"num_steps": 0}, "at least one step"),
    "both": (DDPMScheduler, {"num_steps": 2, "timesteps": [9, 1]}, "exactly one of num_steps"),
    "neither": (DDPMScheduler, {}, "exactly one of num_steps"),
    "custom ddim": (DDIMScheduler, {"timesteps": [900, 100]}, "no custom timesteps; place steps with DDPMScheduler"),
    "custom euler": (EulerAncestralDiscreteScheduler, {"timesteps": [900, 100]}, "no custom timesteps"),
    "euler sample": (
        lambda: EulerAncestralDiscreteScheduler(prediction_type="sample"),
        {"num_steps": 10},
        "'epsilon' and 'v_prediction' only",
    ),
    "only a step of the prior": (DDPMScheduler, {"num_steps": 1}, "take at least two steps"),
    "dynamic shift": (
        lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        {"num_steps": 10},
        "depend on the image size.*fixed `shift`",
    ),
    "unknown flow noise": (FlowMatchEulerDiscreteScheduler, {"num_steps": 10, "noise": "sde"}, "'memoryless' or 'flow_grpo'"),
    "flow without noise": (
        FlowMatchEulerDiscreteScheduler,
        {"num_steps": 10, "noise": "flow_grpo", "noise_level": 0.0},
        "no density; use 0.7",
    ),
    "flow last sigma": (FlowMatchEulerDiscreteScheduler, {"num_steps": 10, "last_step": 0.1}, "belongs to the prior"),
    "last sigma 0": (DDPMScheduler, {"num_steps": 10, "last_step": 0.0}, "positive sigma or 'prior'"),
    "last step by a wrong word": (DDPMScheduler, {"num_steps": 10, "last_step": "clamp"}, "'prior' or a positive"),
    "last sigma where noise is drawn": (
        lambda: DDPMScheduler(variance_type="fixed_large", timestep_spacing="leading", steps_offset=1),
        {"num_steps": 10, "last_step": 0.05},
        "already draws sigma 0.0148.*change the prior",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_teach(name: str) -> None:
    scheduler, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        chain_from_scheduler(scheduler(), **options)


def test_brownian_refusals_teach() -> None:
    for num_steps, variance in ((0, 5.0), (10, 0.0)):
        with pytest.raises(ValueError, match="num_steps ≥ 1 and variance > 0"):
            brownian_chain(num_steps, variance)


def test_an_inner_noiseless_row_is_refused() -> None:
    chain = brownian_chain(10)
    sigma = chain.sigma.clone()
    sigma[4] = 1e-10  # DDPM's clamp is not a noise either
    with pytest.raises(ValueError, match=r"step 4 of 10 draws no noise.*Use a stochastic sampler"):
        replace(chain, sigma=sigma)


def test_a_scheduler_is_left_as_it_was() -> None:
    scheduler = DDPMScheduler()
    before = scheduler.timesteps.clone()
    chain_from_scheduler(scheduler, 10)
    assert torch.equal(scheduler.timesteps, before)
    assert scheduler.num_inference_steps is None


def test_zero_terminal_snr_fits_with_v_prediction_and_forgets_its_start() -> None:
    """Only epsilon is undefined at signal 0; v says -x there."""
    chain = chain_from_scheduler(DDPMScheduler(prediction_type="v_prediction", clip_sample=False, **ZERO_SNR), 20)
    assert chain.signal[0] == 0
    assert chain.remembered_share(100.0) < 1e-12


@pytest.mark.parametrize(("spacing", "num_steps"), [("linspace", 10), ("trailing", 7)])
def test_noising_back_along_levels_that_do_not_meet_is_refused(spacing: str, num_steps: int) -> None:
    """DDIM steps to t - 1000 // K, which on these spacings is not the timestep that is evaluated next."""
    chain = chain_from_scheduler(DDIMScheduler(timestep_spacing=spacing), num_steps)
    prior = Prior(lambda state, timestep, condition=None: state, chain, (2,))
    with pytest.raises(ValueError, match=r"cannot noise samples back.*use 'leading'"):
        noise_back(prior, torch.zeros(4, 2), torch.Generator().manual_seed(0))


def quiet(num_steps: int = 10, last_step: LastStep = "prior", **config: Any) -> Chain:
    return chain_from_scheduler(DDPMScheduler(clip_sample=False, **config), num_steps, last_step=last_step)


def test_a_noiseless_last_step_belongs_to_the_prior_by_default_and_that_is_said() -> None:
    chain = quiet(variance_type="fixed_large")
    assert (chain.prior_last_steps, chain.num_kernels) == (1, 9)
    assert "belongs to the prior and carries no ratio" in chain.conditions()["last_step"]


def test_a_delicate_last_kernel_belongs_to_the_prior_too_and_that_is_said() -> None:
    """Small variance on leading timesteps: sigma .01 after .15, where a change of the output counts 17 times as much."""
    chain = quiet(20)
    assert (chain.prior_last_steps, chain.num_kernels) == (2, 18)
    assert "the last 2 steps (sigma 0.01 and 0) belong to the prior and carry no ratio" in chain.conditions()["last_step"]
    # Not for small noise alone, as many small steps have it, nor where steps are as they should be.
    assert quiet(500).prior_last_steps == 1 and quiet(500).sigma[-2] < 0.01
    assert quiet(20, timestep_spacing="trailing").prior_last_steps == 1


def test_a_clamp_is_not_a_noise() -> None:
    """Small variance with trailing, or leading and offset 1, ends with sigma 1e-10: a step of the prior, not a kernel."""
    for options in ({"timestep_spacing": "trailing"}, {"timestep_spacing": "leading", "steps_offset": 1}):
        chain = chain_from_scheduler(DDPMScheduler(clip_sample=False, **options), 10)
        assert chain.prior_last_steps and chain.sigma[-1] < SIGMA_ZERO


def test_a_noiseless_last_step_can_get_a_sigma_of_its_own_and_that_is_said() -> None:
    chain = quiet(last_step=0.05)
    assert (chain.prior_last_steps, chain.num_kernels, chain.sigma[-1].item()) == (0, 10, 0.05)
    assert "draws sigma 0.05, shared by prior and policy" in chain.conditions()["last_step"]
    # Nothing else moved.
    assert torch.equal(chain.sigma[:-1], quiet().sigma[:-1])


def test_a_noisy_last_step_carries_a_ratio() -> None:
    scheduler = DDPMScheduler(variance_type="fixed_large", timestep_spacing="leading", steps_offset=1)
    chain = chain_from_scheduler(scheduler, 10)
    assert (chain.prior_last_steps, chain.num_kernels) == (0, 10)
    assert "shared by prior and policy" in chain.conditions()["last_step"]


def test_a_remembered_start_is_stated() -> None:
    chain = chain_from_scheduler(DDIMScheduler(steps_offset=1, **STABLE_DIFFUSION), 50, eta=0.2)
    assert "REMEMBERED" in chain.conditions()["start"]
    assert "0.83" in chain.conditions()["start"]
    assert brownian_chain(10).conditions()["start"] == "fixed start: exact"
    memoryless = chain_from_scheduler(FlowMatchEulerDiscreteScheduler(), 50, noise="memoryless")
    assert "forgotten" in memoryless.conditions()["start"]


@pytest.mark.parametrize(
    ("eta", "shares"),
    [(1.0, ("0.007", "0.06", "0.30")), (0.5, ("0.31", "0.50", "0.72")), (0.2, ("0.83", "0.90", "0.95"))],
)
def test_remembered_shares_of_stable_diffusions_schedule(eta: float, shares: tuple[str, ...]) -> None:
    """The remembered share of Stable Diffusion's schedule for variance 1, 10, 100: 'leading' spacing, offset 0, K = 50."""
    chain = chain_from_scheduler(DDIMScheduler(**STABLE_DIFFUSION), 50, eta=eta)
    for variance, printed in zip((1.0, 10.0, 100.0), shares, strict=True):
        assert f"{chain.remembered_share(variance):.{len(printed) - 2}f}" == printed


def test_remembered_share_is_the_squared_correlation_of_start_and_sample() -> None:
    """The closed form against 100000 rollouts of N(0, 10): standard error of r² about 2 r (1 - r²) / sqrt(N); 4 of them."""
    count, variance = 100_000, 10.0
    chain = chain_from_scheduler(DDIMScheduler(**STABLE_DIFFUSION), 10, eta=0.5)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(count, generator=generator, dtype=torch.float64)
    state = start
    for k in range(chain.num_steps):
        signal, noise = chain.signal[k], chain.noise[k]
        clean = signal * variance / (signal**2 * variance + noise**2) * state
        row = chain.kernel.row(k, state)
        drawn = torch.randn(count, generator=generator, dtype=torch.float64)
        state = chain.kernel.mean(state, k, (clean - row.p * state) / row.q) + row.sigma * drawn
    share = chain.remembered_share(variance)
    measured = torch.corrcoef(torch.stack([start, state]))[0, 1].item() ** 2
    assert abs(measured - share) < 4 * 2 * share**0.5 * (1 - share) / count**0.5
