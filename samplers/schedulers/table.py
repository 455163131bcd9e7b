"""Tables read from diffusers schedulers, each row checked against the real ``scheduler.step``; and the Brownian chain.

A scheduler is read through its public fields only. What does not fit a table is refused with what to use instead.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..chain import SIGMA_ZERO, Chain

LastStep = Literal["decoder"] | float
FAINT = 0.02  # standard deviation of a kernel, where data have about 1: 2.5 gray levels of 255
DELICATE = 4.0  # what a change of the network's output moves at a kernel, in sigmas, over the same at the kernel before
# A row's misfit against scheduler.step, relative to the larger of 1 and the state's size (float32 schedules).
MISFIT = 1e-6


def chain_from_scheduler(
    scheduler: Any,
    num_steps: int | None = None,
    *,
    timesteps: Sequence[float] | None = None,
    eta: float = 1.0,
    noise: Literal["flow_grpo", "memoryless"] = "memoryless",
    noise_level: float = 0.7,
    last_step: LastStep = "decoder",
) -> Chain:
    """The chain of a diffusers scheduler, run with ``num_steps`` steps or with custom ``timesteps`` (descending).

    eta: DDIM's noise (its own argument of ``step``). noise, noise_level: the SDE of a flow-matching scheduler.
    last_step: what a noiseless last step becomes, 'decoder' (it belongs to the prior) or a sigma shared by both.
    Custom timesteps: DDPM takes integers below ``num_train_timesteps``; flow matching takes sigma · 1000.

    Errors: ValueError for a scheduler, an option or a row that the table cannot hold.
    """
    if (num_steps is None) == (timesteps is None):
        raise ValueError("give exactly one of num_steps (evenly spaced by the scheduler) or timesteps (your own, descending).")
    if num_steps is not None and num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a chain has at least one step.")
    if timesteps is not None and not len(timesteps):
        raise ValueError("timesteps is empty; a chain has at least one step.")
    if timesteps is not None and any(b >= a for a, b in pairwise(timesteps)):
        raise ValueError("timesteps must be strictly descending: sampling runs from noise (large t) to data.")
    name = type(scheduler).__name__
    builders: dict[str, Callable[[], Chain]] = {
        "DDPMScheduler": lambda: _ddpm(scheduler, num_steps, timesteps, last_step),
        "DDIMScheduler": lambda: _ddim(scheduler, num_steps, timesteps, eta, last_step),
        "EulerAncestralDiscreteScheduler": lambda: _euler_ancestral(scheduler, num_steps, timesteps, last_step),
        "FlowMatchEulerDiscreteScheduler": lambda: _flow(scheduler, num_steps, timesteps, noise, noise_level, last_step),
    }
    if name not in builders:
        raise ValueError(
            f"{name} does not fit a one-step Gaussian chain (multistep and deterministic solvers have no kernel density)."
            f" Use one of {', '.join(sorted(builders))}; most checkpoints load with"
            " DDPMScheduler.from_config(scheduler.config) or DDIMScheduler with eta > 0."
        )
    scheduler = copy.deepcopy(scheduler)
    if getattr(scheduler.config, "thresholding", False):
        raise ValueError(
            f"{name} has thresholding=True: a per-sample quantile is not a table row, and its kernel is not Gaussian around"
            " a fixed function of the output. Set thresholding=False (clip_sample=True is supported)."
        )
    return builders[name]()


def _prediction(kind: str, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) with x_hat = p s + q out under s = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) eps."""
    signal, noise = alpha_bar.sqrt().double(), (1 - alpha_bar).sqrt().double()
    if kind == "epsilon":
        return 1 / signal, -noise / signal
    if kind == "v_prediction":
        return signal, -noise
    if kind == "sample":
        return torch.zeros_like(signal), torch.ones_like(signal)
    raise ValueError(f"prediction_type {kind!r} is unknown; a chain covers 'epsilon', 'v_prediction' and 'sample'.")


def _levels(alpha_bar: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
    """signal and noise [K + 1]: what each evaluated step assumes of its state, then the last step's result."""
    levels = torch.cat([alpha_bar, following[-1:]])
    return levels.double().sqrt(), (1 - levels.double()).clamp(min=0).sqrt()


def _alphas(scheduler: Any) -> tuple[Tensor, Tensor]:
    labels = scheduler.timesteps.cpu().long()
    if labels.max() >= len(scheduler.alphas_cumprod):
        raise ValueError(
            f"timestep {labels.max().item()} lies outside the schedule of {len(scheduler.alphas_cumprod)} training steps;"
            " steps_offset is too large for this number of steps."
        )
    # Kept in the scheduler's float32: 1 - a/b of neighbouring levels cancels, and the chain is what the scheduler runs.
    return labels, scheduler.alphas_cumprod.cpu()


def _clip(scheduler: Any) -> float | None:
    return float(scheduler.config.clip_sample_range) if scheduler.config.clip_sample else None


def _ddpm(scheduler: Any, num_steps: int | None, timesteps: Sequence[float] | None, last_step: LastStep) -> Chain:
    config = scheduler.config
    if config.variance_type not in ("fixed_small", "fixed_small_log", "fixed_large"):
        why = (
            "its log-variance is used as a variance, which is negative"
            if config.variance_type == "fixed_large_log"
            else "the network's variance branch would make sigma differ between policy and prior"
        )
        raise ValueError(
            f"DDPMScheduler with variance_type={config.variance_type!r} is not covered: {why}. Use 'fixed_large' (the better"
            " choice for short chains) or 'fixed_small'."
        )
    if timesteps is None:
        scheduler.set_timesteps(num_steps)
    else:
        scheduler.set_timesteps(timesteps=[int(t) for t in timesteps])
    labels, alpha_bars = _alphas(scheduler)
    previous = torch.tensor([int(scheduler.previous_timestep(t)) for t in labels])
    alpha_bar = alpha_bars[labels]
    alpha_bar_next = torch.where(previous >= 0, alpha_bars[previous.clamp(min=0)], 1.0)
    alpha = alpha_bar / alpha_bar_next
    beta = 1 - alpha
    variance = beta
    if config.variance_type != "fixed_large":
        variance = (1 - alpha_bar_next) / (1 - alpha_bar) * beta
    p, q = _prediction(config.prediction_type, alpha_bar)
    signal, noise = _levels(alpha_bar, alpha_bar_next)
    return _finish(
        scheduler,
        lambda out, t, s, g: scheduler.step(out, t, s, generator=g, return_dict=False)[0],
        last_step,
        Chain(
            name=f"ddpm {config.variance_type}",
            timesteps=labels.double(),
            p=p,
            q=q,
            c=alpha.sqrt() * (1 - alpha_bar_next) / (1 - alpha_bar),
            d=alpha_bar_next.sqrt() * beta / (1 - alpha_bar),
            e=torch.zeros_like(p),
            # scheduler.step draws nothing at t = 0.
            sigma=torch.where(labels > 0, variance.sqrt(), 0.0),
            input_scale=torch.ones_like(p),
            signal=signal,
            noise=noise,
            start_std=float(scheduler.init_noise_sigma),
            clip=_clip(scheduler),
            decoder=1,
        ),
    )


def _ddim(scheduler: Any, num_steps: int | None, timesteps: Sequence[float] | None, eta: float, last_step: LastStep) -> Chain:
    _no_custom_timesteps(scheduler, timesteps)
    if eta <= 0:
        raise ValueError(
            f"DDIM with eta={eta:g} is deterministic, so policy and prior have no densities to compare; set eta in (0, 1]."
            " eta=1 also forgets its start, which a small eta does not."
        )
    scheduler.set_timesteps(num_steps)
    labels, alpha_bars = _alphas(scheduler)
    previous = labels - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha_bar = alpha_bars[labels]
    final = scheduler.final_alpha_cumprod
    alpha_bar_next = torch.where(previous >= 0, alpha_bars[previous.clamp(min=0)], final)
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    sigma = eta * variance.sqrt()
    kind, clip = scheduler.config.prediction_type, _clip(scheduler)
    p, q = _prediction(kind, alpha_bar)
    direction = (1 - alpha_bar_next - sigma**2).clamp(min=0).sqrt()
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if clip is None:  # eps follows from x_hat, and nothing is left to the raw output
        c, d, e = direction / noise, alpha_bar_next.sqrt() - direction * signal / noise, torch.zeros_like(p)
    else:  # x_hat is clipped but eps comes from the raw output (use_clipped_model_output=False)
        d = alpha_bar_next.sqrt()
        c, e = {
            "epsilon": (torch.zeros_like(p), direction),
            "v_prediction": (direction * noise, direction * signal),
            "sample": (direction / noise, -direction * signal / noise),
        }[kind]
    levels = _levels(alpha_bar, alpha_bar_next)
    return _finish(
        scheduler,
        lambda out, t, s, g: scheduler.step(out, t, s, eta=eta, generator=g, return_dict=False)[0],
        last_step,
        Chain(
            name=f"ddim eta={eta:g}",
            timesteps=labels.double(),
            p=p,
            q=q,
            c=c,
            d=d,
            e=e,
            sigma=sigma,
            input_scale=torch.ones_like(p),
            signal=levels[0],
            noise=levels[1],
            start_std=float(scheduler.init_noise_sigma),
            clip=clip,
            decoder=1,
        ),
    )


def _euler_ancestral(scheduler: Any, num_steps: int | None, timesteps: Sequence[float] | None, last_step: LastStep) -> Chain:
    _no_custom_timesteps(scheduler, timesteps)
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"EulerAncestralDiscreteScheduler steps 'epsilon' and 'v_prediction' only, not {kind!r}.")
    scheduler.set_timesteps(num_steps)
    sigmas = scheduler.sigmas.cpu()
    here, there = sigmas[:-1], sigmas[1:]
    up = (there**2 * (here**2 - there**2) / here**2).sqrt()
    down = (there**2 - up**2).clamp(min=0).sqrt()
    ones = torch.ones_like(here)
    if kind == "epsilon":
        p, q = ones, -here
    else:
        p, q = 1 / (here**2 + 1), -here / (here**2 + 1).sqrt()

    def step(out: Tensor, t: Tensor, s: Tensor, g: torch.Generator) -> Tensor:
        scheduler.scale_model_input(s, t)
        return scheduler.step(out, t, s, generator=g, return_dict=False)[0]

    return _finish(
        scheduler,
        step,
        last_step,
        Chain(
            name="euler ancestral",
            timesteps=scheduler.timesteps.cpu().double(),
            p=p,
            q=q,
            c=down / here,
            d=1 - down / here,
            e=torch.zeros_like(here),
            sigma=up,
            input_scale=1 / (here**2 + 1).sqrt(),
            signal=torch.ones_like(sigmas).double(),
            noise=sigmas.double(),
            start_std=float(scheduler.init_noise_sigma),
            decoder=1,
        ),
    )


def _flow(
    scheduler: Any,
    num_steps: int | None,
    timesteps: Sequence[float] | None,
    noise: str,
    noise_level: float,
    last_step: LastStep,
) -> Chain:
    """out = eps - x, s_t = (1 - t) x + t eps.

    With ``stochastic_sampling`` the scheduler's own step: x_hat is noised anew to t'. Otherwise the Euler-Maruyama step of
    ds = [v + g²/(2t) (s + (1 - t) v)] dt + g dw with g² = a² t / (1 - t): a = ``noise_level`` is Flow-GRPO
    (arXiv 2505.05470, eq. 9), a² = 2 the memoryless noise of Adjoint Matching (arXiv 2409.08861, eq. 12 and table 1).
    """
    config = scheduler.config
    if config.use_dynamic_shifting or config.invert_sigmas:
        raise ValueError(
            "FlowMatchEulerDiscreteScheduler with use_dynamic_shifting or invert_sigmas is not covered: the first makes the"
            " table depend on the image size, the second reverses it. Set a fixed `shift` instead."
        )
    if timesteps is None:
        scheduler.set_timesteps(num_steps)
    else:
        # The scheduler shifts sigmas that it is given; undo that, so that the labels are the user's.
        t = np.asarray(timesteps, dtype=np.float64) / config.num_train_timesteps
        scheduler.set_timesteps(sigmas=(t / (scheduler.shift - (scheduler.shift - 1) * t)).tolist())
    sigmas = scheduler.sigmas.cpu().double()
    here, there = sigmas[:-1], sigmas[1:]
    ones = torch.ones_like(here)
    if config.stochastic_sampling:
        name, step = "flow stochastic_sampling", _flow_step(scheduler)
        c, d, sigma = torch.zeros_like(here), 1 - there, there
    else:
        if noise not in ("flow_grpo", "memoryless"):
            raise ValueError(f"noise {noise!r} is unknown; a flow SDE takes 'memoryless' or 'flow_grpo'.")
        if noise == "flow_grpo" and noise_level <= 0:
            raise ValueError(f"noise_level is {noise_level:g}: a flow without noise has no density; use 0.7, Flow-GRPO's own.")
        level = math.sqrt(2.0) if noise == "memoryless" else noise_level
        name, step = f"flow {noise}", None
        # At t = 1 the noise is infinite; the next level stands in, as in Flow-GRPO's own sampler.
        bounded = torch.where(here < 1, here, sigmas[1])
        diffusion = level**2 * here / (1 - bounded)
        dt = there - here
        drift = diffusion / (2 * here)
        # mu = s + [v + drift (s + (1 - t) v)] dt with v = (s - x_hat) / t
        on_v = (1 + drift * (1 - here)) * dt / here
        c, d, sigma = 1 + drift * dt + on_v, -on_v, (diffusion * -dt).sqrt()
    chain = Chain(
        name=name,
        timesteps=scheduler.timesteps.cpu().double(),
        p=ones,
        q=-here,
        c=c,
        d=d,
        e=torch.zeros_like(here),
        sigma=sigma,
        input_scale=ones,
        signal=1 - sigmas,
        noise=sigmas,
        start_std=1.0,
        decoder=1,
    )
    if step is None and not isinstance(last_step, str):
        raise ValueError("the last Euler-Maruyama step of a flow SDE always belongs to the prior; leave last_step='decoder'.")
    # An Euler-Maruyama step never lands on noise 0; nothing is left to explain its last noise, so the prior draws it.
    return chain if step is None else _finish(scheduler, step, last_step, chain, torch.float32)


def _flow_step(scheduler: Any) -> Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]:
    def step(out: Tensor, t: Tensor, s: Tensor, g: torch.Generator) -> Tensor:
        # This scheduler draws its noise from torch's global generator, whatever generator it is given.
        with torch.random.fork_rng(devices=[]):
            torch.random.set_rng_state(g.get_state())
            return scheduler.step(out, t, s, return_dict=False)[0]

    return step


def _no_custom_timesteps(scheduler: Any, timesteps: Sequence[float] | None) -> None:
    if timesteps is not None:
        raise ValueError(
            f"{type(scheduler).__name__} takes no custom timesteps; place steps with DDPMScheduler or"
            " FlowMatchEulerDiscreteScheduler."
        )


def _finish(
    scheduler: Any,
    step: Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor],
    last_step: LastStep,
    chain: Chain,
    dtype: torch.dtype = torch.float64,
) -> Chain:
    """Check the rows against the scheduler, then settle the last step."""
    misfit = table_misfit(chain, scheduler.timesteps, step, dtype)
    if not misfit <= MISFIT:
        raise ValueError(
            f"{chain.name}: the table misses scheduler.step by {misfit:.2g} (bar {MISFIT:g}); this scheduler configuration"
            " steps in a way the table does not hold. Please report the scheduler's config."
        )
    quiet = chain.sigma[-1].item() < SIGMA_ZERO
    if isinstance(last_step, str):
        if last_step != "decoder":
            raise ValueError(f"last_step is {last_step!r}; it is 'decoder' or a positive standard deviation.")
        return _with_decoder(chain if quiet else replace(chain, decoder=0))
    if last_step < SIGMA_ZERO:
        raise ValueError(f"last_step={last_step:g} leaves the log-ratio undefined; give a positive sigma or 'decoder'.")
    if not quiet:
        raise ValueError(
            f"{chain.name} already draws sigma {chain.sigma[-1].item():.3g} in its last step, so last_step={last_step:g} would"
            " change the prior; leave last_step='decoder'."
        )
    sigma = chain.sigma.clone()
    sigma[-1] = last_step
    return replace(chain, sigma=sigma, decoder=0)


def _with_decoder(chain: Chain) -> Chain:
    """The same chain, its last kernels given to the prior too where they are hardly any noise.

    A DDPM on 'leading' timesteps ends with sigma .01 after .15 (K = 20). Such a kernel has nothing to tell an energy, but every
    change of the network, wherever it was wanted, costs nats there: a hundred times as many as at the kernel before.
    """
    rows, moves = chain.num_kernels, chain.sensitivity
    while rows > 1 and chain.sigma[rows - 1] < FAINT and moves[rows - 1] > DELICATE * moves[rows - 2]:
        rows -= 1
    return replace(chain, decoder=chain.num_steps - rows)


def table_misfit(
    chain: Chain,
    timesteps: Tensor,
    step: Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor],
    dtype: torch.dtype = torch.float64,
) -> float:
    """Largest |table - scheduler.step| over all rows, relative to the larger of 1, the state's and the result's size.

    dtype: what the scheduler is handed; float32 for one that draws its noise in float32 whatever it is given.
    """
    generator = torch.Generator().manual_seed(0)
    reach = 2 * (chain.clip or 1.0)
    worst = 0.0
    for k, t in enumerate(timesteps):
        x = reach * (2 * torch.rand(2, 3, 4, 4, generator=generator, dtype=torch.float64) - 1)
        state = chain.signal[k] * x + chain.noise[k] * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        row = chain.row(k, state)
        # An output whose x_hat lies inside the clip range for some coordinates and outside for others.
        output = (reach * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1) - row.p * state) / row.q
        state, output = state.to(dtype).double(), output.to(dtype).double()
        theirs = step(output.to(dtype), t, state.to(dtype), torch.Generator().manual_seed(k)).double()
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(k), dtype=dtype).double()
        ours = chain.mean(state, k, output) + row.sigma * noise
        # A long first step of Euler ancestral (sigma 157 to 3 at K = 3) rounds at the state's size, not at the result's.
        scale = max(1.0, state.abs().max().item(), theirs.abs().max().item())
        worst = max(worst, (ours - theirs).abs().max().item() / scale)
    return worst


def brownian_chain(num_steps: int = 100, variance: float = 5.0) -> Chain:
    """The pinned Brownian chain of the RTB paper's 2D task (arXiv 2405.20971, appendix): start at 0, s' = s + dt f + noise.

    The network gives the drift f, so x_hat = s + (1 - t) f; sigma² = variance · dt; labels are 1000 (1 - t), t = k dt.
    A sample noised back is a Brownian bridge from 0 to it.
    """
    if num_steps < 1 or variance <= 0:
        raise ValueError(f"a Brownian chain has num_steps ≥ 1 and variance > 0, not {num_steps} and {variance:g}.")
    t = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    dt, left = 1.0 / num_steps, 1 - t[:-1]
    ones = torch.ones(num_steps, dtype=torch.float64)
    return Chain(
        name="brownian",
        timesteps=1000 * left,
        p=ones,
        q=left,
        c=1 - dt / left,
        d=dt / left,
        e=torch.zeros_like(ones),
        sigma=ones * math.sqrt(variance * dt),
        input_scale=ones,
        signal=t,
        noise=(variance * t * (1 - t)).sqrt(),
        start_std=0.0,
    )


def place_timesteps(
    scheduler: Any,
    num_steps: int,
    *,
    log_snr: tuple[float, float],
    profile: tuple[Sequence[float], Sequence[float]] | None = None,
    power: float = 0.75,
    even: float = 0.0,
) -> list[int]:
    """Custom timesteps for a DDPM scheduler, denser where more happens per unit of log(signal/noise).

    log_snr: the first and last level, log(signal/noise). profile: (levels ascending, values), both [m], interpolated:
    the KL per step of a chain with steps even in log-SNR (a certificate's ``kl_per_step``, or an exact denoiser's).
    Density ∝ (1 - even) · profile^power + even, the first term of mean 1; None for profile: all even. A KL knows where
    policy and prior differ, not where a coarse chain strays from its continuous limit, hence ``even``.
    Returns ``num_steps`` strictly descending integers.

    Errors: ValueError where that many distinct integers do not fit between the two levels.
    """
    alpha_bar = scheduler.alphas_cumprod.double().cpu().numpy()
    level = 0.5 * (np.log(alpha_bar) - np.log1p(-alpha_bar))  # descending in the timestep
    grid = np.linspace(*log_snr, 4096)
    density = np.ones_like(grid)
    if profile is not None:
        values = np.maximum(np.asarray(profile[1], dtype=np.float64), 0.0)
        measured = np.interp(grid, profile[0], values, 0.0, 0.0) ** power
        density = (1 - even) * measured / measured.mean() + even
    cumulative = np.cumsum(density) - density[0]
    wanted = np.interp(np.linspace(0, cumulative[-1], num_steps), cumulative, grid)
    placed = [round(float(t)) for t in np.interp(wanted, level[::-1], np.arange(len(level))[::-1])]
    # Rounding can put two steps on one label: push them apart, downward first and then up from 0.
    for k in range(1, num_steps):
        placed[k] = min(placed[k], placed[k - 1] - 1)
    placed[-1] = max(placed[-1], 0)
    for k in range(num_steps - 2, -1, -1):
        placed[k] = max(placed[k], placed[k + 1] + 1)
    if placed[0] >= len(level):
        raise ValueError(f"{num_steps} distinct timesteps do not fit into the scheduler's {len(level)}.")
    return placed
