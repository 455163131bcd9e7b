"""log policy - log prior of Gaussian kernels, in difference form: nats, summed over dimensions, float32.

Two log-densities are never subtracted. With z = (s' - mu_prior) / sigma and delta = (mu_policy - mu_prior) / sigma,

    l = <z, delta> - ½ ||delta||²          from stored states
    l = <eps, delta> + ½ ||delta||²        from the noise that the policy itself drew  (z = eps + delta)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from einops import rearrange
from torch import Tensor

from .chain import Chain
from .denoiser import Denoiser, evaluate
from .trajectory import Trajectories, rows_at_once


def log_ratio_from_noise(noise: Tensor, shift: Tensor) -> Tensor:
    """<eps, delta> + ½ ||delta||²; noise, shift: [N, ...] → [N]. On-policy only: ``noise`` is what the policy drew."""
    return (shift * torch.add(noise, shift, alpha=0.5)).flatten(1).sum(1)


def log_ratio_from_states(z: Tensor, shift: Tensor) -> Tensor:
    """<z, delta> - ½ ||delta||²; z = (s' - mu_prior) / sigma, shift: [N, ...] → [N]. Any trajectory."""
    return (shift * torch.sub(z, shift, alpha=0.5)).flatten(1).sum(1)


def rows_of(trajectories: Trajectories, chain: Chain, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Flat (k, b) rows → (state [n, ...], next state [n, ...], step [n], condition [n, ...] or None), k slowest."""
    batch = len(trajectories)
    total = chain.num_kernels * batch
    state, following = (
        rearrange(part[: chain.num_kernels], "k b ... -> (k b) ...")[rows]
        for part in (trajectories.states[:-1], trajectories.states[1:])
    )
    index = torch.arange(*rows.indices(total), device=state.device)
    condition = None if trajectories.condition is None else trajectories.condition[index % batch]
    return state, following, torch.div(index, batch, rounding_mode="floor"), condition


@torch.no_grad()
def step_log_ratio(
    chain: Chain,
    prior: Denoiser,
    policy: Denoiser,
    trajectories: Trajectories,
    chunk: int | None = None,
) -> Tensor:
    """[num_kernels, B] log-ratios of stored trajectories, both networks evaluated over flat chunks of (k, b)."""
    ratios = []
    for rows in _chunks(trajectories, chain, chunk):
        state, following, step, condition = rows_of(trajectories, chain, rows)
        prior_output = evaluate(prior, chain, state, step, condition)
        policy_output = evaluate(policy, chain, state, step, condition)
        z = chain.standardize(following, state, step, prior_output)
        ratios.append(log_ratio_from_states(z, chain.kernel_shift(state, step, policy_output, prior_output)))
    return torch.cat(ratios).reshape(chain.num_kernels, len(trajectories))


@torch.no_grad()
def shift_moments(
    chain: Chain,
    policy: Denoiser,
    trajectories: Trajectories,
    prior_outputs: Tensor,
    target: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """[2 or 3, B] of stored trajectories, summed over their kernels: <z, delta>, ½ ||delta||² and <delta_target, delta>.

    prior_outputs: [num_kernels · B, ...] of the prior at their states (`outputs`). target: (state, step, prior output) → a shift.
    """
    found = []
    for rows in _chunks(trajectories, chain):
        state, following, step, condition = rows_of(trajectories, chain, rows)
        prior_output = prior_outputs[rows]
        shift = chain.kernel_shift(state, step, evaluate(policy, chain, state, step, condition), prior_output)
        others = [chain.standardize(following, state, step, prior_output), 0.5 * shift]
        if target is not None:
            others.append(target(state, step, prior_output))
        found.append(torch.stack([(shift * other).flatten(1).sum(1) for other in others]))
    return torch.cat(found, 1).reshape(-1, chain.num_kernels, len(trajectories)).double().sum(1)


@torch.no_grad()
def outputs(chain: Chain, denoiser: Denoiser, trajectories: Trajectories) -> Tensor:
    """[num_kernels · B, ...] of a network at the states of stored trajectories, step by step."""
    found = []
    for rows in _chunks(trajectories, chain):
        state, _, step, condition = rows_of(trajectories, chain, rows)
        found.append(evaluate(denoiser, chain, state, step, condition))
    return torch.cat(found)


def _chunks(trajectories: Trajectories, chain: Chain, size: int | None = None) -> Iterator[slice]:
    """Slices of the flat (k, b) rows, of ``size`` or of as many as pass a network at once."""
    size = size or rows_at_once(tuple(trajectories.states.shape[2:]), trajectories.states.device)
    for first in range(0, chain.num_kernels * len(trajectories), size):
        yield slice(first, first + size)
