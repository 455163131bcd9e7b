"""Signals that end a training: where they may, and where half of something would be worse than waiting."""

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
