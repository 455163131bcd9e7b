"""What this machine has: devices, disk, cores, memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..cluster.environment import cores
from .finding import Finding

# Below these, saving a run or training one is likely to fail.
LEAST_DISK_GB = 2
LEAST_MEMORY_GB = 1


def devices() -> Iterator[Finding]:
    """The GPUs that torch sees, or that it should see."""
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        wrong = None
        if shutil.which("nvidia-smi") is not None and hidden is None:
            why = "is built without CUDA" if torch.version.cuda is None else f"wants CUDA {torch.version.cuda}"
            wrong = f"a driver of NVIDIA is here, but torch sees no GPU and {why}; install the torch that fits the driver."
        yield Finding("devices", "CPU" + ("" if hidden is None else f"; CUDA_VISIBLE_DEVICES={hidden!r}"), wrong)
    for index in range(count):
        about = torch.cuda.get_device_properties(index)
        yield Finding("devices", f"cuda:{index} {about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")


def disk(name: str, folder: Path) -> Finding:
    """Free disk where ``folder`` is, or will be made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free / 1e9
    wrong = None
    if free < LEAST_DISK_GB:
        wrong = f"{free:.1f} GB are free at {folder}, and runs and models need {LEAST_DISK_GB}; free some, or work elsewhere."
    elif not os.access(there, os.W_OK):
        wrong = f"{there} cannot be written to, and runs and models are saved there; change its permissions, or work elsewhere."
    return Finding(name, f"{free:.0f} GB free at {folder}", wrong)


def threads() -> Finding:
    """Cores that this process may use, and what torch and OpenMP make of them."""
    import torch

    openmp = os.environ.get("OMP_NUM_THREADS", "not set")
    return Finding(
        "threads", f"{cores()} of {os.cpu_count()} cores usable, torch {torch.get_num_threads()}, OMP_NUM_THREADS {openmp}"
    )


def memory() -> Finding:
    """Memory of this machine."""
    import psutil

    now = psutil.virtual_memory()
    free = now.available / 1e9
    wrong = f"{free:.1f} GB of memory are free, and training needs {LEAST_MEMORY_GB} at least; stop something else."
    return Finding("memory", f"{free:.1f} of {now.total / 1e9:.1f} GB free", wrong if free < LEAST_MEMORY_GB else None)
