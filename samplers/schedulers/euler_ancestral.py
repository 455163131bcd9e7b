"""The chain of EulerAncestralDiscreteScheduler."""

from __future__ import annotations

from typing import Any

import torch

from ..chain import Chain
from ..shapes import States, Timestep
from .check import checked
from .options import Options, refuse_custom_timesteps


def euler_ancestral_chain(scheduler: Any, options: Options) -> Chain:
    """The ancestral Euler step of k-diffusion's `sample_euler_ancestral`: s = x + sigma eps, no clipping."""
    refuse_custom_timesteps(scheduler, options)
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"EulerAncestralDiscreteScheduler steps 'epsilon' and 'v_prediction' only, not {kind!r}.")
    scheduler.set_timesteps(options.num_steps)
    sigmas = scheduler.sigmas.cpu()
    here, there = sigmas[:-1], sigmas[1:]
    up = (there**2 * (here**2 - there**2) / here**2).sqrt()
    down = (there**2 - up**2).clamp(min=0).sqrt()
    ones = torch.ones_like(here)
    if kind == "epsilon":
        p, q = ones, -here
    else:
        p, q = 1 / (here**2 + 1), -here / (here**2 + 1).sqrt()

    def step(out: States, t: Timestep, s: States, g: torch.Generator) -> States:
        scheduler.scale_model_input(s, t)
        return scheduler.step(out, t, s, generator=g, return_dict=False)[0]

    return checked(
        scheduler,
        step,
        options.last_step,
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
            trained=tuple(range(len(p) - 1)),
        ),
    )
