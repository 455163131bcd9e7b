"""How many processes a node has, and the environment that they all get."""

from __future__ import annotations

import os

from .options import Options


def processes(options: Options) -> int:
    """Processes a node.

    Errors: ValueError where the GPUs cannot be counted from here, where there are none, or fewer than asked for.
    """
    if options.cpu:
        return options.nproc or 1
    if options.backend != "local":
        if options.nproc is None:
            raise ValueError(
                "the GPUs of the cluster's machines cannot be counted from here; give their number a node: --nproc 8."
            )
        return options.nproc
    import torch

    gpus = torch.cuda.device_count()
    if gpus == 0:
        raise ValueError("torch sees no GPU on this machine; add --cpu for processes on the CPU, or ask `tiltune doctor`.")
    if (options.nproc or gpus) > gpus:
        raise ValueError(
            f"--nproc {options.nproc} needs as many GPUs, and torch sees {gpus}; ask for at most {gpus}, or add --cpu."
        )
    return options.nproc or gpus


def settings(options: Options) -> dict[str, str]:
    """The environment of all processes: modules found as by the console script, not first in this folder; no GPU for the CPU;
    shards, in accelerate's words."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    return {"PYTHONSAFEPATH": "1"} | (hidden if options.cpu else {}) | (sharded if options.fsdp else {})


def threads(nproc: int) -> str:
    """OMP_NUM_THREADS of this environment if it is set, or a fair share of the cores this process may use."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // nproc))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
