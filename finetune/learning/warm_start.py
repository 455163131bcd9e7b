"""The warm start: the policy follows a teacher that was made from the population, before it learns from its own rollouts."""

from __future__ import annotations

import math
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..distributed.signals import uninterrupted
from .forward_kl import ForwardKL
from .state import TrainState
from .value_drift import RESCALED_AT

FALLS = 2  # looks in a row at which a warm start has fallen behind its best, and ends
WATCHES = 5  # looks at the held-out paths
# Shares of the warm start after which the policy renews a population that has climbed: while its temperature is above the
# target's, and then.
RENEWED_ABOVE, RENEWED = 0.05, 0.2


def warm_start(state: TrainState) -> None:
    """Follow the forward KL (`ForwardKL`) or the soft value's drift (`ValueDrift`), as the config says.

    The forward KL goes in two halves where the shift of the first can teach the second. The phase ends at the weights that came
    closest to the held-out paths, and early where they fall behind.
    """
    config, preparation = state.config, state.preparation
    forward = preparation.forward_kl
    assert forward is not None
    total = config.warm_start_updates
    split = preparation.value_drift is None and forward.bridged_and_controlled
    halves = [(0, total // 2), (total // 2, total)] if split else [(0, total)]
    with state.log.bar(total, f"warm start ({config.warm_start})") as bar:
        for first, last in halves:
            with state.phase(first, last - first, config.warm_start_learning_rate) as steps:
                for update in steps:
                    update += first
                    if state.monitor.watched.falls >= FALLS:
                        break
                    if update == first > 0:
                        forward.measure_slope()
                    if preparation.value_drift is None and preparation.renewable and _renews(forward, update, total):
                        preparation.renew(state.wrapped)
                    _update(state, bar, update, total)
    if state.global_step <= total:
        state.global_step = total
        if preparation.held_out is not None and not state.monitor.judged(total):
            state.optimization.set_weights(state.monitor.watched.weights)
            state.judge("the warm start")
    if not config.forward_rows:
        preparation.value_drift = None  # it has served, and holds paths of its own


def _renews(forward: ForwardKL, update: int, total: int) -> bool:
    every = max(1, round((RENEWED_ABOVE if forward.alpha > forward.config.alpha else RENEWED) * total))
    return update > 0 and update % every == 0


def _update(state: TrainState, bar: Any, update: int, total: int) -> None:
    loss = _backward(state, update, total)
    config, drift, scaler = state.config, state.preparation.value_drift, state.optimization.scaler
    forward = state.preparation.forward_kl
    loss_scale = scaler.get_scale()
    with uninterrupted():
        bound = math.inf if drift is None else state.processes.mean(drift.trust.nats)
        nats = state.optimization.step(min(bound, config.warm_start_step_nats))
        record: dict[str, Any] = {"loss": state.processes.mean(loss.item() / loss_scale), "step_nats": nats}
        if nats is None:
            record["skipped"] = True
        if drift is not None and update == 0:
            record["soft_value_nats"] = drift.calibration.nats[-1].item()
        if drift is None and forward is not None and forward.alpha > config.alpha:
            record["alpha"] = forward.alpha
        every = max(1, total // WATCHES)
        if update == 0 or (update + 1) % every == 0 or update == total - 1:
            record |= state.monitor.watch(state.preparation.held_out)
            state.record(bar, "warm_start", update, record)
        state.complete_step(bar)


def _backward(state: TrainState, update: int, total: int) -> Float[Tensor, ""]:
    """Accumulate the teacher's gradient; returns the scaled loss."""
    forward, drift, held_out = state.preparation.forward_kl, state.preparation.value_drift, state.preparation.held_out
    rows, scale = state.size["warm_start_rows"], state.optimization.scaler.scale
    if drift is None:
        assert forward is not None
        return forward.backward(rows, scale)
    if update == round(RESCALED_AT * total) and held_out is not None:
        drift.rescale(state.wrapped, held_out, state.processes.gather)
    drift.laws.keep_fresh(update, state.wrapped, rows, state.processes.poll)
    return drift.backward(state.wrapped, rows, scale, update / total)
