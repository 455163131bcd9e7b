"""Trajectories forward along the chain, and terminal samples noised back along it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .chain import SIGMA_ZERO
from .denoiser import Denoiser, evaluate
from .log_ratio import log_ratio_from_noise, log_ratio_from_states
from .prior import Prior
from .trajectory import Trajectories


@torch.no_grad()
def rollout(
    prior: Prior,
    policy: Denoiser | None,
    batch: int,
    generator: torch.Generator,
    *,
    noise_scale: float = 1.0,
    start: Tensor | None = None,
    condition: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    keep: bool = True,
    compared: Denoiser | None = None,
    on_step: Callable[[], None] | None = None,
) -> Trajectories:
    """Draw ``batch`` trajectories from the policy, or from the prior where ``policy`` is None.

    noise_scale: > 1 inflates the noise of every kernel (not of the start); ``log_behavior`` stays exact.
    start: [batch, ...] fixed starts; drawn where None.
    keep: False keeps only the terminal samples (``states`` is then [1, batch, ...]).
    compared: a policy whose log-ratio on the *prior's* own trajectories is wanted; it draws nothing.
    on_step: called before every kernel; what it raises ends the rollout.

    Returns trajectories with ``log_behavior`` and, from or compared with a policy, ``step_log_ratio`` set. No gradient is kept.
    """
    assert policy is None or compared is None, "a policy's own trajectories have its log-ratio already"
    chain, device = prior.chain, prior.device

    def gaussian() -> Tensor:
        return torch.randn((batch, *prior.shape), generator=generator, device=device, dtype=dtype)

    state = chain.start_std * gaussian() if start is None else start.to(device=device, dtype=dtype)
    # Written in place: a list of states and their stack would hold every trajectory twice.
    states = state.new_empty((chain.num_steps + 1 if keep else 1, *state.shape))
    states[0] = state
    ratios = []
    inflation = torch.zeros(batch, device=device, dtype=dtype)
    for step in range(chain.num_kernels):
        if on_step is not None:
            on_step()
        row = chain.row(step, state)
        noise = gaussian() * noise_scale if noise_scale != 1.0 else gaussian()
        prior_output = evaluate(prior.denoiser, chain, state, step, condition)
        if policy is None:
            mean = chain.mean(state, step, prior_output)
            if compared is not None:
                shift = chain.kernel_shift(state, step, evaluate(compared, chain, state, step, condition), prior_output)
                ratios.append(log_ratio_from_states(noise, shift))
        else:
            policy_output = evaluate(policy, chain, state, step, condition)
            mean = chain.mean(state, step, policy_output)
            shift = chain.kernel_shift(state, step, policy_output, prior_output)
            ratios.append(log_ratio_from_noise(noise, shift))
        if noise_scale != 1.0:
            inflation = inflation + _inflation(noise, noise_scale)
        state = mean + row.sigma * noise
        if keep:
            states[step + 1] = state
    for step, following in enumerate(decoded(prior, state, generator, condition), chain.num_kernels + 1):
        state = following
        if keep:
            states[step] = state
    states[-1] = state
    step_log_ratio = torch.stack(ratios) if ratios else None
    return Trajectories(
        states=states,
        step_log_ratio=step_log_ratio,
        log_behavior=inflation if step_log_ratio is None or policy is None else step_log_ratio.sum(0) + inflation,
        condition=condition,
    )


def in_parts(count: int, steps: int, on_progress: Callable[[int], None] | None) -> Callable[[], None]:
    """What to call with every one of ``steps`` steps, so that ``on_progress`` receives ``count`` in all."""
    taken = iter(range(steps))

    def step() -> None:
        if on_progress is not None:
            k = next(taken)
            on_progress(count * (k + 1) // steps - count * k // steps)

    return step


def _inflation(noise: Tensor, scale: float) -> Tensor:
    """log N(noise; 0, scale²) - log N(noise; 0, 1), [N]."""
    flat = noise.flatten(1)
    return 0.5 * (1 - scale**-2) * flat.square().sum(1) - flat.shape[1] * math.log(scale)


@torch.no_grad()
def decoded(prior: Prior, state: Tensor, generator: torch.Generator, condition: Tensor | None = None) -> list[Tensor]:
    """The states that follow the last kernel's [N, ...], by the chain's rows that belong to the prior; the last is the sample."""
    chain, states = prior.chain, []
    for step in range(chain.num_kernels, chain.num_steps):
        output = evaluate(prior.denoiser, chain, state, step, condition)
        state, sigma = chain.mean(state, step, output), chain.row(step, state).sigma
        if sigma >= SIGMA_ZERO:
            state = state + sigma * torch.randn(state.shape, generator=generator, device=state.device, dtype=state.dtype)
        states.append(state)
    return states


@torch.no_grad()
def noise_back(prior: Prior, samples: Tensor, generator: torch.Generator, condition: Tensor | None = None) -> Trajectories:
    """Fresh trajectories that end at given samples [B, ...]: s_0 ~ N(a_0 x, b_0²), s_{k+1} = c s_k + d x + tau eps.

    Where the last rows are a decoder the trajectory ends at what they make, not at the given sample, since that is the
    sample the chain would give: evaluate the energy there. Their behavior density is unknown (None).
    """
    chain = prior.chain
    c, d, tau = (column.tolist() for column in chain.bridge)

    def gaussian() -> Tensor:
        return torch.randn(samples.shape, generator=generator, device=samples.device, dtype=samples.dtype)

    if chain.start_std == 0.0:
        state = torch.zeros_like(samples)
    else:
        state = chain.signal[0].item() * samples + chain.noise[0].item() * gaussian()
    states = [state]
    for step in range(chain.num_kernels):
        state = c[step] * state + d[step] * samples
        if tau[step] > 0:
            state = state + tau[step] * gaussian()
        states.append(state)
    states += decoded(prior, state, generator, condition)
    return Trajectories(states=torch.stack(states), condition=condition)
