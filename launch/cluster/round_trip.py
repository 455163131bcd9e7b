"""A number around the processes of a group and back: the smallest proof that they reach each other."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

from .torchrun import end_at_once

# Seconds that processes wait for each other.
TIMEOUT = 15


def main() -> None:
    """Entry point of `python -m tiltune.launch.cluster.round_trip BACKEND RANK WORLD FILE`, a process of `tiltune doctor`."""
    backend, rank, world, file = sys.argv[1:]
    print(round_trip(backend, init_method=f"file://{file}", rank=int(rank), world_size=int(world)), flush=True)
    end_at_once(0)


def round_trip(backend: str, **group: str | int) -> float:
    """Join a group, sum rank + 1 over it, leave; returns the seconds of the sum. ``group`` goes to init_process_group.

    Errors: RuntimeError if the sum is wrong; whatever torch.distributed raises where processes do not meet.
    """
    import torch
    from torch import distributed

    distributed.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT), **group)  # pyright: ignore[reportArgumentType]
    try:
        rank, world = distributed.get_rank(), distributed.get_world_size()
        device = "cpu"
        if backend == "nccl":
            device = f"cuda:{local_rank(rank)}"
            torch.cuda.set_device(device)
        number = torch.ones(1, device=device)
        distributed.all_reduce(number)  # the first one also sets up the connections
        number.fill_(rank + 1)
        started = time.perf_counter()
        distributed.all_reduce(number)
        total = number.item()
        seconds = time.perf_counter() - started
        if total != world * (world + 1) / 2:
            raise RuntimeError(f"{world} processes summed their numbers to {total}, not to {world * (world + 1) // 2}.")
        return seconds
    finally:
        distributed.destroy_process_group()


def local_rank(rank: int) -> int:
    """The GPU of this process: torchrun's LOCAL_RANK; the rank in a group of this machine alone."""
    return int(os.environ.get("LOCAL_RANK", rank))


if __name__ == "__main__":
    main()
