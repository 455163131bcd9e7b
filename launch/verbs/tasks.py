"""`tiltune tasks`: what ships, and how to run it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...tasks.task import TASKS, load_task
from .. import flags

if TYPE_CHECKING:
    from ...finetune.runs.run import Run

DESCRIPTION = """List the shipped tasks, each with the command that runs it. A task is a prior, energies on it, and what is
known of the truth.

example: tiltune tasks
"""


@dataclass(frozen=True)
class Options:
    """What `tiltune tasks` takes: nothing."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit status."""
    flags.parse(Options, argv, "tiltune tasks", DESCRIPTION)
    commands = {name: (summary, f"tiltune train {name}") for name, summary in TASKS.items()}
    commands["2d"] = ("the mixture task, trained and judged by one command", "tiltune 2d")
    for name, (summary, command) in commands.items():
        print(f"{name:<10} {summary}\n{'':<10} {command}")
    return 0


def open_with_task(folder: Path) -> Run:
    """The run in ``folder``, with its task, and torch set to its number of threads."""
    from ...finetune.runs.loading import loading
    from ...finetune.runs.run import open_run, read_config

    config = read_config(folder)
    with loading("torch and the run"):
        task = None if config.task is None else load_task(config.task)
        import torch

        torch.set_num_threads(config.threads)
        return open_run(folder, task)
