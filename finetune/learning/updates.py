"""The updates: behavior → trajectories → energies → log-ratios → objective → two-pass gradient → step → metrics."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...samplers.log_ratio import outputs, step_log_ratio
from ...samplers.shapes import AnyShape, Index
from ...samplers.trajectory import Trajectories, concatenate
from ..distributed.signals import uninterrupted
from ..energies.error import EnergyError
from ..estimators import ess, log_mean_exp
from .batch import Batch
from .behaviors import NEEDS_POPULATION, Context, draw
from .critic import VALUE_STEPS
from .gradients import backward_trajectories, chunk_rows, objective_gradient
from .rows import sampled_steps
from .state import TrainState


def updates(state: TrainState) -> None:
    """All updates that are left."""
    config = state.config
    first = config.warm_start_updates if config.warm_start != "none" else 0
    if state.global_step == first:
        if first and (config.forward_rows or set(config.shares) & NEEDS_POPULATION):
            state.preparation.renew(state.wrapped)
        reached = state.preparation.reached if first else math.inf
        state.temperature.begin(reached)
        population = state.preparation.population
        if math.isfinite(reached) and population is not None:  # which knows more of log Z than before it was renewed
            state.log_z.set(state.processes.mean_of(population.log_z(state.temperature.alpha).double()))
        if state.objective.learns_soft_value:
            assert state.preparation.soft_value is not None
            state.critic.begin(state.preparation.soft_value)
    chunk: int | None = None
    with (
        state.log.bar(config.updates, config.objective) as bar,
        state.phase(first, config.updates, config.learning_rate, epochs=config.epochs) as steps,
    ):
        for update in steps:
            chunk = _update(state, bar, update, chunk)


def _update(state: TrainState, bar: Any, update: int, chunk: int | None) -> int:
    """One update, top to bottom; returns the rows of a chunk of pass 2."""
    config = state.config
    progress = update / max(1, config.updates - 1)
    parts, terms = _trajectories(state, progress)
    if config.epochs > 1:
        parts = {name: _with_prior_outputs(state, part) for name, part in parts.items()}
    trajectories = concatenate(list(parts.values()))
    on_policy = len(parts["on_policy"]) if "on_policy" in parts else 0
    batch = _batch(state, parts, trajectories, on_policy)
    state.temperature.lower(batch, on_policy, progress, state.log_z, state.preparation.population)
    if state.objective.learns_soft_value:
        batch = replace(batch, soft_value=state.critic(trajectories, state.temperature.alpha))
    loss, gradients = _gradient(state, batch)
    if state.bound.state is None:  # without a population
        state.measure_steps_on(trajectories)
        state.bound.begin()
    chunk = _backward(state, trajectories, gradients["step_log_ratio"], chunk)
    with uninterrupted():
        nats = _step(state, trajectories, batch, gradients)
        record: dict[str, Any] = {"loss": loss.item(), **_metrics(state, batch, on_policy)}
        for _ in range(1, config.epochs):
            chunk, moved = _epoch(state, trajectories, batch, chunk)
            nats = moved if nats is None else nats + (moved or 0.0)
        record["step_nats"] = nats
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


def _trajectories(state: TrainState, progress: float) -> tuple[dict[str, Trajectories], dict[str, float]]:
    """({behavior: trajectories with energies}, {term: its mean over the policy's own samples})."""
    config = state.config
    population = state.preparation.population
    replays = "replay" in config.shares
    context = Context(
        state.prior,
        state.wrapped,
        population,
        config.alpha,
        progress,
        config.noise_scale,
        on_step=state.processes.poll,
        replay=state.replay,
        keep_outputs=replays or config.epochs > 1,
    )
    parts: dict[str, Trajectories] = {}
    terms: dict[str, float] = {}
    drawn = draw(config.shares, context, state.size["batch_size"], state.noise.generator)
    for name, part in state.energies.evaluate_each(drawn):
        parts[name] = part
        if name == "on_policy":
            terms = state.energies.meter.term_means
    if replays:
        state.replay.add(parts["on_policy"])
    return parts, terms


def _with_prior_outputs(state: TrainState, part: Trajectories) -> Trajectories:
    """Evaluated once for all epochs, where the rollout has not kept them."""
    if part.prior_outputs is not None:
        return part
    chain = state.prior.chain
    flat = outputs(chain, state.prior.denoiser, part)
    return part.with_(prior_outputs=flat.view(chain.num_kernels, len(part), *flat.shape[1:]))


def _batch(state: TrainState, parts: dict[str, Trajectories], trajectories: Trajectories, on_policy: int) -> Batch:
    """What the objective is a function of."""
    energy, valid = state.energies.capped(trajectories, on_policy)
    each = torch.stack([valid[index].sum() for index in trajectories.groups])
    usable = int(state.processes.gather(each[None]).sum(0).max())
    if usable < 2:
        raise EnergyError(
            f"only {usable} of this update's energies are valid; the policy moved to where the energy is NaN or -inf."
        )
    soft_value = state.preparation.soft_value if state.objective.takes_soft_value else None
    value = None if soft_value is None else soft_value.along(trajectories, state.prior.chain)
    group = None if trajectories.condition is None else trajectories.group  # nothing to gather without conditions
    return Batch(_log_ratios(state, parts), energy, valid, trajectories.log_behavior, value, group)


def _log_ratios(state: TrainState, parts: dict[str, Trajectories]) -> Float[Tensor, " kernels batch"]:
    """Known from the rollout where the policy drew them, evaluated elsewhere."""
    chain, prior = state.prior.chain, state.prior.denoiser
    ratios = [
        step_log_ratio(chain, prior, state.wrapped, part) if part.step_log_ratio is None else part.step_log_ratio
        for part in parts.values()
    ]
    return torch.cat(ratios, 1)


def _backward(state: TrainState, trajectories: Trajectories, g: Float[Tensor, " kernels batch"], chunk: int | None) -> int:
    """Pass 2, and the forward KL beside it where asked for; returns the rows of a chunk."""
    config, policy, chain = state.config, state.wrapped, state.prior.chain

    no_sync = partial(state.processes.no_sync, policy)
    if chunk is None:
        with no_sync():
            chunk = chunk_rows(policy, chain, trajectories, config.memory_mb)
    scale = state.optimization.scaler.scale
    # The processes average their gradients in the last backward pass of an update.
    last = no_sync if config.forward_rows else nullcontext
    sampled = None
    if config.step_share < 1:
        sampled = sampled_steps(chain, len(trajectories), config.step_share, state.noise.generator)
    backward_trajectories(policy, chain, trajectories, scale(g), chunk, no_sync, last, sampled)
    if config.forward_rows:
        forward = state.preparation.forward_kl
        assert forward is not None
        forward.backward(state.size["forward_rows"], scale, state.temperature.alpha**state.objective.alpha_power)
    return chunk


def _metrics(state: TrainState, batch: Batch, on_policy: int) -> dict[str, Any]:
    """The residual of the whole batch; ELBO, ESS and log Z of its on-policy part, at the final temperature.

    Of several conditions, the mean over them, and under "conditions" those of each.
    """
    table = state.prior.condition_table
    own = [_metrics_of(state, batch, on_policy, row, index) for row, index in enumerate(batch.groups(state.prior.num_conditions))]
    if table is None or len(table) == 1:
        return {"alpha": state.temperature.alpha, **own[0]}
    mean = {name: sum(each[name] for each in own) / len(own) for name in own[0]}
    return {"alpha": state.temperature.alpha, **mean, "conditions": dict(zip(table.names, own, strict=True))}


def _metrics_of(state: TrainState, batch: Batch, on_policy: int, row: int, index: Index) -> dict[str, float]:
    """Of the trajectories of one condition."""
    valid, gather_valid = batch.valid[index], state.processes.gather_valid
    log_ratio, energy = batch.log_ratio[index], batch.energy[index]
    x = gather_valid(log_ratio + energy / state.temperature.alpha, valid)
    metrics = {"residual_std": x.std().item() if len(x) > 1 else math.nan}
    if on_policy:
        own = index < on_policy
        log_weight = gather_valid(-log_ratio[own] - energy[own] / state.config.alpha, valid[own])
        metrics |= {"elbo": log_weight.mean().item(), "ess": ess(log_weight), "log_z": log_mean_exp(log_weight)[0]}
    if state.objective.learns_log_z:
        metrics["log_z_learned"] = state.log_z.values()[row]
    return metrics
