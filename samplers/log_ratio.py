"""Log-ratios of stored trajectories, over flat rows (k, b): all trained steps k of all trajectories b, k slowest."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from .chain import Chain
from .condition import Condition, selected
from .denoiser import Denoiser, evaluate
from .shapes import Index, States
from .trajectory import Trajectories, rows_at_once

Target = Callable[[States, Index, States, Condition | None], States]


def rows_of(trajectories: Trajectories, chain: Chain, rows: slice) -> tuple[States, States, Index, Condition | None]:
    """Flat (k, b) rows → (state, next state, step, condition of each or None), k slowest.

    k counts the trained steps, as the rows of a matrix of log-ratios do.
    """
    batch = len(trajectories)
    first, stop, _ = rows.indices(chain.num_kernels * batch)
    row = torch.arange(first, stop, device=trajectories.states.device)
    begin, end = (chain.trained[i // batch] * batch + i % batch for i in (first, stop - 1))
    if end - begin != stop - 1 - first:
        return rows_at(trajectories, chain, row)
    # Steps that follow one another lie beside one another: views, where an index would copy.
    flat, step = trajectories.states.flatten(0, 1), chain.step_of_row(torch.div(row, batch, rounding_mode="floor"))
    condition = selected(trajectories.condition, row % batch)
    return flat[begin : end + 1], flat[begin + batch : end + 1 + batch], step, condition


def rows_at(trajectories: Trajectories, chain: Chain, row: Index) -> tuple[States, States, Index, Condition | None]:
    """The same of any flat rows, copied."""
    batch = len(trajectories)
    step, path = chain.step_of_row(torch.div(row, batch, rounding_mode="floor")), row % batch
    flat, at = trajectories.states.flatten(0, 1), step * batch + path
    return flat[at], flat[at + batch], step, selected(trajectories.condition, path)


@torch.no_grad()
def step_log_ratio(
    chain: Chain,
    prior: Denoiser,
    policy: Denoiser,
    trajectories: Trajectories,
    chunk: int | None = None,
) -> Float[Tensor, " kernels batch"]:
    """Log-ratios of stored trajectories, over flat chunks of (k, b): the policy's network is evaluated, and the prior's where the
    trajectories do not hold its outputs."""
    known = None if trajectories.prior_outputs is None else trajectories.prior_outputs.flatten(0, 1)
    ratios: list[Tensor] = []
    for rows in _chunks(trajectories, chain, chunk):
        state, following, step, condition = rows_of(trajectories, chain, rows)
        prior_output = evaluate(prior, chain, state, step, condition) if known is None else known[rows]
        policy_output = evaluate(policy, chain, state, step, condition)
        z = chain.kernel.standardize(following, state, step, prior_output)
        shift = chain.kernel.shift(state, step, policy_output, prior_output)
        ratios.append(chain.kernel.log_ratio_from_states(z, shift))
    return torch.cat(ratios).reshape(chain.num_kernels, len(trajectories))


@torch.no_grad()
def shift_moments(
    chain: Chain,
    policy: Denoiser,
    trajectories: Trajectories,
    prior_outputs: States,
    target: Target | None = None,
) -> Float[Tensor, " moments batch"]:
    """Two or three moments of stored trajectories, each summed over their trained steps: <z, delta>, ½ ||delta||² and, with a
    target, <delta_target, delta>.

    prior_outputs: those of the prior at their states (`outputs`). target: (state, step, prior output, condition)
    → a shift.
    """
    found: list[Tensor] = []
    for rows in _chunks(trajectories, chain):
        state, following, step, condition = rows_of(trajectories, chain, rows)
        prior_output = prior_outputs[rows]
        shift = chain.kernel.shift(state, step, evaluate(policy, chain, state, step, condition), prior_output)
        others = [chain.kernel.standardize(following, state, step, prior_output), 0.5 * shift]
        if target is not None:
            others.append(target(state, step, prior_output, condition))
        found.append(torch.stack([(shift * other).flatten(1).sum(1) for other in others]))
    return torch.cat(found, 1).reshape(-1, chain.num_kernels, len(trajectories)).double().sum(1)


@torch.no_grad()
def outputs(chain: Chain, denoiser: Denoiser, trajectories: Trajectories) -> States:
    """The outputs of a network at the states of stored trajectories, step by step: kernels · batch rows."""
    found: list[Tensor] = []
    for rows in _chunks(trajectories, chain):
        state, _, step, condition = rows_of(trajectories, chain, rows)
        found.append(evaluate(denoiser, chain, state, step, condition))
    return torch.cat(found)


def _chunks(trajectories: Trajectories, chain: Chain, size: int | None = None) -> Iterator[slice]:
    """Slices of the flat (k, b) rows, of ``size`` or of as many as pass a network at once."""
    size = size or rows_at_once(tuple(trajectories.states.shape[2:]), trajectories.states.device)
    for first in range(0, chain.num_kernels * len(trajectories), size):
        yield slice(first, first + size)
