"""`train`: a config becomes a run in a folder. Resolve, resume, build, train, record; each is a function, here or beside.

Imports no torch by itself, so that a mistake in the config or the folder is found at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.run import RunConfig
from ..config.yaml_file import to_mapping, to_yaml
from ..distributed.signals import deferred, preemptible, uninterrupted
from ..strict_json import strict_json
from . import checkpoint
from .build import initial_policy, load_prior, threads
from .energies import open_energies
from .folder import new_run
from .loading import loading
from .lock import RunLock
from .manifest import replace_file
from .record import Ending, record_of
from .resolve import resolve
from .resume import is_finished, refuse_finished, starting_checkpoint
from .run import SOFT_VALUE, Run, open_run
from .task import Task
from .tracker import Tracker, refuse_missing

if TYPE_CHECKING:
    from ...samplers.policy import Policy
    from ..energies.energy import Energy
    from ..learning.trainer import Trainer, TrainResult
    from .checkpointer import Checkpointer


def train(
    config: RunConfig,
    out: str | Path,
    *,
    task: Task | None = None,
    energy: Energy | None = None,
    overwrite: bool = False,
    resume: str | Path | None = None,
    progress: bool = True,
) -> Run:
    """Fine-tune as ``config`` says and write the run into the folder ``out``.

    task: the shipped task that ``config.task`` names. energy: a function in place of ``config.energy``'s terms; the run's
    config.yaml then names no energy, and whoever opens it brings the function again. overwrite: replace a run in ``out``; the
    old one comes back if nothing gets trained. progress: print what the loader decided, and show bars.

    resume: "auto" goes on from the last good checkpoint in ``out``, starts where there is none, and returns the run if it is
    finished; the path of one of its checkpoints goes on from that one and from no other. The config must be the run's, which is
    then, bit for bit, the one that nobody interrupted.

    Ctrl-C ends the training, not the run: the policy is saved as it is, ``record["interrupted"]`` is True. SIGTERM and SIGUSR1
    do the same, and ``record["preempted"]`` is True: the process was to be started again. An error in the
    middle of the training saves it likewise, and is raised again. A second Ctrl-C waits until all is saved. If saving itself
    fails, what is written stays, and so does an older run, in `ASIDE`, until the next ``overwrite`` moves it back. Trained in
    shards, the returned policy is on the CPU.

    Errors: ValueError, before anything is written, for whatever cannot be trained.
    """
    folder = Path(out)
    config = resolve(config, folder, task, energy)
    refuse_missing(config.tracker)
    speaks = progress and os.environ.get("RANK", "0") == "0"
    if resume is not None and overwrite:
        raise ValueError("resume goes on with the run that is there, and overwrite replaces it; ask for one of them.")
    if resume is not None and is_finished(folder):
        refuse_finished(folder, config, resume)
        if speaks:
            print(f"the run in {folder} is finished; nothing was trained")
        return open_run(folder, task)
    start = starting_checkpoint(folder, config, resume, overwrite)
    # Several processes must stop together: a signal waits for a place where all of them ask.
    with deferred() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else preemptible():
        _load_libraries(speaks)
        with threads(config.threads), open_energies(config, task, energy) as measured:
            training = _build(config, folder, task, measured, speaks, progress)
            training.checkpointer.restore(training.trainer, start)
            record, stopped = _train_and_record(training, start, named=energy is None, speaks=speaks)
    if stopped is not None:
        raise stopped
    return Run(folder, config, training.trainer.state.prior, training.policy, record, task)


def _load_libraries(speaks: bool) -> None:
    """Import what a training needs. A signal waits until after: libraries turn a Ctrl-C in their imports into other errors."""
    with uninterrupted(), loading("torch and diffusers") if speaks else nullcontext():
        import accelerate  # noqa: F401
        from diffusers import DiffusionPipeline  # noqa: F401

        from ...samplers.loading import hints  # noqa: F401
        from . import checkpointer  # noqa: F401 - with the trainer


@dataclass(frozen=True, eq=False)
class _Training:
    """A training, ready to start. conditions: what the chain guarantees, in words, and whether the objective has another target.
    policy: unwrapped, as it will be saved."""

    folder: Path
    config: RunConfig
    policy: Policy
    conditions: dict[str, str]
    trainer: Trainer
    checkpointer: Checkpointer
    tracker: Tracker | None


def _build(config: RunConfig, folder: Path, task: Task | None, energy: Energy, speaks: bool, progress: bool) -> _Training:
    """Prior, policy, tracker and trainer; prints what the loader decided."""
    from ...samplers.loading.hints import widest_variance
    from ..learning.memory import estimate_memory
    from ..learning.objective_table import OBJECTIVES
    from ..learning.trainer import Trainer
    from .checkpointer import Checkpointer

    prior = load_prior(config, task)
    conditions = prior.chain.conditions(prior.data_variance or widest_variance(prior.shape))
    if not OBJECTIVES[config.train.objective].targets_tilted_law:
        conditions["target"] = f"{config.train.objective} does NOT target p_prior · exp(-E/alpha): it is there to compare with"
    if speaks:
        print(*prior.decisions, *(f"  {name:<10} {text}" for name, text in conditions.items()), sep="\n")
    policy = initial_policy(config, prior)
    tracker = None if config.tracker is None else Tracker(config.tracker, folder, to_mapping(config))
    checkpointer = Checkpointer(folder, config, policy)
    trainer = Trainer(
        prior,
        energy,
        config.train,
        policy=policy,
        metrics=folder / "metrics.jsonl",
        progress=progress,
        on_checkpoint=checkpointer.save if config.train.checkpoint_every else None,
        on_record=None if tracker is None else tracker.log,
    )
    memory = estimate_memory(trainer.state) if progress else None  # by all processes or none
    if memory is not None and speaks:
        print(memory)
    return _Training(folder, config, policy, conditions, trainer, checkpointer, tracker)


def _train_and_record(
    training: _Training, start: Path | None, *, named: bool, speaks: bool
) -> tuple[dict[str, Any], Exception | KeyboardInterrupt | None]:
    """Train in the run's folder and save the policy with the record; returns the record, and what stopped the training."""
    trainer, processes = training.trainer, training.trainer.state.processes
    resumed = trainer.global_step
    with ExitStack() as around:
        with processes.together():
            if processes.main:
                around.enter_context(_open_folder(training, start, speaks))
        if processes.main and training.tracker is not None:
            around.enter_context(training.tracker)
        result, stopped = _train(trainer)
        record = record_of(
            training.config,
            trainer,
            training.policy,
            Ending(result, stopped, trainer.global_step - resumed),
            named=named,
            conditions=training.conditions,
            checkpoint_seconds=training.checkpointer.longest,
        )
        _save(training, record, stopped)
    return record, stopped


@contextmanager
def _open_folder(training: _Training, start: Path | None, speaks: bool) -> Iterator[None]:
    """The run's folder, held by this process alone: new, or with what came after the checkpoint ``start`` taken away."""
    folder, trainer = training.folder, training.trainer
    if start is None:
        with new_run(folder, lambda: bool(trainer.history)):
            # Half of it, left by a kill, would keep "auto" from going on; so would half of run.json.
            replace_file(folder / "config.yaml", to_yaml(training.config))
            yield
        return
    with RunLock(folder):
        checkpoint.rewind(folder / checkpoint.FOLDER, trainer.global_step)
        (folder / "metrics.jsonl").write_text("".join(strict_json(line) + "\n" for line in trainer.history))
        if speaks:
            print(f"going on from {start}, after {trainer.global_step} steps")
        yield


def _train(trainer: Trainer) -> tuple[TrainResult | None, Exception | KeyboardInterrupt | None]:
    """The result, or what stopped a training that has something to save.

    Errors: whatever stops it before the first line of metrics, or in shards that this process alone cannot collect.
    """
    try:
        return trainer.train(), None
    except (Exception, KeyboardInterrupt) as error:
        if not trainer.history:
            raise
        # All processes hold parts of the policy; one alone can save no more than the checkpoints.
        if trainer.state.processes.sharded:
            if not trainer.state.on_all(error):
                raise
            trainer.collected()
        return None, error


def _save(training: _Training, record: dict[str, Any], stopped: Exception | KeyboardInterrupt | None) -> None:
    """The policy, and run.json last: a folder without it holds no run."""
    trainer, folder = training.trainer, training.folder
    processes = trainer.state.processes
    # The others wait: one that ended with an error would have torchrun end this one.
    waiting = processes.together() if stopped is None or trainer.state.on_all(stopped) else nullcontext()
    # What asks to stop meanwhile asks it of a run that has ended, and the record says how.
    with suppress(KeyboardInterrupt), uninterrupted(), waiting:
        if processes.main:
            training.policy.save(folder / "policy")
            soft_value = trainer.state.critic.value or trainer.state.preparation.soft_value
            if soft_value is not None:
                from .state_file import write_state

                write_state(folder, SOFT_VALUE, soft_value.state_dict())
            replace_file(folder / "run.json", strict_json(record, indent=2) + "\n")
