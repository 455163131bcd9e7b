"""What a user of SLURM needs beside the job file: how to watch, read and stop the job, and what will keep it from going on."""

from __future__ import annotations

import re
import shlex
import subprocess

from .. import flags

# A warning 120 s before the limit, up to a minute early, and what remains for the training.
SHORTEST = 5.0
LIMIT = re.compile(r"(?:(?P<days>\d+)-(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?|(?P<plain>\d+(?::\d+){0,2}))")


def minutes(limit: str) -> float | None:
    """A time limit as sbatch reads it, in minutes; None for none, and for what is no limit.

    M, M:S, H:M:S, D-H, D-H:M, D-H:M:S (sbatch(1), --time).
    """
    found = LIMIT.fullmatch(limit.strip())
    if found is None:
        return None
    if found["days"]:
        hours, rest, seconds = (int(found[name] or 0) for name in ("first", "second", "third"))
        return 1440.0 * int(found["days"]) + 60 * hours + rest + seconds / 60
    parts = [int(part) for part in found["plain"].split(":")]
    if len(parts) == 3:
        return 60.0 * parts[0] + parts[1] + parts[2] / 60
    return parts[0] + (parts[1] / 60 if len(parts) == 2 else 0.0)


def doubts(command: list[str], limit: str | None) -> list[str]:
    """Why a job with this training command and time limit (None where the cluster's own holds) would not go on by itself."""
    found = []
    if flags.given(command, "--resume") != "auto":
        found.append(
            "without --resume auto a job that SLURM starts again stops at the run that it has left itself; add it to the command."
        )
    if flags.given(command, "--checkpoint-every") == "0":
        found.append("--checkpoint-every 0 keeps no checkpoints, so a job that is stopped has nothing to go on from.")
    short = None if limit is None else minutes(limit)
    if short is not None and 0 < short < SHORTEST:
        found.append(
            f"the time limit is {short:g} minutes: SLURM asks to stop 120 s before it, and up to a minute earlier still, so that"
            " hardly a step is taken; give several minutes more than the training takes to start."
        )
    return found


def told(parsable: str) -> str:
    """What to say of a job, from what `sbatch --parsable` answered: its number and the three commands that come next."""
    job = parsable.strip().partition(";")[0]
    log = f"slurm-{job}.out"
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True)
    if (stdout := re.search(r"StdOut=(.+)", shown.stdout)) is not None:
        log = stdout[1]
    return f"job {job} is in the queue\n  watch  squeue --job {job}\n  log    tail -F {shlex.quote(log)}\n  stop   scancel {job}"
