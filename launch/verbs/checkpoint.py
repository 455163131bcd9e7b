"""`tiltune checkpoint`: what a run has saved to go on from, and whether it is whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ...finetune.runs.checkpoint import FOLDER, Checkpoint, checkpoints, last
from .. import flags

Action = Literal["list", "verify"]

DESCRIPTION = """Look at the checkpoints of a run: list shows each with its step and size, verify says everything that is wrong
with a damaged one. Both read every file and compare it with the manifest that was saved with it; both change nothing. Exit
status: 0 all are good, 1 something is damaged, 2 bad input.

example: tiltune checkpoint list my-run

example: tiltune checkpoint verify my-run
"""


@dataclass(frozen=True)
class Options:
    """What `tiltune checkpoint` takes."""

    action: Annotated[Action, flags.POSITIONAL]
    """What to do."""
    run: flags.RunFolder
    """Folder of the run."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit status."""
    options = flags.parse(Options, argv, "tiltune checkpoint", DESCRIPTION)
    folder = options.run / FOLDER
    found = checkpoints(folder)
    if not found:
        raise ValueError(f"{options.run} holds no checkpoints: {folder} {'is empty' if folder.is_dir() else 'is missing'}.")
    wrong = None
    named = None
    try:
        named = last(folder)
    except ValueError as error:
        wrong = str(error)
    print(_table(found, named) if options.action == "list" else _report(found))
    if wrong is not None:
        print(wrong)
    return 0 if wrong is None and all(checkpoint.good for checkpoint in found) else 1


def _table(found: list[Checkpoint], named: Path | None) -> str:
    lines = [f"{'step':>8}{'size':>12}"]
    for checkpoint in found:
        state = "good" if checkpoint.good else f"damaged: {checkpoint.problems[0]}"
        mark = "   (last)" if checkpoint.path == named else ""
        lines.append(f"{checkpoint.step:>8}{checkpoint.size / 1e6:>9.2f} MB   {state}{mark}")
    return "\n".join(lines)


def _report(found: list[Checkpoint]) -> str:
    lines = []
    for checkpoint in found:
        lines.append(f"{checkpoint.path.name}: {'good' if checkpoint.good else 'damaged'}")
        lines += [f"    {problem}" for problem in checkpoint.problems]
    return "\n".join(lines)
