"""The chains of FlowMatchEulerDiscreteScheduler: its own stochastic step, or a flow SDE.

    out = eps - x,    s_t = (1 - t) x + t eps

With ``stochastic_sampling`` the scheduler's own step: x_hat is noised anew to t'. Otherwise the Euler-Maruyama step of
ds = [v + g²/(2t) (s + (1 - t) v)] dt + g dw with g² = a² t / (1 - t): a = ``noise_level`` is Flow-GRPO
(arXiv 2505.05470, eq. 9), a² = 2 the memoryless noise of Adjoint Matching (arXiv 2409.08861, eq. 12 and table 1).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..chain import Chain
from ..shapes import States, Timestep
from ..typed import forked_rng
from .check import SchedulerStep, checked
from .options import Options


def flow_chain(scheduler: Any, options: Options) -> Chain:
    """The chain of a flow: ``stochastic_sampling`` in the scheduler's config, or `Options.noise`, makes it stochastic."""
    _set_timesteps(scheduler, options)
    sigmas = scheduler.sigmas.cpu().double()
    here, there = sigmas[:-1], sigmas[1:]
    ones = torch.ones_like(here)
    stochastic = scheduler.config.stochastic_sampling
    if stochastic:
        name = "flow stochastic_sampling"
        c, d, sigma = torch.zeros_like(here), 1 - there, there
    else:
        name = f"flow {options.noise}"
        c, d, sigma = _euler_maruyama(sigmas, _noise_level(options))
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
        trained=tuple(range(len(here) - 1)),
    )
    if stochastic:
        return checked(scheduler, _stochastic_step(scheduler), options.last_step, chain, torch.float32)
    if not isinstance(options.last_step, str):
        raise ValueError("the last Euler-Maruyama step of a flow SDE always belongs to the prior; leave last_step='prior'.")
    # An Euler-Maruyama step never lands on noise 0; nothing is left to explain its last noise, so the prior draws it.
    return chain


def _set_timesteps(scheduler: Any, options: Options) -> None:
    config = scheduler.config
    if config.use_dynamic_shifting or config.invert_sigmas:
        raise ValueError(
            "FlowMatchEulerDiscreteScheduler with use_dynamic_shifting or invert_sigmas is not covered: the first makes the"
            " table depend on the image size, the second reverses it. Set a fixed `shift` instead."
        )
    if options.timesteps is None:
        scheduler.set_timesteps(options.num_steps)
        return
    # The scheduler shifts sigmas that it is given; undo that, so that the labels are the user's.
    t = np.asarray(options.timesteps, dtype=np.float64) / config.num_train_timesteps
    scheduler.set_timesteps(sigmas=(t / (scheduler.shift - (scheduler.shift - 1) * t)).tolist())


def _noise_level(options: Options) -> float:
    """The a of g² = a² t / (1 - t)."""
    if options.noise not in ("flow_grpo", "memoryless"):
        raise ValueError(f"noise {options.noise!r} is unknown; a flow SDE takes 'memoryless' or 'flow_grpo'.")
    if options.noise == "flow_grpo" and options.noise_level <= 0:
        level = f"{options.noise_level:g}"
        raise ValueError(f"noise_level is {level}: a flow without noise has no density; use 0.7, Flow-GRPO's own.")
    return math.sqrt(2.0) if options.noise == "memoryless" else options.noise_level


def _euler_maruyama(
    sigmas: Float[Tensor, " states"], level: float
) -> tuple[Float[Tensor, " states-1"], Float[Tensor, " states-1"], Float[Tensor, " states-1"]]:
    """(c, d, sigma) of the SDE at the levels t = sigmas."""
    here, there = sigmas[:-1], sigmas[1:]
    # At t = 1 the noise is infinite; the next level stands in, as in Flow-GRPO's own sampler.
    bounded = torch.where(here < 1, here, sigmas[1])
    diffusion = level**2 * here / (1 - bounded)
    dt = there - here
    drift = diffusion / (2 * here)
    # mu = s + [v + drift (s + (1 - t) v)] dt with v = (s - x_hat) / t
    on_v = (1 + drift * (1 - here)) * dt / here
    return 1 + drift * dt + on_v, -on_v, (diffusion * -dt).sqrt()


def _stochastic_step(scheduler: Any) -> SchedulerStep:
    def step(out: States, t: Timestep, s: States, g: torch.Generator) -> States:
        # This scheduler draws its noise from torch's global generator, whatever generator it is given.
        with forked_rng():
            torch.random.set_rng_state(g.get_state())
            return scheduler.step(out, t, s, return_dict=False)[0]

    return step
