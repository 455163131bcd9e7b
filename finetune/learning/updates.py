"""The updates: behavior → trajectories → energies → log-ratios → objective → two-pass gradient → step → metrics."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ...samplers.log_ratio import step_log_ratio
from ...samplers.shapes import AnyShape
from ...samplers.trajectory import Trajectories
from ..distributed.signals import uninterrupted
from .batch import Batch
from .batch_metrics import batch_metrics
from .behaviors import NEEDS_POPULATION
from .critic import VALUE_STEPS
from .drawing import draw_batch
from .drift import over_budget
from .gradients import Scale, backward_trajectories, chunk_rows, objective_gradient
from .objectives import CollapsedWeights
from .rows import sampled_steps
from .state import TrainState


def updates(state: TrainState) -> None:
    """All updates that are left."""
    config = state.config
    first = config.warm_start_updates if config.warm_start != "none" else 0
    chunk: int | None = None
    with (
        state.log.bar(config.updates, config.objective) as bar,
        state.phase(first, config.updates, config.learning_rate, epochs=config.epochs) as steps,
    ):
        if state.global_step == first:  # within the phase: a first update that breaks off is begun again from before this
            _begin(state, first)
        for update in steps:
            if state.global_step > first and over_budget(state.log.history[-1], config.max_kl):
                break
            chunk = _update(state, bar, update, chunk)


def _begin(state: TrainState, first: int) -> None:
    """What stands before the first update, number ``first`` of the run: new paths, the temperature, log Z and the critic."""
    config, preparation = state.config, state.preparation
    if first and preparation.renewable and (config.forward_rows or set(config.shares) & NEEDS_POPULATION):
        preparation.renew(state.wrapped)
        assert preparation.population is not None
        state.measure_steps_on(preparation.population.trajectories)
        state.bound.begin()
    population = preparation.population
    reached = preparation.reached if first else math.inf
    state.temperature.begin(reached)
    if math.isfinite(reached) and population is not None:  # which knows more of log Z than before it was renewed
        state.log_z.set(state.processes.mean_of(population.log_z(state.temperature.alpha).double()))
    if state.objective.learns_soft_value:
        assert preparation.soft_value is not None
        state.critic.begin(preparation.soft_value)


def _update(state: TrainState, bar: Any, update: int, chunk: int | None) -> int:
    """One update, top to bottom; returns the rows of a chunk of pass 2."""
    config = state.config
    progress = update / max(1, config.updates - 1)
    trajectories, batch, on_policy, terms = draw_batch(state, progress)
    state.temperature.lower(batch, on_policy, progress, state.log_z, state.preparation.population)
    if state.objective.learns_soft_value:
        batch = replace(batch, soft_value=state.critic(trajectories, state.temperature.alpha))
    loss, gradients = _gradient(state, batch)
    drift = state.preparation.value_drift
    if drift is not None:
        drift.laws.keep_fresh(update, state.wrapped, state.size["forward_rows"], state.processes.poll)
    if state.bound.state is None:  # without a population
        state.measure_steps_on(trajectories)
        state.bound.begin()
    chunk = _backward(state, trajectories, gradients["step_log_ratio"], chunk)
    with uninterrupted():
        nats = _step(state, trajectories, batch, gradients)
        taken = 1
        for _ in range(1, config.epochs):
            try:
                chunk, moved = _epoch(state, trajectories, batch, chunk)
            except CollapsedWeights:  # the batch has nothing more to say to a policy this far from the one that drew it
                break
            taken, nats = taken + 1, moved if nats is None else nats + (moved or 0.0)
        record: dict[str, Any] = {"loss": loss.item(), **batch_metrics(state, trajectories, batch, on_policy), "step_nats": nats}
        if taken < config.epochs:
            record["epochs"] = taken
        if nats is None:
            record["skipped"] = True
        if len(terms) > 1:
            record["terms"] = {name: state.processes.mean(mean) for name, mean in terms.items()}
        if update % config.monitor_every == 0 or update == config.updates - 1:
            record |= state.monitor.look(state.preparation.held_out)
        state.record(bar, config.objective, update, record)
        state.complete_step(bar)
    return chunk


def _gradient(state: TrainState, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, AnyShape]]:
    """Pass 1, at the temperature of this update."""
    return objective_gradient(
        state.objective,
        batch,
        state.temperature.alpha,
        state.log_z.parameter,
        state.config.huber,
        gather=state.processes.gather,
        rank=state.processes.rank,
        world_size=state.processes.count,
    )


def _step(state: TrainState, trajectories: Trajectories, batch: Batch, gradients: dict[str, AnyShape]) -> float | None:
    """Move what learns; returns the policy's nats, None where its step was left out."""
    nats = state.optimization.step(state.config.step_nats)
    if state.objective.learns_log_z:
        state.log_z.step(gradients["log_z"], taken=nats is not None)
    if state.objective.learns_soft_value and nats is not None:
        _learn_value(state, trajectories, batch, gradients["soft_value"])
    return nats


def _epoch(state: TrainState, trajectories: Trajectories, batch: Batch, chunk: int) -> tuple[int, float | None]:
    """One more step on trajectories that a policy of some steps ago drew; (rows of a chunk, nats)."""
    now = step_log_ratio(state.prior.chain, state.prior.denoiser, state.wrapped, trajectories)
    again = replace(batch, step_log_ratio=now, old_step_log_ratio=batch.step_log_ratio)
    if state.objective.learns_soft_value:
        again = replace(again, soft_value=state.critic(trajectories, state.temperature.alpha))
    _, gradients = _gradient(state, again)
    chunk = _backward(state, trajectories, gradients["step_log_ratio"], chunk)
    return chunk, _step(state, trajectories, again, gradients)


def _learn_value(state: TrainState, trajectories: Trajectories, batch: Batch, gradient: Float[Tensor, "kernels batch"]) -> None:
    """Steps of the value on the same log-ratios, the first along ``gradient``: the next update's policy can then trust it."""
    alpha = state.temperature.alpha
    state.critic.step(trajectories, alpha, gradient)
    for _ in range(VALUE_STEPS - 1):
        _, gradients = _gradient(state, replace(batch, soft_value=state.critic(trajectories, alpha)))
        state.critic.step(trajectories, alpha, gradients["soft_value"])


def _backward(state: TrainState, trajectories: Trajectories, g: Float[Tensor, " kernels batch"], chunk: int | None) -> int:
    """Pass 2, and the warm start's teacher beside it where asked for; returns the rows of a chunk."""
    config, policy, chain = state.config, state.wrapped, state.prior.chain

    no_sync = partial(state.processes.no_sync, policy)
    if chunk is None:
        with no_sync():
            # By the size of a whole batch: the first one may be smaller (`replay`), and a resumed run begins at another.
            total = chain.num_kernels * max(len(trajectories), state.size["batch_size"])
            chunk = chunk_rows(policy, chain, trajectories, config.memory_mb, total=total)
    scale = state.optimization.scaler.scale
    # The processes average their gradients in the last backward pass of an update.
    last = no_sync if config.forward_rows else nullcontext
    sampled = None
    if config.step_share < 1:
        sampled = sampled_steps(chain, len(trajectories), config.step_share, state.noise.generator)
    backward_trajectories(policy, chain, trajectories, scale(g), chunk, no_sync, last, sampled)
    if config.forward_rows:
        _backward_teacher(state, scale, state.temperature.alpha**state.objective.alpha_power)
    return chunk


def _backward_teacher(state: TrainState, scale: Scale, factor: float) -> None:
    """``factor`` times the gradient of what the warm start followed."""
    drift, forward, rows = state.preparation.value_drift, state.preparation.forward_kl, state.size["forward_rows"]
    if drift is not None:
        drift.backward(state.wrapped, rows, lambda value: scale(factor * value))
        return
    assert forward is not None
    forward.backward(rows, scale, factor)
