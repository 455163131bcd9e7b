"""What the phases of a training work with, and what a checkpoint holds of it: each part owns its state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.stateful import Stateful

from ...samplers.policy import Policy
from ...samplers.prior import Prior
from ...samplers.trajectory import Trajectories
from ..config.train import TrainConfig
from ..distributed.processes import Processes
from ..distributed.signals import NoAnswer, ProcessError
from ..energies.cache import CachedEnergy
from ..energies.energy import Energy
from ..energies.error import EnergyError
from ..energies.evaluation import EnergyEvaluation
from .behaviors import sizes
from .critic import Critic
from .drift import Drift
from .log_z import LogZ
from .metrics_log import MetricsLog
from .monitor import Monitor
from .noise import Noise
from .objective_table import objective_of
from .optimization import Optimization
from .preparation import Preparation
from .replay import Replay
from .step_bound import StepBound
from .step_guard import StepGuard
from .temperature import Temperature

FORMAT = 14  # of a checkpoint's state; 1 was that of 0.3.0
SHARED_SIZES = ("batch_size", "population_size", "warm_start_rows", "forward_rows")  # the processes split these
ON_ALL = (FloatingPointError, EnergyError, ProcessError)  # errors that all processes raise at the same place


class TrainState:
    """The parts of a training.

    shared: {name: part} whose state is the same on all processes; own: those of which each process has its own. A part that
    changes before a step is complete has ``settle``, after which its ``state_dict`` is of that moment.
    policy: what is trained; wrapped: the same as it is called (`Processes.wrap`). size: this process's share of `SHARED_SIZES`.
    global_step: complete steps of the warm start and the updates so far. save: keeps a checkpoint.
    """

    def __init__(
        self,
        prior: Prior,
        energy: Energy,
        config: TrainConfig,
        policy: Policy,
        *,
        metrics: Path | None = None,
        progress: bool = True,
        save: Callable[[], None] | None = None,
        on_record: Callable[[int, dict[str, Any]], None] | None = None,
    ) -> None:
        self.prior, self.config, self.policy, self.save = prior, config, policy, save
        self.objective = objective_of(config)
        processes = self.processes = Processes(prior.device, config.process_timeout)
        self.wrapped = processes.wrap(policy)
        self.size = {name: processes.share(name, getattr(config, name)) for name in SHARED_SIZES}
        self._refuse_too_many_conditions()
        self.noise = Noise(config.seed, processes.rank, processes.device)
        self.energies = EnergyEvaluation(
            prior, energy, processes, alpha=config.alpha, cap=config.max_energy, max_invalid=config.max_invalid
        )
        self.log_z = LogZ(prior.num_conditions, config.log_z_learning_rate, processes.device)
        self.replay = Replay(prior)
        self.critic = Critic(prior, config.alpha, processes)
        self.temperature = Temperature(config, processes, prior.num_conditions)
        self.drift = Drift(processes)
        self.bound = StepBound(prior, self.wrapped, processes.mean)
        guard = StepGuard(config.max_skipped, config.spike_factor)
        self.optimization = Optimization(policy, self.wrapped, config, processes, self.bound, guard)
        self.monitor = Monitor(prior, self.wrapped, config.alpha, self.optimization, self.energies, self.noise, processes)
        self.log = MetricsLog(metrics, on_record, writes=processes.main, progress=progress)
        self.preparation = Preparation(prior, self.wrapped, config, self.size, self.energies, self.noise, processes, self.log.bar)
        self.global_step = 0
        self.shared: dict[str, Stateful] = {
            "optimization": self.optimization,
            "guard": guard,
            "log_z": self.log_z,
            "temperature": self.temperature,
            "critic": self.critic,
            "energies": self.energies,
            "monitor": self.monitor,
            "log": self.log,
        }
        self.own: dict[str, Stateful] = {
            "noise": self.noise,
            "bound": self.bound,
            "preparation": self.preparation,
            "replay": self.replay,
        }
        if isinstance(energy, CachedEnergy):
            self.own["energy_cache"] = energy

    def _refuse_too_many_conditions(self) -> None:
        """Errors: ValueError where a condition could get fewer than two trajectories of a batch: they are compared with each
        other."""
        count, drawn = self.prior.num_conditions, sizes(self.config.shares, self.size["batch_size"])
        name, fewest = min(drawn.items(), key=lambda item: item[1])
        if count > 1 and fewest < 2 * count:
            raise ValueError(
                f"batch_size is {self.config.batch_size}, of which {name} draws {fewest} in each process; every behavior and"
                f" process draws at least two trajectories of each of {count} conditions. Name fewer labels, or raise it."
            )

    # --- steps -------------------------------------------------------------------------------------------------------

    @contextmanager
    def phase(self, first: int, count: int, learning_rate: float, *, epochs: int = 1) -> Generator[range, None, None]:
        """The steps of a phase that are still to be taken, out of ``count`` from ``global_step`` ``first`` on.

        Each of them moves the weights ``epochs`` times.

        The phase has an optimizer, a schedule and a running average of its own. At its end (Ctrl-C included) the policy takes
        the average. On any exception, the last complete step is saved, where checkpoints are kept.
        """
        if first + count < self.global_step:  # a restored run is past it
            yield range(0)
            return
        self.optimization.begin(learning_rate, count * epochs)
        self.settle()
        if self.preparation.population is not None and self.global_step == first:
            self.measure_steps_on(self.preparation.population.trajectories)
        self.bound.begin()
        try:
            yield range(self.global_step - first, count)
        except BaseException as error:
            here = self.save_last_step(error)
            if here or not self.processes.sharded:  # a pass that was broken off leaves some shards gathered
                self.optimization.end()
            raise
        self.optimization.end()

    def measure_steps_on(self, trajectories: Trajectories) -> None:
        """What steps move is measured on states of these. Which ones, the first numbers of the training's stream say: a phase
        that is begun again chooses the same."""
        self.bound.look_at(trajectories, self.noise.fresh("training"))

    def complete_step(self, bar: Any) -> None:
        """Nothing of the last step is left over; it is saved where one is due."""
        self.global_step += 1
        bar.update(1)
        self.settle()
        every = self.config.checkpoint_every
        if self.save is not None and every and self.global_step % every == 0:
            self.save()

    def record(self, bar: Any, phase: str, update: int, values: dict[str, Any]) -> None:
        """One line of metrics."""
        self.log.record(bar, self.global_step, {"phase": phase, "update": update, **values, **self.energies.counts()})

    def collected(self) -> Policy:
        """The policy itself, without what distributed training wraps around it, up to date; called by all processes.

        Shards are gathered for it, on the CPU.
        """
        self.processes.collect(self.wrapped, self.policy)
        return self.policy

    def judge(self, phase: str) -> None:
        """`Monitor.judge` the policy that ``phase`` ended with."""
        preparation = self.preparation
        assert preparation.held_out is not None and preparation.population is not None
        try:
            self.monitor.judge(phase, self.global_step, preparation.held_out, preparation.population)
        except BaseException as error:
            self.save_last_step(error)
            raise

    # --- errors ------------------------------------------------------------------------------------------------------

    def save_last_step(self, error: BaseException) -> bool:
        """Save the last complete step, where checkpoints are kept and all processes can; returns `on_all`."""
        here = self.on_all(error)
        if self.save is not None and self.global_step and here and not self.optimization.torn:
            self.save()
        return here

    def on_all(self, error: BaseException) -> bool:
        """Whether all processes stop for this error; one that a single process met, outside of `Processes.together`, is left to
        torchrun."""
        if isinstance(error, NoAnswer):
            return False
        return self.processes.count == 1 or error is self.processes.stopped_by or isinstance(error, ON_ALL)

    # --- its state ---------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """A step is complete: every `state_dict` is of now."""
        for part in (*self.shared.values(), *self.own.values()):
            if settle := getattr(part, "settle", None):
                settle()

    def state_dict(self) -> dict[str, Any]:
        """What all processes know of the last complete step. Shards are gathered for the process that writes; called by all."""
        processes = {"count": self.processes.count, "sharded": self.processes.sharded}
        parts = {name: part.state_dict() for name, part in self.shared.items()}
        return {"format": FORMAT, "global_step": self.global_step, "processes": processes, **parts}

    def own_state_dict(self) -> dict[str, Any]:
        """What only this process knows of the same moment."""
        return {name: part.state_dict() for name, part in self.own.items()}

    def load_state_dict(self, state: dict[str, Any], own: dict[str, Any]) -> None:
        """Go on from a checkpoint. Where other processes made it, a warning says what is no longer the same.

        Errors: ValueError for the state of another version of Tiltune, or of a policy that trains other weights.
        """
        refuse_other_format(state)
        for name, part in self.shared.items():
            part.load_state_dict(state[name])
        self.global_step = state["global_step"]
        before, now = state["processes"]["count"], self.processes.count
        for name, part in self.own.items():
            # A generator's state is of one kind of device, and other processes go on with other noise anyway.
            if name in own and (before == now or part is not self.noise):
                part.load_state_dict(own[name])
        said = ""
        if before != now:
            self.noise.reseed(self.global_step)
            said = (
                f"the run was on {before} processes and goes on with {now}: the noise is another one from here on, and"
                f" {'some parts of the population are left out' if now < before else 'parts of the population are used twice'}."
                " Everything else is what it was."
            )
        elif state["processes"]["sharded"] != self.processes.sharded:
            said = (
                "the policy was in shards before and is not now, or the other way round: sums over the processes are rounded"
                " otherwise from here on. Everything else is what it was."
            )
        if said and self.processes.main:
            warnings.warn(said, stacklevel=3)


def refuse_other_format(state: dict[str, Any]) -> None:
    """ValueError for the state of a checkpoint that another version of Tiltune wrote."""
    if state.get("format") != FORMAT:
        raise ValueError(
            "another version of Tiltune wrote this checkpoint, and this one cannot read it: go on with that version, or start"
            " the run again with --overwrite."
        )
