"""The pinned Brownian chain."""

from __future__ import annotations

import math

import torch

from ..chain import Chain


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
        trained=tuple(range(num_steps)),
    )
