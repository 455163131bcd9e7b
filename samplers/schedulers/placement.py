"""Timesteps placed where the most happens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
    alpha_bar: NDArray[np.float64] = scheduler.alphas_cumprod.double().cpu().numpy()
    level = 0.5 * (np.log(alpha_bar) - np.log1p(-alpha_bar))  # descending in the timestep
    grid = np.linspace(*log_snr, 4096)
    density = np.ones_like(grid)
    if profile is not None:
        values = np.maximum(np.asarray(profile[1], dtype=np.float64), 0.0)
        measured = np.interp(grid, profile[0], values, 0.0, 0.0) ** power
        density = (1 - even) * measured / measured.mean() + even
    cumulative = np.cumsum(density) - density[0]
    total: float = cumulative[-1]
    wanted = np.interp(np.linspace(0, total, num_steps), cumulative, grid)
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
