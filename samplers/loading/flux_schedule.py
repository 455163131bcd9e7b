"""The schedule of a Flux pipeline: sigmas 1 to 1/K, shifted by how many patches an image has."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np


def flux_schedule(scheduler: Any, shape: tuple[int, ...], steps: int) -> tuple[Any, tuple[float, ...]]:
    """(the scheduler with this image size's shift as a fixed one, its timesteps).

    The pipeline moves sigma to e^m sigma / (1 + (e^m - 1) sigma), with m linear in the number of patches. That is a fixed shift
    of e^m, which needs no image size.

    Errors: ValueError for a shift of another kind.
    """
    config = scheduler.config
    shift = float(config.shift)
    if config.use_dynamic_shifting:
        if config.get("time_shift_type", "exponential") != "exponential":
            raise ValueError(f"the scheduler shifts its sigmas by {config.time_shift_type!r}; exponential shifts are covered.")
        patches = shape[1] * shape[2] // 4
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        shift = math.exp(low + (high - low) * (patches - few) / (many - few))
        scheduler = cast(Any, type(scheduler)).from_config(config, use_dynamic_shifting=False, shift=shift)
    sigma = np.linspace(1.0, 1 / steps, steps)
    moved = shift * sigma / (1 + (shift - 1) * sigma)
    return scheduler, tuple((moved * config.num_train_timesteps).tolist())
