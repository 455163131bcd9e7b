"""Rollouts of a policy with more noise than its kernels have: exploration whose density stays known."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from .denoiser import Denoiser
from .prior import Prior
from .rollout import rollout, step_noise
from .shapes import States
from .trajectory import Trajectories


def inflated_rollout(
    prior: Prior,
    policy: Denoiser,
    batch: int,
    generator: torch.Generator,
    scale: float,
    *,
    start: Float[Tensor, " {batch} *state"] | None = None,
    on_step: Callable[[], None] | None = None,
) -> Trajectories:
    """``batch`` trajectories of the policy with the noise of every trained step times ``scale``; the start's stays as it is.

    start, on_step: as in `rollout`. Returns trajectories whose ``log_behavior`` has the inflated noise's density in it, and whose
    ``step_log_ratio`` is the policy's own. No gradient is kept.
    """
    inflations: list[Tensor] = []

    def inflated(k: int, state: States) -> States | None:
        noise = step_noise(prior.chain, k, state, generator)
        if k not in prior.chain.trained:
            return noise
        assert noise is not None
        noise = noise * scale
        inflations.append(_inflation(noise, scale))
        return noise

    drawn = rollout(prior, policy, batch, generator, start=start, noise=inflated, on_step=on_step)
    assert drawn.log_behavior is not None
    return drawn.with_(log_behavior=drawn.log_behavior + reduce(torch.add, inflations))


def _inflation(noise: States, scale: float) -> Float[Tensor, " n"]:
    """log N(noise; 0, scale²) - log N(noise; 0, 1)."""
    flat = noise.flatten(1)
    return 0.5 * (1 - scale**-2) * flat.square().sum(1) - flat.shape[1] * math.log(scale)
