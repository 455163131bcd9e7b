"""What ends a training from outside: signals, where they may and where half of something would be worse, and other processes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What clusters send before they take a machine away. Ctrl-C is Python's own.
PREEMPTING = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(KeyboardInterrupt):
    """The process is to stop and to be started again: as Ctrl-C, but nobody is there to do it by hand."""


class ProcessError(RuntimeError):
    """Another process of the run failed, or the processes no longer agree."""


# The first signal that `deferred` heard.
_asked: list[type[KeyboardInterrupt]] = []


def asked_to_stop() -> type[KeyboardInterrupt] | None:
    """What `deferred` has heard so far: KeyboardInterrupt, Preempted, or nothing."""
    return _asked[0] if _asked else None


@contextmanager
def deferred() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGUSR1 within the block only set `asked_to_stop`: of several processes, none may leave alone.

    What was heard is forgotten at the end of the block.
    """

    def note(number: int, frame: FrameType | None) -> None:
        _asked.append(KeyboardInterrupt if number == signal.SIGINT else Preempted)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, *PREEMPTING)}
    try:
        yield
    finally:
        _asked.clear()
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _preempt(number: int, frame: FrameType | None) -> None:
    raise Preempted(signal.Signals(number).name)


@contextmanager
def preemptible() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise `Preempted` within the block; in a thread of its own, the block hears none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _preempt) for number in PREEMPTING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and what `preemptible` hears take effect behind the block; the first of them, where there are several."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return
    pressed: list[int] = []
    heard = [number for number in (signal.SIGINT, *PREEMPTING) if callable(signal.getsignal(number))]
    before = {number: signal.signal(number, lambda number, _: pressed.append(number)) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if pressed:
        handler = before[signal.Signals(pressed[0])]
        assert callable(handler)
        handler(pressed[0], None)
