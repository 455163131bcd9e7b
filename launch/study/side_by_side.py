"""Runs in this process, or several side by side, each in a process of one thread."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import wait
from typing import Any

from ...finetune.runs.build import threads
from .table import Row

Perform = Callable[[Any], list[Row]]


def perform_all(perform: Perform, runs: Mapping[str, Any], jobs: int) -> Iterator[tuple[str, list[Row], float]]:
    """(name, rows, seconds) of each run as it ends; numbers do not depend on ``jobs``.

    Where this is broken off, the runs that have not ended are given up.
    """
    jobs = min(jobs, len(runs))
    if jobs <= 1:
        with threads(1):
            for name, run in runs.items():
                yield name, *_timed(perform, name, run)
        return
    spawned = multiprocessing.get_context("spawn")  # a fork would copy torch's threads half
    pool = ProcessPoolExecutor(jobs, spawned, _begin)
    try:
        names = {pool.submit(_timed, perform, name, run): name for name, run in runs.items()}
        for future in as_completed(names):
            yield names[future], *future.result()
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise


def _timed(perform: Perform, name: str, run: Any) -> tuple[list[Row], float]:
    begun = time.perf_counter()
    try:
        return perform(run), time.perf_counter() - begun
    except (ValueError, FloatingPointError) as error:
        raise type(error)(f"the run {name}: {error}") from error


def _begin() -> None:
    """In each process: one thread; signals are the parent's to hear, and it ends with it, however that ends."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
