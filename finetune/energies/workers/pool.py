"""Workers for a slow energy: the rows of a batch are split over them, and a batch that does not come back is asked again."""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from ..energy import Energy, call_energy
from ..error import EnergyError, energy_name
from ..names import parse_energy
from ..weighted_sum import WeightedSum
from .wire import pack_samples, unpack_energies
from .worker import ANSWER
from .worker import __name__ as WORKER

PARTS = 32  # of a batch, at most: what a worker is asked for does not depend on how many there are
LOADING = 600.0  # seconds that a worker process may take to load the energy

Answer = tuple[Tensor, dict[str, Tensor]]  # energies [b], and those of the terms


class EnergyPool:
    """An energy on ``workers`` workers; overlapped: the trainer draws the next rollout while they work.

    energy: terms as ``--energy`` takes them, which every worker *process* loads by itself (``search`` as in `load_energy`), on
        one torch thread and with samples on the CPU; or a function, which *threads* share, for one that waits or releases the
        GIL. A batch is cut into at most 32 parts of two rows or more, whatever the number of workers, so that the energies do
        not depend on it, nor on who was faster.
    timeout: seconds for a batch; None waits. What has not come back then, or was lost with a process that died, is asked again,
        ``retries`` times, of new workers. The old processes are killed; threads cannot be, and are left behind with a warning.

    One batch at a time: another `start` gives up the one before. energy: the function that threads share, None where processes
    load ``terms`` from ``search``. term_values: as in `WeightedSum`.

    Errors: ValueError for no workers, a timeout that is not positive, or an energy that cannot be loaded; EnergyError where it
    raises, and after the last retry.
    """

    overlaps = True

    def __init__(
        self,
        energy: Energy | Sequence[str],
        workers: int,
        *,
        search: str | None = None,
        timeout: float | None = None,
        retries: int = 2,
    ) -> None:
        if workers < 1:
            raise ValueError(f"the pool has {workers} workers; it needs at least one.")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"the timeout of the pool is {timeout}; give positive seconds, or None.")
        self.workers, self.timeout, self.retries = workers, timeout, retries
        self.energy, self.terms, self.search = energy if callable(energy) else None, list[str](), search
        if callable(energy):
            self.__name__, self.titles = energy_name(energy), getattr(energy, "titles", {})
            self._hire: Callable[[], _Worker] = lambda: _Function(energy)
        else:
            terms = self.terms = [energy] if isinstance(energy, str) else list(energy)
            specs = [parse_energy(term) for term in terms]
            self.__name__ = " + ".join(spec.title for spec in specs)
            self.titles = {name: spec.title for spec in specs for name in (spec.label, spec.target)}
            self._hire = lambda: _Process(terms, search)
        self.term_values: dict[str, Tensor] = {}
        self._crew = _Crew()
        self._finalizer = weakref.finalize(self, _Crew.dismiss, self._crew)

    def __call__(self, x: Tensor, **context: Any) -> Tensor:
        """x [B, ...] → [B] on the device of ``x``."""
        return self.start(x, **context)()

    def start(self, x: Tensor, **context: Any) -> Callable[[], Tensor]:
        """Set the workers to work; what is returned waits for E(x) [B]. Neither ``x`` nor the context may change until then."""
        self.open()
        rows = torch.arange(len(x)).tensor_split(max(1, min(PARTS, len(x) // 2)))
        batch = _Batch([_select(x.detach(), context, part.tolist()) for part in rows])
        started = self._crew.ask(batch)

        def finish() -> Tensor:
            answers = self._answers(batch, started, len(x))
            self.term_values = {name: torch.cat([terms[name] for _, terms in answers]).to(x.device) for name in answers[0][1]}
            return torch.cat([value for value, _ in answers]).to(x.device)

        return finish

    def open(self) -> None:
        """Have all workers ready; by itself, this happens with the first batch.

        Errors: ValueError for an energy that cannot be loaded.
        """
        crew = self._crew
        lost = [member for member in crew.members if member.lost]
        crew.members = [member for member in crew.members if not member.lost]
        for member in lost:
            member.worker.end()
        hired: list[_Worker] = []
        try:
            hired.extend(self._hire() for _ in range(self.workers - len(crew.members)))
            for worker in hired:
                worker.ready()
        except BaseException:
            for worker in hired:
                worker.end()
            raise
        for worker in hired:
            crew.employ(worker)

    def close(self) -> None:
        """End the workers. A later batch starts new ones."""
        self._crew.dismiss()

    def __enter__(self) -> EnergyPool:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _answers(self, batch: _Batch, started: float, count: int) -> list[Answer]:
        crew, reason = self._crew, None
        for attempt in range(self.retries + 1):
            if attempt:
                self.open()
                started = crew.ask(batch)
            reason = crew.wait(batch, None if self.timeout is None else started + self.timeout)
            if batch.error is not None:
                raise batch.error
            if reason is None:
                return [answer for answer in batch.answers if answer is not None]
            if reason == _LATE:
                reason = f"did not answer for {count} samples within {self.timeout:g} s"
                crew.abandon()
        raise EnergyError(
            f"energy {self.__name__} {reason}, at the last of {self.retries + 1} attempts; look for what hangs or dies in it, or"
            " raise the timeout if it is only slow."
        )


# --- one worker -------------------------------------------------------------------------------------------------------


class _Worker(Protocol):
    def ready(self) -> None: ...
    def __call__(self, x: Tensor, context: dict[str, Any]) -> Answer: ...
    def end(self) -> str | None:
        """Whatever it does; returns what is left of it, in words."""


class _Lost(Exception):
    """A worker that is gone."""


class _Function:
    """A function, called in the thread that asks."""

    def __init__(self, energy: Energy) -> None:
        # A sum remembers the terms of its last call: one for each thread.
        self._energy = copy.copy(energy) if isinstance(energy, WeightedSum) else energy

    def ready(self) -> None:
        pass

    def __call__(self, x: Tensor, context: dict[str, Any]) -> Answer:
        value = call_energy(self._energy, x, context, energy_name(self._energy))
        return value, getattr(self._energy, "term_values", {})

    def end(self) -> str | None:
        return "a thread cannot be killed: it is left behind, and may go on using a core until the program ends"


class _Process:
    """A fresh interpreter with a session of its own, so that a Ctrl-C does not reach it and its children end with it."""

    def __init__(self, terms: list[str], search: str | None) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            code = f"import json, sys; sys.path[:] = json.loads(sys.argv.pop()); from {WORKER} import main; main()"
            arguments = [str(theirs.fileno()), json.dumps([terms, search]), json.dumps(sys.path)]
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", code, *arguments],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        self._connection = Connection(ours.detach())
        self._ended = False

    def ready(self) -> None:
        try:
            if not self._connection.poll(LOADING):
                raise EnergyError(f"a worker took more than {LOADING:g} s to load the energy; look for what its file waits for.")
            loaded = self._connection.recv_bytes()
        except (EOFError, OSError):
            raise EnergyError(f"a worker {self._how_it_ended()} while it loaded the energy; its own output says why.") from None
        if loaded[:1] != ANSWER:
            raise EnergyError.unpack(loaded[1:])

    def __call__(self, x: Tensor, context: dict[str, Any]) -> Answer:
        question = pack_samples(x, context)
        try:
            self._connection.send_bytes(question)
            answer = self._connection.recv_bytes()
        except (EOFError, OSError):
            raise _Lost(f"lost a worker, which {self._how_it_ended()}") from None
        if answer[:1] != ANSWER:
            raise EnergyError.unpack(answer[1:])
        return unpack_energies(answer[1:])

    def end(self) -> str | None:
        if not self._ended:
            self._ended = True
            with suppress(ProcessLookupError, PermissionError):  # it may be gone, with all that it had started
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        return None

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"ended with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"


# --- all of them ------------------------------------------------------------------------------------------------------

_LATE = "late"


@dataclass(eq=False)
class _Batch:
    parts: list[tuple[Tensor, dict[str, Any]]]
    error: EnergyError | None = None
    answers: list[Answer | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answers = [None] * len(self.parts)


@dataclass(eq=False)
class _Member:
    """A worker and the thread that asks it. part: what it is at. lost: it takes no more, and what it still says is not heard."""

    worker: _Worker
    part: tuple[_Batch, int] | None = None
    lost: bool = False


class _Crew:
    """The workers of a pool and the parts that wait for one. Knows no pool, which may so be forgotten while threads wait."""

    def __init__(self) -> None:
        self.members: list[_Member] = []
        self._waiting: deque[tuple[_Batch, int]] = deque()
        self._batch: _Batch | None = None  # the one that is waited for
        self._gone: str | None = None  # how a worker was lost that was at work on it
        self._news = threading.Condition()

    def employ(self, worker: _Worker) -> None:
        member = _Member(worker)
        self.members.append(member)
        threading.Thread(target=self._work, args=(member,), daemon=True, name="tiltune energy").start()

    def ask(self, batch: _Batch) -> float:
        """Queue what is not answered of it, instead of any batch before; returns the time."""
        with self._news:
            at_work = {member.part for member in self.members if not member.lost}
            parts = [(batch, index) for index, answer in enumerate(batch.answers) if answer is None]
            self._waiting = deque(part for part in parts if part not in at_work)
            self._batch, self._gone = batch, None
            self._news.notify_all()
        return time.monotonic()

    def wait(self, batch: _Batch, until: float | None) -> str | None:
        """Until it is answered or has failed, which is None; else why it is to be asked again."""

        def settled() -> bool:
            return self._batch is not batch or batch.error is not None or None not in batch.answers or self._gone is not None

        with self._news:
            in_time = self._news.wait_for(settled, None if until is None else max(0.0, until - time.monotonic()))
            if self._batch is not batch:
                raise EnergyError("the pool was closed, or another batch was started, before this one was waited for.")
            if batch.error is None and None in batch.answers:
                return self._gone if in_time else _LATE
            self._waiting.clear()
            return None

    def abandon(self) -> None:
        """End every worker that is at work."""
        with self._news:
            self._waiting.clear()
            late = [member for member in self.members if member.part is not None]
            for member in late:
                member.lost = True
        for member in late:
            if left := member.worker.end():
                warnings.warn(f"an energy did not return in time; {left}.", stacklevel=2)

    def dismiss(self) -> None:
        """End every worker. A function that is at work is let go on."""
        with self._news:
            self._waiting.clear()
            self._batch = None
            members, self.members = self.members, []
            for member in members:
                member.lost = True
            self._news.notify_all()
        for member in members:
            member.worker.end()

    def _work(self, member: _Member) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: member.lost or self._waiting)
                if member.lost:
                    return
                batch, index = member.part = self._waiting.popleft()
            answer, error, gone = None, None, None
            try:
                answer = member.worker(*batch.parts[index])
            except EnergyError as raised:
                error = raised
            except _Lost as lost:
                gone = str(lost)
            except Exception as unexpected:  # of the pool's own: it must not be waited for in vain
                error = EnergyError(f"an energy's worker failed: {type(unexpected).__name__}: {unexpected}.")
            with self._news:
                member.part = None
                if member.lost:
                    return
                batch.answers[index] = answer
                batch.error = batch.error or error
                if gone is not None:
                    member.lost = True
                    if batch is self._batch:
                        self._gone = gone
                self._news.notify_all()


def _select(x: Tensor, context: dict[str, Any], rows: list[int]) -> tuple[Tensor, dict[str, Any]]:
    part = slice(rows[0], rows[-1] + 1) if rows else slice(0)
    return x[part], {key: value[part] for key, value in context.items()}
