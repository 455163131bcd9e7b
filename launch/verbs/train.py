"""`tiltune train`: fine-tune a shipped task or any diffusers prior, and leave a run folder."""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...finetune.config.run import RunConfig, pretrained_recipe
from ...finetune.config.yaml_file import from_mapping, read_yaml, to_yaml
from ...tasks.task import TASKS, load_task
from .. import flags
from ..cluster.torchrun import REQUEUE, UNSAVED

if TYPE_CHECKING:
    from ...finetune.runs.run import Run

DESCRIPTION = """Fine-tune a sampler so that it draws from p_prior(x) · exp(-E(x)/alpha), and write the run into --out:
config.yaml, metrics.jsonl, run.json and the policy. A shipped TASK brings its prior and energies; otherwise --prior names a
model saved by diffusers, and --energy the function to minimize. A flag overrides --config, which overrides the task's recipe.
Exit status: 0 trained, 130 interrupted (the run is usable), 75 the same by SIGTERM or SIGUSR1, 76 these before anything new was
saved, 1 the training broke down, 2 bad input, 70 an unexpected error, after its traceback.

example: tiltune train digits --alpha 0.25 --out my-run

example: tiltune train --prior my-ddpm-folder --energy my_energy.py:brightness --alpha 0.1 --steps 50
"""


@dataclass(frozen=True)
class Own:
    """What `tiltune train` takes besides the config."""

    config: Path | None = None
    """A YAML file with any part of the config."""
    out: Path | None = None
    """The run's folder; runs/NAME where not given. Refused if it holds a run, unless --overwrite."""
    overwrite: bool = False
    """Replace the run in --out."""
    resume: str | None = None
    """Go on from a checkpoint: auto for the last good one in --out (or a start, where there is none), or the path of one."""
    print_config: bool = False
    """Print the whole config as YAML and stop."""


Options = flags.flags(pretrained_recipe(), Own, tuple(TASKS))


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit status."""
    base = starting_point(argv)
    options = flags.parse(flags.flags(base, Own, tuple(TASKS)), argv, "tiltune train", DESCRIPTION)
    if options.task not in (None, base.task):
        raise ValueError(f"name the task first: tiltune train {options.task} ….")
    config = with_labels_energy(flags.with_flags(base, options))
    if options.print_config:
        print(to_yaml(config), end="")
        return 0
    return train(config, options.out or default_folder(config), options.overwrite, options.resume)


def with_labels_energy(config: RunConfig) -> RunConfig:
    """The config with the task's energy of labels, where labels are asked for and the recipe's own energy is still there."""
    if config.task is None or config.prior.labels is None:
        return config
    task = load_task(config.task)
    if task.labelled_energy is None or config.energy.terms != task.recipe().energy.terms:
        return config
    return replace(config, energy=replace(config.energy, terms=(task.labelled_energy,)))


def said_again(trained: Run) -> str:
    """The energies as a later command must name them: not at all where they are a shipped task's."""
    try:
        trained.energy()
    except ValueError:
        return f" --energy {shlex.join(trained.config.energy.terms)}"
    return ""


def train(config: RunConfig, out: Path, overwrite: bool, resume: str | None = None) -> int:
    from ...finetune.runs.train import train as fine_tune

    task = None if config.task is None else load_task(config.task)
    trained = fine_tune(config, out, task=task, overwrite=overwrite, resume=resume)
    ended = status(trained.record)
    if os.environ.get("RANK", "0") != "0":  # one of several processes speaks
        return ended
    seconds, calls = trained.record["seconds"], trained.record["energy_calls"]
    warm = "" if config.train.warm_start == "none" else "warm start and "
    print(f"{warm}{trained.record['updates']} updates, {calls:,} energy calls, {seconds:.0f} s; written to {out}")
    if trained.record["interrupted"]:
        again = "--resume auto goes on" if config.train.checkpoint_every else "--overwrite starts again"
        print(
            f"interrupted: {out} holds the policy as it was then. `tiltune evaluate {out}{said_again(trained)}` judges it; the"
            f" same command with {again}.",
            file=sys.stderr,
        )
        return ended
    if trained.record["over_budget"]:
        print(f"the updates ended early: {trained.record['over_budget']}")
    improvement = trained.record["improvement"]
    print("how much it helped was not measured, for want of held-out paths" if improvement is None else improvement["sentence"])
    print(f"next: tiltune evaluate {out}{said_again(trained)}")
    return 0


def status(record: dict[str, Any]) -> int:
    """The exit status of a training that ended as its ``record`` says."""
    if not record["interrupted"]:
        return 0
    if not record["preempted"]:
        return 130
    return REQUEUE if record["new_steps"] else UNSAVED


def starting_point(argv: list[str]) -> RunConfig:
    """The recipe that the command line asks for, with its --config: what the flags' defaults are."""
    task = argv[0] if argv and not argv[0].startswith("-") else None
    file = _config_file(argv)
    values: dict[str, Any] = {} if file is None else read_yaml(file)
    named = values.get("task", task)
    if task is not None and named != task:
        raise ValueError(f"{file} is a config of the task {named!r}, but the task {task!r} is asked for; leave out one of them.")
    # What is no name of a task at all is refused with the other types.
    base = recipe_of(named, argv, values) if isinstance(named, str) else pretrained_recipe()
    return from_mapping(values, base, str(file))


def recipe_of(name: str, argv: list[str], values: dict[str, Any]) -> RunConfig:
    """The default config of a task, in the dimension that the command line or else the config ``values`` ask for.

    Errors: ValueError for a dimension of a task that has one prior.
    """
    task = load_task(name)
    dim = _number("--dim", "dim", argv, values)
    if dim is None:
        return task.recipe()
    if task.recipe_in is None:
        raise ValueError(f"the task {name} has one prior, of one dimension; leave out the dim {dim}.")
    return task.recipe_in(dim, _number("--prior-seed", "seed", argv, values) or 0)


def _number(flag: str, key: str, argv: list[str], values: dict[str, Any]) -> int | None:
    """A whole number of the prior's section, from 0 on; anything else is None, to be refused where it is read."""
    section = values.get("prior")
    said = flags.given(argv, flag) or (section.get(key) if isinstance(section, dict) else None)
    return int(str(said)) if re.fullmatch("[0-9]+", str(said)) else None


def _config_file(argv: list[str]) -> Path | None:
    for position, word in enumerate(argv):
        if word == "--config" and argv[position + 1 :]:
            return Path(argv[position + 1])
        if word.startswith("--config="):
            return Path(word.partition("=")[2])
    return None


def default_folder(config: RunConfig) -> Path:
    """runs/ and the name of the task or of the prior."""
    return Path("runs") / (config.task or Path(os.path.abspath(config.prior.source or "")).name)
