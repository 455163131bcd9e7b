"""A training's state as the checkpoints of its run: what `checkpoint` writes as a folder, filled by all processes."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from ...samplers.policy import Policy
from ..config.run import RunConfig
from ..config.yaml_file import to_yaml
from ..distributed.signals import uninterrupted
from ..learning.state import refuse_other_format
from ..learning.trainer import Trainer
from . import checkpoint
from .state_file import read_state, write_state

CHECKPOINTS = 2  # kept: the last, and one before it in case the last is damaged


class Checkpointer:
    """Saves a trainer's state into the run's ``folder`` and gives it back. All processes call each method.

    policy: the unwrapped policy that the trainer trains. longest: seconds of the longest save so far, 0 before the first.
    """

    def __init__(self, folder: Path, config: RunConfig, policy: Policy) -> None:
        self.folder = folder / checkpoint.FOLDER
        self.longest = 0.0
        self._config, self._policy = config, policy

    def save(self, trainer: Trainer) -> None:
        """A checkpoint of the last completed step. A signal takes effect after it; a good one of the same step stays as it is.

        Errors: OSError where the disk is full, say; then all processes raise.
        """
        begun, processes = time.perf_counter(), trainer.state.processes
        with uninterrupted():
            if self._is_saved(trainer):
                return
            # What takes every process, before one of them alone can fail at the disk.
            state = trainer.state_dict()
            with trainer.averaged():
                trainer.collected()
            with processes.together():
                if processes.main:
                    write = partial(self._write, trainer=trainer, state=state)
                    checkpoint.save(self.folder, trainer.global_step, write, keep=CHECKPOINTS)
                else:
                    self._write(checkpoint.being_written(self.folder, trainer.global_step), trainer, state)
            self.longest = max(self.longest, time.perf_counter() - begun)

    def restore(self, trainer: Trainer, start: Path | None) -> None:
        """Bring the trainer to the checkpoint ``start``; None leaves it at its beginning.

        Errors: ProcessError where the processes found different checkpoints; ValueError for one that does not fit the trainer.
        """
        processes = trainer.state.processes
        processes.refuse_other(-1 if start is None else checkpoint.step_of(start), "checkpoints to go on from")
        if start is None:
            return
        state = own = {}
        with processes.together():
            state = read_state(start, "run")
            refuse_other_format(state)
            own = read_state(start, _own(processes.rank % state["processes"]["count"]))
        trainer.load_state_dict(state, own)

    def _is_saved(self, trainer: Trainer) -> bool:
        """Whether a good checkpoint of this step is there already: the main process then writes none, and nobody may wait for
        it. Alone, a process leaves the question to `checkpoint.save`."""
        processes = trainer.state.processes
        if processes.count == 1:
            return False
        there = False
        with processes.together():
            there = processes.main and checkpoint.is_good(self.folder, trainer.global_step)
        return processes.mean(there) > 0

    def _write(self, place: Path, trainer: Trainer, state: dict[str, Any]) -> None:
        """This process's part of the checkpoint in the folder ``place``. state: what all processes share."""
        processes = trainer.state.processes
        with processes.together():
            if processes.main:
                with trainer.averaged():
                    self._policy.save(place / "policy")
                (place / "config.yaml").write_text(to_yaml(self._config))
                write_state(place, "run", state)
        with processes.together():  # only now the folder is there for all
            write_state(place, _own(processes.rank), trainer.own_state_dict())


def _own(rank: int) -> str:
    """The name of one process's state in a checkpoint."""
    return f"process-{rank:05d}"
