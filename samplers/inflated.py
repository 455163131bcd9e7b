"""Rollouts of a policy with more noise than its kernels have: exploration whose density stays known."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .denoiser import Denoiser
from .prior import Prior
from .rollout import draw_start, step, step_noise
from .trajectory import Trajectories


@torch.no_grad()
def inflated_rollout(
    prior: Prior,
    policy: Denoiser,
    batch: int,
    generator: torch.Generator,
    scale: float,
    *,
    start: Tensor | None = None,
    on_step: Callable[[], None] | None = None,
) -> Trajectories:
    """``batch`` trajectories of the policy with the noise of every trained step times ``scale``; the start's stays as it is.

    start, on_step: as in `rollout`. Returns trajectories whose ``log_behavior`` has the inflated noise's density in it, and whose
    ``step_log_ratio`` is the policy's own. No gradient is kept.
    """
    chain = prior.chain
    state = draw_start(prior, batch, generator) if start is None else start.to(prior.device)
    # Written in place: a list of states and their stack would hold every trajectory twice.
    states, inflation = state.new_empty((chain.num_steps + 1, *state.shape)), state.new_zeros(len(state))
    states[0] = state
    ratios: list[Tensor] = []
    for k in range(chain.num_steps):
        if on_step is not None:
            on_step()
        noise = step_noise(chain, k, state, generator)
        if k in chain.trained:
            assert noise is not None
            noise = noise * scale
            inflation = inflation + _inflation(noise, scale)
        state, ratio = step(prior, policy, state, k, noise)
        states[k + 1] = state
        if ratio is not None:
            ratios.append(ratio)
    log_ratio = torch.stack(ratios)
    return Trajectories(states=states, step_log_ratio=log_ratio, log_behavior=log_ratio.sum(0) + inflation)


def _inflation(noise: Tensor, scale: float) -> Tensor:
    """log N(noise; 0, scale²) - log N(noise; 0, 1), [N]."""
    flat = noise.flatten(1)
    return 0.5 * (1 - scale**-2) * flat.square().sum(1) - flat.shape[1] * math.log(scale)
