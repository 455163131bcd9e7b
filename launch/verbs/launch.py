"""`tiltune launch`: the same training in several processes, here or on a cluster."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .. import flags
from ..cluster import slurm
from ..cluster.environment import processes, settings, threads
from ..cluster.jobs import KEPT, job, submit
from ..cluster.options import Options
from ..cluster.quoting import shell
from ..cluster.torchrun import GRACE, REQUEUE, SIGNALS, UNSAVED

DESCRIPTION = f"""Run a command of tiltune in several processes: what follows -- is passed on as it is. Locally torchrun starts
them; for a cluster a job file is written and submitted. --dry-run prints that command or file instead. kubernetes and skypilot
need the name of an image that holds tiltune, in TILTUNE_IMAGE. Exit status: the processes' own (of the first that failed),
{REQUEUE} if they saved and want to run again, {UNSAVED} if they were told to stop before anything new was saved, 128 + N if
signal N ended them; of the program that submits; 2 bad input.

example: tiltune launch --cpu --nproc 2 -- train digits --out my-run

example: tiltune launch --backend slurm --nodes 2 --nproc 8 --dry-run -- train --config run.yaml > job.sbatch
"""

# Verbs that work in several processes.
LAUNCHED = ("train",)


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit status, unless it is local: then this process becomes torchrun."""
    options, command = read(argv)
    if options.backend == "local":
        return local(options, command)
    text = job(options, command)
    if options.dry_run:
        print(text, end="")
        return 0
    if options.backend == "slurm":
        for doubt in slurm.doubts(command, os.environ.get("SBATCH_TIMELIMIT")):
            print(f"tiltune launch: {doubt}", file=sys.stderr)
    return submit(options.backend, text)


def read(argv: list[str]) -> tuple[Options, list[str]]:
    """The options before -- and the command after it.

    Errors: ValueError for a missing or unknown command, for counts below 1 and for what a backend cannot do.
    """
    if "--" not in argv and not {"-h", "--help"} & set(argv):
        raise ValueError("there is no -- before the command to run; write tiltune launch [options] -- train ….")
    position = argv.index("--") if "--" in argv else len(argv)
    options = flags.parse(Options, argv[:position], "tiltune launch", DESCRIPTION)
    command = argv[position + 1 :]
    if not command or command[0] not in LAUNCHED:
        given = repr(command[0]) if command else "nothing"
        raise ValueError(f"{given} follows --, which does not run in several processes; launch {' or '.join(LAUNCHED)}.")
    for name in ("nproc", "nodes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}, and nothing would run; give at least 1.")
    if options.backend == "local" and options.nodes > 1:
        raise ValueError(
            f"--nodes {options.nodes} needs a cluster, and --backend local is this machine; choose another --backend."
        )
    if options.backend in ("kubernetes", "skypilot") and not kept(command):
        raise ValueError(f"the run would be lost with its machine; keep it on the mounted storage: --out {KEPT}/my-run.")
    return options, command


def kept(command: list[str]) -> bool:
    """Whether the command's --out lies below `KEPT`."""
    out = flags.given(command, "--out")
    return out is not None and Path(os.path.normpath(out)).is_relative_to(KEPT)


def local(options: Options, command: list[str]) -> int:
    """Become torchrun; returns 0 only after a dry run."""
    nproc = processes(options)
    environment = settings(options) | {"OMP_NUM_THREADS": threads(nproc)}
    words = [sys.executable, "-m", f"{slurm.__package__}.torchrun", "--standalone", "--nproc-per-node", str(nproc)]
    words += ["--signals-to-handle", SIGNALS, "--shutdown-timeout", str(GRACE)]
    words += ["-m", f"{slurm.__package__}.worker", *command]
    if options.dry_run:
        print("env", *(f"{name}={shell(value)}" for name, value in environment.items()), *map(shell, words))
        return 0
    device = "CPU" if options.cpu else "a GPU each"
    print(f"{nproc} processes on {device}, OMP_NUM_THREADS={environment['OMP_NUM_THREADS']} each", file=sys.stderr, flush=True)
    os.execve(sys.executable, words, os.environ | environment)
