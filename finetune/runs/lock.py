"""One writer a run folder. The lock is the kernel's (flock, by `filelock`): it ends with the process that holds it, however
that ends, and a forked worker that outlives its parent does not keep it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

NAME = ".lock"
PATIENCE = 0.2  # seconds to try again: the holder may be removing its file just now


class RunLock:
    """``with RunLock(folder):`` the block is the only writer of the run in ``folder``, on any machine that shares it.

    The folder must exist; the lock file in it goes with the block.

    Errors: ValueError, on entering, where another one holds the lock: it names the process and its host.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / NAME
        self._lock = FileLock(self._path, PATIENCE, 0o644, fallback_to_soft=False, on_acquired=_sign)

    def __enter__(self) -> RunLock:
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"{self.folder} is being written by {self._holder()}; wait until that ends, or name another folder for this run."
            ) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock.is_locked:  # not in a forked worker that runs to the end of its parent's block
            self._path.unlink(missing_ok=True)  # while it is locked: who has opened it by now sees that it is gone
            self._lock.release()

    def _holder(self) -> str:
        try:
            return self._path.read_text(errors="replace") or "another process"
        except FileNotFoundError:
            return "another process"


def _sign(descriptor: int) -> None:
    """Write into the locked file who holds it."""
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
