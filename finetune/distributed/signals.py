"""What ends a training from outside: signals, where they may and where half of something would be worse, and other processes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# What clusters send before they take a machine away. Ctrl-C is Python's own.
PREEMPTING = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(KeyboardInterrupt):
    """The process is to stop and to be started again: as Ctrl-C, but nobody is there to do it by hand."""


class ProcessError(RuntimeError):
    """Another process of the run failed, or the processes no longer agree."""


class NoAnswer(ProcessError):
    """Another process hangs, or is slower than this one was told to wait. Nothing can be done together any more."""


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

    try:
        with _handled((signal.SIGINT, *PREEMPTING), note):
            yield
    finally:
        _asked.clear()


@contextmanager
def _handled(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[dict[int, Any]]:
    """These signals go to ``handler`` within the block; gives {number: the handler before}, which they have again behind it."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield before
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier if earlier is not None else signal.SIG_DFL)


def _preempt(number: int, frame: FrameType | None) -> None:
    raise Preempted(signal.Signals(number).name)


@contextmanager
def preemptible() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise `Preempted` within the block; in a thread of its own, the block hears none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handled(PREEMPTING, _preempt):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and what `preemptible` hears take effect behind the block; the first of them, where there are several."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return
    pressed: list[int] = []
    heard = [number for number in (signal.SIGINT, *PREEMPTING) if callable(signal.getsignal(number))]
    with _handled(heard, lambda number, _: pressed.append(number)) as before:
        yield
    if pressed:
        before[pressed[0]](pressed[0], None)
