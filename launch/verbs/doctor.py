"""`tiltune doctor`: what is installed, what this machine has, whether processes reach each other, and what is wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..._version import __version__
from .. import flags
from ..cluster.environment import cores
from ..cluster.round_trip import TIMEOUT, round_trip

DESCRIPTION = """Report versions, devices, the size of the world, a number sent around processes and back, free disk, threads and
memory, and say what is wrong. Alone, it starts two processes over gloo, and one a GPU over nccl; under torchrun it uses the
processes that are there. Exit status: 0 healthy, 1 something is wrong, 2 bad input.

example: tiltune doctor

example: torchrun --standalone --nproc-per-node 2 -m tiltune doctor
"""

PACKAGES = ("torch", "diffusers", "accelerate", "safetensors")
# Below these, saving a run or training one is likely to fail.
LEAST_DISK_GB = 2
LEAST_MEMORY_GB = 1
WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Options:
    """What `tiltune doctor` takes: nothing."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    text: str
    wrong: str | None = None
    """What is wrong, why that matters and what to do; None where all is well."""


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


def installed(package: str) -> str | None:
    """The version of ``package``; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> Iterator[Finding]:
    """Of tiltune, Python and the packages that decide whether a run works."""
    yield Finding("tiltune", __version__)
    yield Finding("python", f"{sys.version.split()[0]} at {sys.executable}")
    needs = requirements()
    for name in PACKAGES:
        version, need = installed(name), needs.get(name, "")
        wrong = None
        if version is None:
            wrong = f"{name} is not installed, and nothing runs without it; install tiltune again: pip install tiltune."
        elif not satisfies(version, need):
            wrong = f"{name} {version} is not what tiltune is made for ({name}{need}); pip install '{name}{need}'."
        yield Finding(name, version or "not installed", wrong)
    yield Finding("peft", installed("peft") or "not installed; LoRA policies need it: pip install peft")


def requirements() -> dict[str, str]:
    """What the installed tiltune asks of other packages, as in {"torch": ">=2.10"}; empty if it runs from a folder."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("tiltune") or []
    except metadata.PackageNotFoundError:
        return {}
    return {need.name: str(need.specifier) for need in map(Requirement, lines) if need.marker is None}


def satisfies(version: str, need: str) -> bool:
    """Whether ``version`` is one that ``need`` allows, development versions included."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(need).contains(version, prereleases=True)


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
