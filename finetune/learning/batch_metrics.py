"""What a line of metrics says of an update's batch."""

from __future__ import annotations

import math
from typing import Any

from ...samplers.shapes import Index
from ...samplers.trajectory import Trajectories
from ..estimators import ess, log_mean_exp
from .batch import Batch
from .state import TrainState


def batch_metrics(state: TrainState, trajectories: Trajectories, batch: Batch, on_policy: int) -> dict[str, Any]:
    """The residual of the whole batch; of its on-policy part ELBO, ESS and log Z at the final temperature, and
    how far it has moved (`Drift`).

    Of several conditions, the mean over them, and under "conditions" those of each.
    """
    table = state.prior.condition_table
    own = [_metrics_of(state, batch, on_policy, row, index) for row, index in enumerate(batch.groups(state.prior.num_conditions))]
    if on_policy:
        drawn = [index[index < on_policy] for index in trajectories.groups]
        moved = state.drift(trajectories.terminal, batch.log_ratio, drawn, state.preparation.population)
        own = [figures | drift for figures, drift in zip(own, moved, strict=True)]
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
