"""The exact gradient of an objective in two passes, at memory that does not grow with the number of steps.

    pass 1   g = dL/dl on the [num_kernels, B] matrix of log-ratios, by autograd; log Z gets its gradient here
    pass 2   for chunks of (k, b):  (g · log policy(s_{k+1} | s_k)).sum().backward()

The prior's share of l does not depend on the parameters, so pass 2 needs the policy only: one forward and backward a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ...samplers.chain import Chain
from ...samplers.condition import Condition
from ...samplers.denoiser import evaluate
from ...samplers.log_ratio import rows_at, rows_of
from ...samplers.shapes import AnyShape, Index, States
from ...samplers.trajectory import Trajectories
from ...samplers.typed import backward
from .batch import Batch
from .objective_table import Objective

Gather = Callable[[Shaped[Tensor, " batch ..."]], Shaped[Tensor, " gathered ..."]]
Scale = Callable[[AnyShape], AnyShape]  # that of a gradient scaler
NoSync = Callable[[], AbstractContextManager[Any]]
Sampled = tuple[Index, Float[Tensor, " n"]]
# More rows a chunk bring no more throughput, but push a small network's activations out of the processor's cache.
MAX_CHUNK = 2048


def objective_gradient(
    objective: Objective,
    batch: Batch,
    alpha: float,
    log_z: Float[Tensor, " conditions"] | Float[Tensor, ""],
    huber: float | None = None,
    *,
    gather: Gather | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Float[Tensor, ""], dict[str, AnyShape]]:
    """Pass 1: the loss and its gradient by the named leaves that it depends on. ``batch`` is this process's.

    log_z: one for each condition. The loss is the mean over the conditions that have two valid trajectories here, each with its
    own log Z, baseline and weights. gather: concatenates the tensors of all processes in rank order (accelerate's ``gather``).

    "step_log_ratio": g [num_kernels, B], this process's columns of the global gradient times ``world_size``, since data-parallel
    training averages gradients; "soft_value" likewise, where the objective learns it. "log_z": [G] global already and the same on
    every process, so it must never be reduced again.
    """
    local = batch.step_log_ratio.shape[1]
    if gather is not None and world_size > 1:
        behavior, value, old = batch.log_behavior, batch.soft_value, batch.old_step_log_ratio
        batch = Batch(
            step_log_ratio=gather(batch.step_log_ratio.T.contiguous()).T,
            energy=gather(batch.energy),
            valid=gather(batch.valid),
            log_behavior=None if behavior is None else gather(behavior),
            soft_value=None if value is None else gather(value.T.contiguous()).T,
            group=None if batch.group is None else gather(batch.group),
            old_step_log_ratio=None if old is None else gather(old.T.contiguous()).T,
        )
    values = {"step_log_ratio": batch.step_log_ratio, "log_z": log_z.reshape(-1)}
    if objective.learns_soft_value:
        assert batch.soft_value is not None
        values["soft_value"] = batch.soft_value
    leaves = {name: value.detach().requires_grad_(True) for name, value in values.items()}
    free = {name: leaf for name, leaf in leaves.items() if name != "log_z"}
    loss = _loss(objective, replace(batch, **free), alpha, leaves["log_z"], huber)
    found = cast(tuple[Tensor | None, ...], torch.autograd.grad(loss, list(leaves.values()), allow_unused=True))
    gradients = {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}
    columns = slice(rank * local, (rank + 1) * local)
    return loss.detach(), gradients | {name: gradients[name][:, columns] * world_size for name in free}


def _loss(
    objective: Objective, batch: Batch, alpha: float, log_z: Float[Tensor, " conditions"], huber: float | None
) -> Float[Tensor, ""]:
    if len(log_z) == 1:
        return objective.loss(batch, alpha, log_z[0], huber)
    parts = zip(log_z, batch.groups(len(log_z)), strict=True)
    usable = [(own, index) for own, index in parts if batch.valid[index].sum() > 1]  # one alone has no baseline
    return torch.stack([objective.loss(batch.select(index), alpha, own, huber) for own, index in usable]).mean()


def backward_rows(
    policy: nn.Module,
    chain: Chain,
    state: States,
    following: States,
    step: Index,
    g: Float[Tensor, " n"],
    condition: Condition | None,
) -> Float[Tensor, ""]:
    """Accumulate the gradient of sum_n g_n log policy(following_n | state_n); returns that sum up to a constant."""
    output = evaluate(policy, chain, state, step, condition)
    density = chain.kernel.log_density(following, state, step, output)
    backward(density, g)
    return (g * density.detach()).sum()


def backward_likelihood(
    policy: nn.Module,
    chain: Chain,
    prior_output: States,
    state: States,
    following: States,
    step: Index,
    weight: Float[Tensor, " n"],
    control: Float[Tensor, " n"],
    condition: Condition | None = None,
) -> Float[Tensor, ""]:
    """Accumulate the gradient of sum_n [-weight_n l_n + control_n <z_n, delta_n>]; returns that sum.

    l = <z, delta> - ½ |delta|² is the log-ratio of ``following``. Where that comes from the prior's kernel, <z, delta> has mean
    0 given the state, so that a control which depends on the state alone changes the variance and not the mean.
    """
    output = evaluate(policy, chain, state, step, condition)
    shift = chain.kernel.shift(state, step, output, prior_output).flatten(1)
    z = chain.kernel.standardize(following, state, step, prior_output).flatten(1)
    total = (0.5 * weight * shift.square().sum(1) - (weight - control) * (z * shift).sum(1)).sum()
    backward(total)
    return total.detach()


def backward_trajectories(
    policy: nn.Module,
    chain: Chain,
    trajectories: Trajectories,
    g: Float[Tensor, " kernels batch"],
    chunk: int,
    no_sync: NoSync = nullcontext,
    last: NoSync = nullcontext,
    sampled: Sampled | None = None,
) -> None:
    """Pass 2: accumulate the gradient of sum g · log policy over stored trajectories, ``chunk`` rows at a time.

    no_sync, last: what goes around the forward and backward of all chunks but the last, and of the last. sampled: rows and their
    weights (`sampled_steps`), which stand for all of them."""
    flat = g.flatten() if sampled is None else g.flatten()[sampled[0]] * sampled[1]
    for first in range(0, len(flat), chunk):
        rows = slice(first, first + chunk)
        found = rows_of(trajectories, chain, rows) if sampled is None else rows_at(trajectories, chain, sampled[0][rows])
        state, following, step, condition = found
        with no_sync() if first + chunk < len(flat) else last():
            backward_rows(policy, chain, state, following, step, flat[rows], condition)


class _Enough(Exception):
    """What is kept exceeds the budget already."""


def chunk_rows(
    policy: nn.Module, chain: Chain, trajectories: Trajectories, budget_mb: float, most: int = MAX_CHUNK, total: int | None = None
) -> int:
    """Rows a chunk so that what autograd keeps fits ``budget_mb``: measured on the network, not guessed.

    most: the upper bound. total: the rows there are to work through, those of the trajectories where None.

    Deterministic for a network, so that a run repeats bit for bit. Gradient checkpointing is left out of the measurement: it
    keeps less, but recomputes a whole block at once, which would not show. A large network, of which one row alone exceeds the
    budget, is measured no further than that.
    """
    rows = chain.num_kernels * len(trajectories)
    total = rows if total is None else total
    kept: dict[int, Any] = {}
    total_kept, enough = 0, math.inf

    def measure(tensor: AnyShape) -> AnyShape:
        # Held on to, and not known by its address: the weights of a policy in shards come and go, and addresses with them.
        nonlocal total_kept
        storage = tensor.untyped_storage()
        if storage._cdata not in kept:  # pyright: ignore[reportPrivateUsage]
            kept[storage._cdata] = storage  # pyright: ignore[reportPrivateUsage]
            total_kept += storage.nbytes()
        if total_kept > enough:
            raise _Enough
        return tensor.detach()  # the graph and an output that it keeps would hold each other for ever

    def bytes_for(count: int) -> int:
        nonlocal total_kept
        kept.clear()
        total_kept = 0
        state, _, step, condition = rows_of(trajectories, chain, slice(0, count))
        checkpointed = [module for module in policy.modules() if getattr(module, "gradient_checkpointing", False)]
        for module in checkpointed:
            setattr(module, "gradient_checkpointing", False)  # noqa: B010 - a diffusers attribute, not a module's
        try:
            with torch.autograd.graph.saved_tensors_hooks(measure, lambda tensor: tensor):
                evaluate(policy, chain, state, step, condition)
        finally:
            for module in checkpointed:
                setattr(module, "gradient_checkpointing", True)  # noqa: B010
        return total_kept

    enough = budget_mb * 2**20 + sum(weight.numel() * weight.element_size() for weight in policy.parameters())
    try:
        bytes_for(1)
    except _Enough:
        return 1
    enough = math.inf
    few, more = min(2, rows), min(6, rows)
    if more == few:
        return min(total, most)
    # The difference leaves the weights, which are kept once whatever the chunk, out of the count.
    per_row = max(1.0, (bytes_for(more) - bytes_for(few)) / (more - few))
    return int(min(total, most, max(1, budget_mb * 2**20 // per_row)))
