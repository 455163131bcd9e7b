"""The trainer: it orders the phases. What they do is in `preparation`, `warm_start`, `updates` and `monitor`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ...samplers.bridge import bridge_of
from ...samplers.make_policy import trainable_copy
from ...samplers.policy import Policy
from ...samplers.prior import Prior
from ...samplers.typed import floats
from ..config.train import TrainConfig
from ..distributed.signals import Preempted
from ..energies.energy import Energy
from .improvement import Improvement
from .objective_table import OBJECTIVES
from .state import TrainState
from .updates import updates
from .value_drift import refuse_without_gradient
from .warm_start import warm_start


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What training leaves behind.

    policy: on the CPU where it was trained in shards (`Processes`), else where it was.
    log_z: the learned parameter; without one, the last on-policy batch's estimate, or the population's. The mean over the
        conditions, where there are several; log_z_by_condition: {condition: its own}, empty without conditions.
    improvement: how much closer to the target than the prior; None where there are no held-out paths, or no time to measure it.
    """

    policy: Policy
    log_z: float
    log_z_by_condition: dict[str, float]
    energy_calls: int
    seconds: float
    interrupted: bool
    preempted: bool
    improvement: Improvement | None
    history: list[dict[str, Any]] = field(repr=False)


class Trainer:
    """Fine-tune a prior toward an energy: ``Trainer(prior, energy, TrainConfig(alpha=0.5)).train()``.

    policy: a trainable denoiser that starts at the prior; None makes a full copy (`trainable_copy`).
    metrics: a file that receives one JSON object a line, or None. progress: show a bar on stderr.
    on_checkpoint: is called after every ``checkpoint_every`` steps, and after the last complete one where an error stops the
    training: `state_dict` and `own_state_dict` are then of that step.
    on_record: is given each line of metrics with the number of steps before it, in the process that writes.

    Errors: ValueError for a pair of objective and behavior that cannot be right, or a prior that the warm start cannot use;
    EnergyError for an unusable energy, found on four prior samples before any training.
    """

    def __init__(
        self,
        prior: Prior,
        energy: Energy,
        config: TrainConfig | None = None,
        *,
        policy: nn.Module | None = None,
        metrics: Path | None = None,
        progress: bool = True,
        on_checkpoint: Callable[[Trainer], None] | None = None,
        on_record: Callable[[int, dict[str, Any]], None] | None = None,
    ) -> None:
        config = config or TrainConfig()
        wrong = set(config.shares) - OBJECTIVES[config.objective].behaviors
        assert not wrong, f"config admitted {wrong} for {config.objective}"
        if "noised_back" in config.shares:
            bridge_of(prior.chain)  # refuses a chain that cannot be noised back, before any work
        if config.warm_start == "value_drift":
            refuse_without_gradient(prior)
        if policy is None:
            policy = trainable_copy(prior)
        if not isinstance(policy, Policy):
            policy = Policy(prior, policy)
        save = None if on_checkpoint is None else lambda: on_checkpoint(self)
        self.state = TrainState(prior, energy, config, policy, metrics=metrics, progress=progress, save=save, on_record=on_record)
        self._begun = self._restored = False

    def train(self) -> TrainResult:
        """Run the phases; returns the policy in evaluation mode. Ctrl-C keeps what is trained.

        Errors: ValueError where this trainer has trained before.
        """
        if self._begun:
            raise ValueError("this trainer has trained; make a new one.")
        self._begun, started, state = True, time.perf_counter(), self.state
        if not self._restored:
            state.preparation.run(state.log_z)
        interrupted: KeyboardInterrupt | None = None
        try:
            if state.config.warm_start != "none":
                warm_start(state)
            updates(state)
            self._take_closest()
        except KeyboardInterrupt as error:
            if not self.history:
                raise
            interrupted = error
        state.wrapped.eval()
        log_z, table = self._log_z(), state.prior.condition_table
        return TrainResult(
            state.collected(),
            sum(log_z) / len(log_z),
            {} if table is None else dict(zip(table.names, log_z, strict=True)),
            state.energies.meter.calls,
            time.perf_counter() - started,
            interrupted is not None,
            isinstance(interrupted, Preempted),
            None if interrupted is not None else state.monitor.improvement,
            self.history,
        )

    def _take_closest(self) -> None:
        """End at what came closest: the updates, the warm start before them, or where it all began.

        A comparator ends where it ends.
        """
        state = self.state
        if state.preparation.held_out is not None and state.objective.targets_tilted_law:
            if not state.monitor.judged(state.global_step):
                state.judge("the updates")
            state.optimization.set_weights(state.monitor.closest.weights)

    def _log_z(self) -> list[float]:
        """Of each condition."""
        state, table = self.state, self.state.prior.condition_table
        if state.objective.learns_log_z:
            return state.log_z.values()
        last = self.history[-1] if self.history else {}
        if table is not None and "log_z" in last.get("conditions", {}).get(table.names[0], {}):
            return [last["conditions"][name]["log_z"] for name in table.names]
        if "log_z" in last:
            return [last["log_z"]]
        population = state.preparation.population
        if population is None:
            return [math.nan] * state.prior.num_conditions
        return floats(state.processes.mean_of(population.log_z(state.config.alpha).double()))

    # --- for whoever keeps checkpoints -------------------------------------------------------------------------------

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics so far."""
        return self.state.log.history

    @property
    def global_step(self) -> int:
        """Complete steps of the warm start and the updates so far."""
        return self.state.global_step

    def averaged(self) -> AbstractContextManager[None]:
        """The policy as it would be if the training ended here: with the running average of its weights, where there is one."""
        return self.state.optimization.averaged()

    def collected(self) -> Policy:
        """The policy itself, up to date; called by all processes."""
        return self.state.collected()

    def state_dict(self) -> dict[str, Any]:
        """What all processes know of the last complete step (`TrainState.state_dict`); called by all."""
        return self.state.state_dict()

    def own_state_dict(self) -> dict[str, Any]:
        """What only this process knows of the same moment: its noise, its paths and what it learned on them."""
        return self.state.own_state_dict()

    def load_state_dict(self, state: dict[str, Any], own: dict[str, Any]) -> None:
        """Go on, in `train`, from what `state_dict` and `own_state_dict` returned in a run of the same config.

        On as many processes and the same kind of device it is bit for bit the same run. On another number of processes,
        each takes the part of one that there was, with noise of its own from there on: a warning says so.

        Errors: ValueError for the state of another version of Tiltune, or of a policy that trains other weights.
        """
        self.state.load_state_dict(state, own)
        self._restored = True
