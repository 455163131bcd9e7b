"""What `tiltune launch` is asked for: where, how many processes, and on what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Backend = Literal["local", "slurm", "kubernetes", "skypilot"]


@dataclass(frozen=True)
class Options:
    """What `tiltune launch` takes, before --."""

    nproc: int | None = None
    """Processes a node; the number of GPUs where not given, or 1 with --cpu."""
    cpu: bool = False
    """On the CPU, over gloo, with all GPUs hidden."""
    backend: Backend = "local"
    """Where to: this machine, or a cluster that sbatch, kubectl or sky reaches from here."""
    nodes: int = 1
    """Machines, of a cluster."""
    fsdp: bool = False
    """Shard the policy among the processes (FSDP2), with its gradients and moments; the prior stays whole in each."""
    dry_run: bool = False
    """Print exactly what would run, and stop."""
