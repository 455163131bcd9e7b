"""One writer a run folder. The lock is the kernel's (flock), so it ends with the process that holds it, however that ends."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

NAME = ".lock"
# Open locks. A forked worker that outlives its parent must not keep the run locked.
_HELD: set[int] = set()


class RunLock:
    """``with RunLock(folder):`` the block is the only writer of the run in ``folder``, on any machine that shares it.

    The folder must exist; the lock file in it goes with the block.

    Errors: ValueError, on entering, where another one holds the lock: it names the process and its host.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / NAME
        self._descriptor = -1

    def __enter__(self) -> RunLock:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 300).decode(errors="replace") or "another process"
                os.close(descriptor)
                raise ValueError(
                    f"{self.folder} is being written by {holder}; wait until that ends, or name another folder for this run."
                ) from None
            except OSError:
                os.close(descriptor)
                raise
            if self._is_ours(descriptor):
                break
            os.close(descriptor)  # its holder removed the file between our opening and locking it
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._descriptor = descriptor
        _HELD.add(descriptor)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._descriptor not in _HELD:  # a forked worker that runs to the end of its parent's block
            return
        _HELD.remove(self._descriptor)
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _is_ours(self, descriptor: int) -> bool:
        """Whether the file that is locked is still the one that others find."""
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except FileNotFoundError:
            return False


def _let_go() -> None:
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)
