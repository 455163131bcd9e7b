"""Seconds of calls, measured in turn so that a busy machine slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def timed(run: Callable[[], None], device: str) -> float:
    """Seconds of one call, the accelerator's queue drained before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(runs: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each run in each of ``rounds`` rounds, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            took = timed(run, device)
            if number:
                seconds[name].append(took)
    return seconds


def best_chunk(run: Callable[[int], None], sizes: list[int], device: str) -> int:
    """The chunk with the least time a row, each size measured in turn."""
    seconds = in_turn({str(size): lambda size=size: run(size) for size in sizes}, 3, device)
    return min(sizes, key=lambda size: min(seconds[str(size)]) / size)
