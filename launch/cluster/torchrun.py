"""torchrun, ending with its workers' exit status: what `tiltune launch` and its templates run on every node.

`torch.distributed.run` ends with 1 whatever its workers ended with, and after a signal it does not look at what they ended with.
A cluster has to tell "saved, run me again" from a breakdown, so workers write their status down (`worker.py`), and this reads it.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from ...finetune.distributed.signals import PREEMPTING

# EX_TEMPFAIL of sysexits.h: a checkpoint is written, and the same command continues from it.
REQUEUE = 75
# Told to stop before anything new was saved: the same command starts where this one did.
UNSAVED = 76
# What a worker hears of, and the seconds that it has to save before SIGKILL: within the 120 of the SLURM template's warning.
SIGNALS = "SIGTERM,SIGINT,SIGUSR1"
GRACE = 100
# Where workers write their status, one file a local rank. It is there once the worker hears signals, and empty while it runs.
STATUS_FOLDER = "TILTUNE_STATUS_FOLDER"


def too_late() -> None:
    """Hear no more of what asks to stop: all is done, and a signal in the interpreter's own end would still kill the process."""
    for number in PREEMPTING:
        signal.signal(number, signal.SIG_IGN)


def end_at_once(status: int) -> NoReturn:
    """End a process that has joined a group, and has done and closed all, without the interpreter's teardown: a thread of torch's
    that still wants Python then would abort it (134)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    """Entry point of `python -m tiltune.launch.cluster.torchrun`, which takes torchrun's arguments."""
    raise SystemExit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """torchrun with ``arguments``; returns 0, the status of the worker that failed first, or after a signal that of all.

    A worker that a signal killed counts as 128 + the signal, as in a shell; so does a stop whose workers were killed or differ.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    given = os.environ.get(STATUS_FOLDER, "")  # by a job script that looks into it, on its own node
    with nullcontext(given) if Path(given).is_dir() and given else tempfile.TemporaryDirectory(prefix="tiltune-") as folder:
        os.environ[STATUS_FOLDER] = folder
        try:
            torchrun.main(supported(arguments))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            status = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
            print(f"tiltune launch: rank {rank} ended first, with status {status}.", file=sys.stderr)
        except SignalException as stop:
            status = agreed(Path(folder), 128 + stop.sigval)
            print(f"tiltune launch: stopped by {stop.sigval.name}, with status {status}.", file=sys.stderr)
        else:
            status = 0
    too_late()
    return status


def supported(arguments: list[str]) -> list[str]:
    """``arguments`` without --shutdown-timeout where this torch has none (before 2.12), which is said."""
    from torch.distributed.launcher.api import LaunchConfig

    if hasattr(LaunchConfig, "shutdown_timeout") or "--shutdown-timeout" not in arguments:
        return arguments
    position = arguments.index("--shutdown-timeout")
    print(
        f"tiltune launch: this torch gives a stopped process 30 s to save; install torch 2.12 for {arguments[position + 1]} s.",
        file=sys.stderr,
    )
    return arguments[:position] + arguments[position + 2 :]


def agreed(folder: Path, otherwise: int) -> int:
    """The one status that all workers wrote into ``folder``; ``otherwise`` where they differ or one was killed."""
    written = {file.read_text() for file in folder.iterdir()}
    return int(written.pop()) if len(written) == 1 and written != {""} else otherwise


if __name__ == "__main__":
    main()
