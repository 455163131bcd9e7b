"""The processes of this world, and whether a number gets around them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..cluster.round_trip import TIMEOUT, round_trip
from .finding import Finding

WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world() -> Iterator[Finding]:
    """The size of the world, and a number around it."""
    import torch

    gpus = torch.cuda.device_count()
    if "RANK" not in os.environ:
        yield Finding("world size", "1; no torchrun around this process")
        yield two_or_more("gloo", 2)
        if gpus:
            yield two_or_more("nccl", gpus)
        return
    size = os.environ.get("WORLD_SIZE")
    missing = [name for name in WORLD if name not in os.environ]
    if missing:
        says = f"RANK is set but {', '.join(missing)} not, so processes cannot meet; start them by torchrun, or unset RANK."
        yield Finding("world size", size or "unknown", says)
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    crowded = f"{here} processes share {gpus} GPUs, and nccl needs one each; start fewer a node: --nproc {gpus}."
    yield Finding("world size", f"{size}, {here} on this machine", crowded if 0 < gpus < here else None)
    backend = "nccl" if gpus >= here else "gloo"
    try:
        seconds = round_trip(backend)
    except RuntimeError as error:  # DistError and DistBackendError are RuntimeErrors
        yield unreachable(f"{size} processes", backend, str(error))
    else:
        yield Finding("round trip", f"{size} processes over {backend}: {seconds * 1e3:.1f} ms")


def two_or_more(backend: str, size: int) -> Finding:
    """A round trip of ``size`` processes that are started for it on this machine; killed if it takes too long."""
    who = f"{size} processes on this machine"
    print(f"starting {size} processes over {backend} …", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="tiltune-") as folder:
        words = [sys.executable, "-m", round_trip.__module__, backend]
        started = [
            subprocess.Popen(
                [*words, str(rank), str(size), str(Path(folder, "meet"))],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
            )
            for rank in range(size)
        ]
        until = time.monotonic() + 2 * TIMEOUT  # also for importing torch
        try:
            said = [process.communicate(timeout=max(0.1, until - time.monotonic())) for process in started]
        except subprocess.TimeoutExpired:
            return unreachable(who, backend, f"no answer within {2 * TIMEOUT} s")
        finally:
            for process in started:
                process.kill()
                process.communicate()
    for process, (_, errors) in zip(started, said, strict=True):
        if process.returncode != 0:
            return unreachable(who, backend, (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1])
    slowest = max(float(out) for out, _ in said)
    return Finding("round trip", f"{who} over {backend}: {slowest * 1e3:.1f} ms")


def unreachable(who: str, backend: str, why: str) -> Finding:
    """A round trip that failed."""
    name = "GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME"
    says = (
        f"{who} did not exchange a number over {backend} ({' '.join(why.split())}), so training in several cannot start; look at"
        f" firewalls and the host name, or name the network interface in {name}, lo for one machine."
    )
    return Finding("round trip", "failed", says)
