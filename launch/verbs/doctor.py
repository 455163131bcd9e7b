"""`tiltune doctor`: what is installed, what this machine has, whether processes reach each other, and what is wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import flags
from ..doctor.finding import Finding
from ..doctor.machine import devices, disk, memory, threads
from ..doctor.packages import versions
from ..doctor.world import world

DESCRIPTION = """Report versions, devices, the size of the world, a number sent around processes and back, free disk, threads and
memory, and say what is wrong. Alone, it starts two processes over gloo, and one a GPU over nccl; under torchrun it uses the
processes that are there. Exit status: 0 healthy, 1 something is wrong, 2 bad input.

example: tiltune doctor

example: torchrun --standalone --nproc-per-node 2 -m tiltune doctor
"""


@dataclass(frozen=True)
class Options:
    """What `tiltune doctor` takes: nothing."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit status."""
    flags.parse(Options, argv, "tiltune doctor", DESCRIPTION)
    rank = os.environ.get("RANK", "0")
    wrong = []
    for finding in examine():
        if rank == "0":
            print(f"{finding.name:<12} {finding.text}", flush=True)
        if finding.wrong is not None:
            wrong.append(finding.wrong)
    for sentence in wrong:
        print(f"wrong on rank {rank}: {sentence}" if "RANK" in os.environ else f"wrong: {sentence}", flush=True)
    if not wrong and rank == "0":
        print("healthy")
    return 1 if wrong else 0


def examine() -> Iterator[Finding]:
    """All findings, each as soon as it is known."""
    yield from versions()
    try:
        import torch  # noqa: F401
        from huggingface_hub.constants import HF_HUB_CACHE
    except (ImportError, OSError) as error:  # OSError: a shared library that is not there
        why = " ".join(str(error).split())
        yield Finding(
            "import", "failed", f"a package does not load ({why}), so nothing runs; install tiltune in a new environment."
        )
        return
    yield from devices()
    yield from world()
    yield disk("disk here", Path.cwd())
    yield disk("disk cache", Path(HF_HUB_CACHE))
    yield threads()
    yield memory()
