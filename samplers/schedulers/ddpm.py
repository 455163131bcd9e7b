"""The chain of DDPMScheduler."""

from __future__ import annotations

from typing import Any

import torch

from ..chain import Chain
from .alpha_bar import alphas, clip_bound, nominal_levels, prediction
from .check import checked
from .options import Options


def ddpm_chain(scheduler: Any, options: Options) -> Chain:
    """The ancestral step of Ho et al. (arXiv 2006.11239, eq. 7), with fixed small or large variance."""
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
    if options.timesteps is None:
        scheduler.set_timesteps(options.num_steps)
    else:
        scheduler.set_timesteps(timesteps=[int(t) for t in options.timesteps])
    labels, alpha_bars = alphas(scheduler)
    previous = torch.tensor([int(scheduler.previous_timestep(t)) for t in labels])
    alpha_bar = alpha_bars[labels]
    alpha_bar_next = torch.where(previous >= 0, alpha_bars[previous.clamp(min=0)], 1.0)
    alpha = alpha_bar / alpha_bar_next
    beta = 1 - alpha
    variance = beta
    if config.variance_type != "fixed_large":
        variance = (1 - alpha_bar_next) / (1 - alpha_bar) * beta
    p, q = prediction(config.prediction_type, alpha_bar)
    signal, noise = nominal_levels(alpha_bar, alpha_bar_next)
    return checked(
        scheduler,
        lambda out, t, s, g: scheduler.step(out, t, s, generator=g, return_dict=False)[0],
        options.last_step,
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
            clip=clip_bound(scheduler),
            trained=tuple(range(len(p) - 1)),
        ),
    )
