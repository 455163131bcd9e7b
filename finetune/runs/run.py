"""A run as a folder: `train` makes one, `open_run` loads it again, `evaluation.certify` judges it.

    config.yaml     the whole `RunConfig`: the same training again, bit for bit
    metrics.jsonl   one JSON object a line
    policy/         what was trained, as diffusers or peft save it
    run.json        what the loader decided, versions, seconds, how the training ended
    certificate.json, picture.png, samples.safetensors, samples.png      once they are asked for

Imports no torch by itself, so that a mistake in the config or the folder is found at once.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..._version import __version__
from ..config.sections import PriorConfig, RunConfig
from ..config.yaml_file import from_mapping, read_yaml, to_mapping, to_yaml
from ..distributed.signals import Preempted, deferred, preemptible, uninterrupted
from ..energies.names import combine, parse_energy
from ..strict_json import strict_json
from . import checkpoint
from .folder import new_run, refuse_occupied
from .loading import loading
from .lock import RunLock
from .manifest import replace_file
from .tracker import Tracker, refuse_missing

if TYPE_CHECKING:
    import torch

    from ...samplers.policy import Policy
    from ...samplers.prior import Prior
    from ..certificate.criteria import Criterion
    from ..certificate.evidence import Evidence
    from ..energies.energy import Energy

CHECKPOINTS = 2  # kept: the last, and one before it in case the last is damaged
SHIPPED = re.compile(r"tiltune\.tasks\.(?!py$)[a-z_0-9]+")


class Task(Protocol):
    """What a run asks of a shipped task: its prior, where its energies are, and what it knows of the truth."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def load_prior(self) -> Callable[[PriorConfig], Prior]: ...
    @property
    def figures(self) -> Callable[[Evidence, Energy, torch.Generator], dict[str, Any]]: ...
    @property
    def criteria(self) -> Callable[[dict[str, Any]], list[Criterion]]: ...


@dataclass(frozen=True, eq=False)
class Run:
    """A trained policy with the prior it started from and the config that made it. record: what run.json holds."""

    folder: Path
    config: RunConfig
    prior: Prior
    policy: Policy
    record: dict[str, Any]
    task: Task | None = None

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def energy(self, terms: Sequence[str] = ()) -> Energy:
        """The energy that ``terms`` name, or the one of the training where none are given.

        Errors: ValueError where the training's is code that only the folder names: importing that is for whoever typed it.
        """
        config = replace(self.config.energy, terms=tuple(terms) or self.config.energy.terms)
        if not terms:
            foreign = [term for term in config.terms if not _ships(term, self.task)]
            if foreign or not config.terms:
                named = f"with {' '.join(foreign)}" if foreign else "with a function of its own"
                raise ValueError(
                    f"{self.folder} was trained {named}; no code is run because a folder names it, so say it again: --energy"
                    f" {shlex.join(config.terms) or 'FILE.py:NAME'} (in Python, pass energy=)."
                )
        return load_energies(replace(self.config, energy=config), self.task)


# --- making one ------------------------------------------------------------------------------------------------------


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
    if energy is not None:  # what did not train the run must not stand in its config
        config = replace(config, energy=replace(config.energy, terms=()))
    config = _with_absolute_places(config)
    _refuse_incomplete(config, task, energy)
    _refuse_priors_folder(folder, config)
    refuse_missing(config.tracker)
    speaks = progress and os.environ.get("RANK", "0") == "0"
    if resume is not None and overwrite:
        raise ValueError("resume goes on with the run that is there, and overwrite replaces it; ask for one of them.")
    if resume is not None and _is_finished(folder):
        if resume != "auto":
            raise ValueError(f"the run in {folder} is finished; there is nothing to resume.")
        _refuse_other_config(folder / "config.yaml", config)
        if speaks:
            print(f"the run in {folder} is finished; nothing was trained")
        return open_run(folder, task)
    start = None if resume is None else _checkpoint_of(folder, config, resume)
    if start is None:
        refuse_occupied(folder, overwrite or _only_begun(folder, config, resume))

    saves = [0.0]  # seconds that each took

    def save_checkpoint(trainer: Trainer) -> None:
        begun = time.perf_counter()
        processes = trainer.state.processes
        saved, step = folder / checkpoint.FOLDER, trainer.global_step

        def write(place: Path) -> None:
            with processes.together():
                if processes.main:
                    with trainer.averaged():
                        policy.save(place / "policy")
                    (place / "config.yaml").write_text(to_yaml(config))
                    write_state(place, "run", state)
            with processes.together():  # only now the folder is there for all
                write_state(place, _own(processes.rank), trainer.own_state_dict())

        with uninterrupted():
            if processes.count > 1:  # what `save` leaves as it is, the others must not wait for
                there = False
                with processes.together():
                    there = processes.main and checkpoint.is_good(saved, step)
                if processes.mean(there) > 0:
                    return
            # What takes every process, before one of them alone can fail at the disk.
            state = trainer.state_dict()
            with trainer.averaged():
                trainer.collected()
            with processes.together():
                if processes.main:
                    checkpoint.save(saved, step, write, keep=CHECKPOINTS)
                else:
                    write(checkpoint.being_written(saved, step))
            saves.append(time.perf_counter() - begun)

    # Several processes must leave together, so that what they hear waits for a place where all of them ask.
    listening = deferred() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else preemptible()
    with ExitStack() as around:
        around.enter_context(listening)
        # Libraries make errors of their own out of a Ctrl-C in their imports.
        with uninterrupted(), loading("torch and diffusers") if speaks else nullcontext():
            import accelerate  # noqa: F401
            from diffusers import DiffusionPipeline  # noqa: F401

            from ...samplers.loading.hints import widest_variance
            from ..learning.trainer import Trainer
            from .state_file import read_state, write_state
        around.enter_context(threads(config.threads))
        measured = around.enter_context(measuring(config, task, energy))
        prior = load_prior(config, task)
        conditions = prior.chain.conditions(widest_variance(prior.shape))
        if speaks:
            print(*prior.decisions, *(f"  {name:<10} {text}" for name, text in conditions.items()), sep="\n")
        policy = _initial_policy(config, prior)
        tracker = None if config.tracker is None else Tracker(config.tracker, folder, to_mapping(config))
        trainer = Trainer(
            prior,
            measured,
            config.train,
            policy=policy,
            metrics=folder / "metrics.jsonl",
            progress=progress,
            on_checkpoint=save_checkpoint if config.train.checkpoint_every else None,
            on_record=None if tracker is None else tracker.log,
        )
        processes, meter = trainer.state.processes, trainer.state.energies.meter
        result = None
        stopped: Exception | KeyboardInterrupt | None = None
        processes.refuse_other(-1 if start is None else checkpoint.step_of(start), "checkpoints to go on from")
        if start is not None:
            state = own = {}
            with processes.together():
                state = read_state(start, "run")
                own = read_state(start, _own(processes.rank % state["processes"]["count"]))
            trainer.load_state_dict(state, own)
        resumed = trainer.global_step
        with ExitStack() as ending:
            with processes.together():
                if processes.main and start is None:
                    ending.enter_context(new_run(folder, lambda: bool(trainer.history)))
                    # Half of it, left by a kill, would keep "auto" from going on; so would half of run.json.
                    replace_file(folder / "config.yaml", to_yaml(config))
                elif processes.main and start is not None:
                    ending.enter_context(RunLock(folder))
                    checkpoint.rewind(folder / checkpoint.FOLDER, trainer.global_step)
                    (folder / "metrics.jsonl").write_text("".join(strict_json(line) + "\n" for line in trainer.history))
                    if progress:
                        print(f"going on from {start}, after {trainer.global_step} steps")
            if processes.main and tracker is not None:
                ending.enter_context(tracker)
            try:
                result = trainer.train()
            except (Exception, KeyboardInterrupt) as error:
                if not trainer.history:
                    raise
                stopped = error
                if processes.sharded:  # all processes hold parts of the policy; one alone can save no more than the checkpoints
                    if not trainer.state.on_all(error):
                        raise
                    trainer.collected()
            interrupted = isinstance(stopped, KeyboardInterrupt) or (result is not None and result.interrupted)
            record = {
                "interrupted": interrupted,
                "preempted": isinstance(stopped, Preempted) or (result is not None and result.preempted),
                "stopped": f"{type(stopped).__name__}: {stopped}" if isinstance(stopped, Exception) else None,
                "new_steps": trainer.global_step - resumed,
                "updates": sum(line["phase"] == config.train.objective for line in trainer.history),
                "energy_calls": meter.calls if processes.count == 1 else trainer.history[-1]["energy_calls"],
                "bank_ess": trainer.state.preparation.effective,
                "log_z": None if result is None else result.log_z,
                "improvement": None if result is None or result.improvement is None else result.improvement.to_dict(),
                "seconds": None if result is None else round(result.seconds, 1),
                "checkpoint_seconds": round(max(saves), 3),  # the longest, for whoever has so many before SIGKILL
                "energy": list(config.energy.terms) if energy is None else None,
                "decisions": list(prior.decisions),
                "conditions": conditions,
                "trained_parameters": sum(weight.numel() for weight in policy.parameters() if weight.requires_grad),
                "device": str(prior.device),
                "versions": {
                    "tiltune": __version__,
                    "python": platform.python_version(),
                    **{name: version(name) for name in ("torch", "diffusers", "accelerate")},
                },
            }
            # The others wait: one that ended with an error would have torchrun end this one.
            waiting = processes.together() if stopped is None or trainer.state.on_all(stopped) else nullcontext()
            # What asks to stop meanwhile asks it of a run that has ended, and the record says how.
            with suppress(KeyboardInterrupt), uninterrupted(), waiting:
                if processes.main:
                    policy.save(folder / "policy")
                    replace_file(folder / "run.json", strict_json(record, indent=2) + "\n")
    if stopped is not None:
        raise stopped
    return Run(folder, config, prior, policy, record, task)


def _own(rank: int) -> str:
    """The file of one process in a checkpoint."""
    return f"process-{rank:05d}"


def _checkpoint_of(folder: Path, config: RunConfig, resume: str | Path) -> Path | None:
    """The checkpoint to go on from, None where "auto" finds none.

    Errors: ValueError for a damaged one, and for one of another config.
    """
    start = checkpoint.find(folder / checkpoint.FOLDER, resume)
    if start is not None and start.parent.resolve() != (folder / checkpoint.FOLDER).resolve():
        raise ValueError(f"{start} is of another run than {folder}; copy that run's folder, and resume the copy.")
    if start is not None:
        _refuse_other_config(start / "config.yaml", config)
    return start


def _is_finished(folder: Path) -> bool:
    record = folder / "run.json"
    if not record.exists():
        return False
    ended = json.loads(record.read_text())
    return not (ended["interrupted"] or ended["stopped"])


def _refuse_other_config(file: Path, config: RunConfig) -> None:
    """ValueError where ``file`` holds another run's config than ``config``; what only says how to wait or report may differ."""
    theirs = from_mapping(read_yaml(file), RunConfig(), str(file))
    if theirs.energy.workers and config.energy.workers:  # how many there are, and how patient one is, changes no energy
        theirs = replace(theirs, energy=replace(theirs.energy, workers=config.energy.workers, timeout=config.energy.timeout))
    waiting = replace(config.train, process_timeout=theirs.train.process_timeout)
    differing = _difference(asdict(theirs), asdict(replace(config, tracker=theirs.tracker, train=waiting)))
    if differing:
        raise ValueError(
            f"{file.parent} is of a run with another config: {differing}. Resume with the flags of that run, or --config {file}."
        )


def _difference(theirs: dict[str, Any], ours: dict[str, Any], place: str = "") -> str:
    """The first field in which two configs differ, in words; empty where there is none."""
    for name, value in theirs.items():
        if isinstance(value, dict) and isinstance(ours[name], dict) and name != "behavior":
            if found := _difference(value, ours[name], f"{place}{name}."):
                return found
        elif value != ours[name]:
            return f"{place}{name} is {value!r} there and {ours[name]!r} here"
    return ""


def _only_begun(folder: Path, config: RunConfig, resume: str | Path | None) -> bool:
    """Whether "auto" finds the same run, ended before its first checkpoint: to be started over without a word.

    Where none are kept, an interrupted run may hold hours, and is for its owner to replace.
    """
    path = folder / "config.yaml"
    if resume != "auto" or not path.exists() or path.read_text() != to_yaml(config):
        return False
    return config.train.checkpoint_every > 0 or not (folder / "run.json").exists()


def _refuse_incomplete(config: RunConfig, task: Task | None, energy: Energy | None) -> None:
    if config.task is None and config.prior.source is None:
        raise ValueError("nothing says what to fine-tune: name a task, or a prior (--prior FOLDER) with an energy.")
    _refuse_other_task(config, task)
    if energy is None and not config.energy.terms:
        raise ValueError("nothing says what to minimize: name an energy, --energy FILE.py:NAME.")
    for term in config.energy.terms if energy is None else ():
        spec = parse_energy(term)
        if not spec.place and task is None:
            raise ValueError(f"the energy {term!r} names no file, and without a task there is no other place: FILE.py:{term}.")


def _refuse_priors_folder(folder: Path, config: RunConfig) -> None:
    """ValueError where the run would be written into the prior that it starts from, or over it."""
    prior, run = Path(config.prior.source or "").expanduser().resolve(), folder.resolve()
    if config.prior.source is not None and prior.is_dir() and (run.is_relative_to(prior) or prior.is_relative_to(run)):
        raise ValueError(f"{folder} and the prior {config.prior.source} lie one in the other; name another folder with --out.")


def _refuse_other_task(config: RunConfig, task: Task | None) -> None:
    if config.task != (None if task is None else task.name):
        raise ValueError(
            f"the config is of the task {config.task!r}, but {None if task is None else task.name!r} is given; in Python, pass"
            " task=tiltune.tasks.NAME.TASK with a config of that task, and none with a prior of your own."
        )


def _with_absolute_places(config: RunConfig) -> RunConfig:
    """The config with the prior's folder and the energies' files spelled out, so that it repeats the run from anywhere; a hub
    id stays."""
    terms = tuple(absolute_term(term) for term in config.energy.terms)
    config = replace(config, energy=replace(config.energy, terms=terms))
    source = config.prior.source
    if source is None or not Path(source).expanduser().exists():
        return config
    return replace(config, prior=replace(config.prior, source=str(Path(source).expanduser().absolute())))


def absolute_term(term: str) -> str:
    """An energy's term with the place of its file spelled out; a module stays, and so does a file in a folder with ":" or "*"
    in its name, which no term can spell.

    Errors: ValueError for a term that cannot be read.
    """
    place = parse_energy(term).place
    if not (place.endswith(".py") or "/" in place or "\\" in place):
        return term
    absolute = term.replace(place, str(Path(place).expanduser().absolute()), 1)
    try:
        return absolute if parse_energy(absolute).name == parse_energy(term).name else term
    except ValueError:
        return term


# --- its parts -------------------------------------------------------------------------------------------------------


def load_energies(config: RunConfig, task: Task | None, energy: Energy | None = None) -> Energy:
    """``energy``, or the weighted sum of the config's terms (names without a module are the task's); behind a memory if the
    config asks for one, and on workers if it asks for them."""
    from ..energies.cache import CachedEnergy

    chosen, search = config.energy, None if task is None else task.module
    if chosen.workers:
        from ..energies.workers.pool import EnergyPool

        measured: Energy | Sequence[str] = chosen.terms if energy is None else energy
        if energy is None and all(_is_remote(term) for term in chosen.terms):  # they wait, for which a thread is enough
            measured = combine(chosen.terms, search)
        energy = EnergyPool(measured, chosen.workers, search=search, timeout=chosen.timeout)
    elif energy is None:
        energy = combine(chosen.terms, search)
    return CachedEnergy(energy) if chosen.cache else energy


@contextmanager
def measuring(config: RunConfig, task: Task | None, energy: Energy | None) -> Iterator[Energy]:
    """`load_energies` for the length of a block: its workers are there, and gone behind it."""
    measured = load_energies(config, task, energy)
    if not config.energy.workers:
        yield measured
        return
    from ..energies.cache import CachedEnergy
    from ..energies.workers.pool import EnergyPool

    pool = measured.energy if isinstance(measured, CachedEnergy) else measured
    assert isinstance(pool, EnergyPool)
    with pool:
        yield measured


def _is_remote(term: str) -> bool:
    spec = parse_energy(term)
    return spec.name == "from_remote" and spec.place in ("tiltune", "tiltune.finetune.energies.workers.remote")


def _ships(term: str, task: Task | None) -> bool:
    """Whether a term names nothing but what a module of ``tiltune.tasks`` defines, and not what it happens to import."""
    spec = parse_energy(term)
    place = spec.place or ("" if task is None else task.module)
    if not SHIPPED.fullmatch(place):
        return False
    try:
        named = getattr(import_module(place), spec.name, None)
    except ModuleNotFoundError:
        return False
    return SHIPPED.fullmatch(getattr(named, "__module__", "")) is not None


def load_prior(config: RunConfig, task: Task | None) -> Prior:
    """The task's prior, or the one at ``config.prior.source``, on the config's device."""
    device = _device(config)
    if task is not None:
        prior = task.load_prior(config.prior)
        prior.denoiser.to(device)  # pyright: ignore[reportAttributeAccessIssue]
        return prior
    from ...samplers.loading import pretrained

    settings = asdict(config.prior)
    return pretrained.load_prior(settings.pop("source"), device=device, **settings)


def _device(config: RunConfig) -> str:
    import torch

    there = {"cuda": torch.cuda.is_available(), "cpu": True}  # not mps, which has no float64
    # Under torchrun every process has a GPU of its own.
    names = {"cuda": f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda", "cpu": "cpu"}
    if config.device == "auto":
        return next(names[name] for name, usable in there.items() if usable)
    if not there.get(config.device):
        raise ValueError(f"the device is {config.device!r}, but torch sees none here; use --device auto or cpu.")
    return names[config.device]


def _initial_policy(config: RunConfig, prior: Prior) -> Policy:
    from ...samplers.make_policy import make_policy

    chosen = config.policy
    return make_policy(
        prior, chosen.kind, rank=chosen.rank, targets=chosen.targets, gradient_checkpointing=chosen.gradient_checkpointing
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's threads while a run works: their number is part of its arithmetic."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- coming back to it -----------------------------------------------------------------------------------------------


def read_config(folder: str | Path) -> RunConfig:
    """The config of the run in ``folder``.

    Errors: ValueError where there is none, or one that cannot be read.
    """
    path = Path(folder) / "config.yaml"
    if not path.exists():
        raise ValueError(f"there is no run in {folder}: {path} is missing.")
    return from_mapping(read_yaml(path), RunConfig(), str(path))


def open_run(folder: str | Path, task: Task | None = None) -> Run:
    """The run in ``folder`` with its prior and policy loaded; ``task`` as in `train`. Runs no code that the folder names.

    Errors: ValueError for a folder without a finished run, or with files that do not fit together.
    """
    from ...samplers.loading.policy import load_policy

    folder = Path(folder)
    config = read_config(folder)
    _refuse_other_task(config, task)
    if not (folder / "run.json").exists() or not (folder / "policy").is_dir():
        raise ValueError(f"the run in {folder} has no policy yet: it is still training, or its process was killed.")
    try:
        record = json.loads((folder / "run.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder / 'run.json'} is not JSON: {error}.") from None
    prior = load_prior(config, task)
    return Run(folder, config, prior, load_policy(prior, folder / "policy"), record, task)
