"""What DDPM and DDIM share: levels given by alpha_bar, s = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) eps."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def prediction(kind: str, alpha_bar: Float[Tensor, " steps"]) -> tuple[Float[Tensor, " steps"], Float[Tensor, " steps"]]:
    """(p, q) with x_hat = p s + q out under s = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) eps."""
    signal, noise = alpha_bar.sqrt().double(), (1 - alpha_bar).sqrt().double()
    if kind == "epsilon":
        return 1 / signal, -noise / signal
    if kind == "v_prediction":
        return signal, -noise
    if kind == "sample":
        return torch.zeros_like(signal), torch.ones_like(signal)
    raise ValueError(f"prediction_type {kind!r} is unknown; a chain covers 'epsilon', 'v_prediction' and 'sample'.")


def nominal_levels(
    alpha_bar: Float[Tensor, " steps"], following: Float[Tensor, " steps"]
) -> tuple[Float[Tensor, " steps+1"], Float[Tensor, " steps+1"]]:
    """signal and noise: what each evaluated step assumes of its state, then the last step's result."""
    levels = torch.cat([alpha_bar, following[-1:]])
    return levels.double().sqrt(), (1 - levels.double()).clamp(min=0).sqrt()


def alphas(scheduler: Any) -> tuple[Int[Tensor, " steps"], Float[Tensor, " train_steps"]]:
    """(the timesteps as integers, alpha_bar of every training step), as the scheduler has them set.

    Errors: ValueError for timesteps beyond the training steps.
    """
    labels = scheduler.timesteps.cpu().long()
    if labels.max() >= len(scheduler.alphas_cumprod):
        raise ValueError(
            f"timestep {labels.max().item()} lies outside the schedule of {len(scheduler.alphas_cumprod)} training steps;"
            " steps_offset is too large for this number of steps."
        )
    # Kept in the scheduler's float32: 1 - a/b of neighbouring levels cancels, and the chain is what the scheduler runs.
    return labels, scheduler.alphas_cumprod.cpu()


def clip_bound(scheduler: Any) -> float | None:
    """The bound of x_hat, None where the scheduler does not clip."""
    return float(scheduler.config.clip_sample_range) if scheduler.config.clip_sample else None
