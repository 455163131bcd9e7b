"""One process of a distributed run: the command line as ever, with its exit status written where `torchrun.py` reads it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from ...finetune.distributed.signals import Preempted, deferred, preemptible
from .. import cli
from .torchrun import STATUS_FOLDER, UNSAVED, end_at_once, too_late


def main() -> None:
    """Entry point of `python -m tiltune.launch.cluster.worker VERB …`, under torchrun."""
    stop_with_parent()
    file = Path(os.environ[STATUS_FOLDER], os.environ["LOCAL_RANK"])
    try:
        # From the first moment on: the others would wait for one that left while it starts, and cannot hear while they wait.
        with deferred() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else preemptible():
            file.touch()
            status = cli.run(sys.argv[1:])
    except SystemExit as stop:  # how tyro ends for --help and for flags that it cannot read
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except Preempted:
        status = UNSAVED
    too_late()
    file.write_text(str(status))
    end_at_once(status)


def stop_with_parent() -> None:
    """Hear SIGTERM when torchrun is gone, killed for its memory perhaps: nobody else would stop a run that nobody watches.

    Linux alone has such a request; elsewhere nothing is done.
    """
    if sys.platform == "linux":
        pdeathsig = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(pdeathsig, int(signal.SIGTERM))


if __name__ == "__main__":
    main()
