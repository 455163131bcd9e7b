"""The chain of DDIMScheduler."""

from __future__ import annotations

from typing import Any

import torch

from ..chain import Chain
from .alpha_bar import alphas, clip_bound, nominal_levels, prediction
from .check import checked
from .options import Options, refuse_custom_timesteps


def ddim_chain(scheduler: Any, options: Options) -> Chain:
    """The step of Song et al. (arXiv 2010.02502, eq. 12 and 16), with noise eta > 0."""
    eta = options.eta
    refuse_custom_timesteps(scheduler, options)
    if eta <= 0:
        raise ValueError(
            f"DDIM with eta={eta:g} is deterministic, so policy and prior have no densities to compare; set eta in (0, 1]."
            " eta=1 also forgets its start, which a small eta does not."
        )
    scheduler.set_timesteps(options.num_steps)
    labels, alpha_bars = alphas(scheduler)
    previous = labels - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha_bar = alpha_bars[labels]
    final = scheduler.final_alpha_cumprod
    alpha_bar_next = torch.where(previous >= 0, alpha_bars[previous.clamp(min=0)], final)
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    sigma = eta * variance.sqrt()
    kind, clip = scheduler.config.prediction_type, clip_bound(scheduler)
    p, q = prediction(kind, alpha_bar)
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
    levels = nominal_levels(alpha_bar, alpha_bar_next)
    return checked(
        scheduler,
        lambda out, t, s, g: scheduler.step(out, t, s, eta=eta, generator=g, return_dict=False)[0],
        options.last_step,
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
            trained=tuple(range(len(p) - 1)),
        ),
    )
