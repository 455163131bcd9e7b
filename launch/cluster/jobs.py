"""Job files for clusters: the templates beside this file, filled in, and handed to the cluster's own program."""

from __future__ import annotations

import getpass
import hashlib
import os
import platform
import shutil
import string
import subprocess
import sys
import tempfile
from pathlib import Path

from . import slurm
from .environment import processes, settings, threads
from .options import Backend, Options
from .quoting import shell, yaml_text
from .torchrun import GRACE, REQUEUE, SIGNALS, UNSAVED

# What outlives the machines of a cluster: a volume (kubernetes) or a bucket (skypilot) is mounted there.
KEPT = "/runs"
# Cores that SLURM is asked for, for each process that has a GPU: Python, data, communication, an energy.
CORES_PER_GPU = 4
GPUS = ("H100", "A100-80GB", "A100", "L40S", "L4")  # of which skypilot takes what it finds
SUBMIT = {"slurm": ("sbatch", "--parsable"), "kubernetes": ("kubectl", "create", "-f"), "skypilot": ("sky", "jobs", "launch")}
FOLDER = Path(__file__).parent / "templates"
TEMPLATES = {"slurm": "slurm.sbatch", "kubernetes": "trainjob.yaml", "skypilot": "skypilot.yaml"}


class Template(string.Template):
    """A template in which % marks what is filled in, because $ is the shell's; %% is a percent sign."""

    delimiter = "%"


def job(options: Options, command: list[str]) -> str:
    """The text of the job file for a cluster.

    Errors: ValueError where the image is not named, or as in `processes`.
    """
    nproc = processes(options)
    values: dict[str, str | int] = {
        "nodes": options.nodes,
        "nproc": nproc,
        "signals": SIGNALS,
        "grace": GRACE,
        "requeue": REQUEUE,
        "unsaved": UNSAVED,
    }
    fill = {"slurm": _slurm, "kubernetes": _kubernetes, "skypilot": _skypilot}[options.backend]
    text = (FOLDER / TEMPLATES[options.backend]).read_text(encoding="utf-8")
    return Template(text).substitute(values | fill(options, nproc, command))


def _slurm(options: Options, nproc: int, command: list[str]) -> dict[str, str]:
    cores = f"#SBATCH --cpus-per-task={nproc if options.cpu else nproc * CORES_PER_GPU}"
    return {
        "resources": cores if options.cpu else f"{cores}\n#SBATCH --gpus-per-node={nproc}",
        "python": shell(sys.executable),
        "command": " ".join(map(shell, command)),
        "environment": "\n".join(_exports(options)),
    }


def _kubernetes(options: Options, nproc: int, command: list[str]) -> dict[str, str]:
    image = _image(options.backend)
    # A pod's cores are not known here; one thread a process never makes them contend.
    variables = settings(options) | {"OMP_NUM_THREADS": threads(nproc) if "OMP_NUM_THREADS" in os.environ else "1"}
    return {
        "image": yaml_text(image),
        # Kubernetes expands $(NAME) in a command; $$ is a $.
        "command": "\n".join(f"        - {yaml_text(word.replace('$', '$$'))}" for word in command),
        "environment": "\n".join(f"        - {{name: {name}, value: {yaml_text(value)}}}" for name, value in variables.items()),
        "resources": f'cpu: "{nproc}"' if options.cpu else f'nvidia.com/gpu: "{nproc}"',
        "storage": KEPT,
    }


def _skypilot(options: Options, nproc: int, command: list[str]) -> dict[str, str]:
    choice = ", ".join(f"{name}: {nproc}" for name in GPUS)
    return {
        "image": yaml_text(f"docker:{_image(options.backend)}"),
        "command": " ".join(map(shell, command)),
        "environment": "\n  ".join(_exports(options)),
        "resources": f"cpus: {nproc}+" if options.cpu else f"accelerators: {{{choice}}}  # any of these",
        "storage": KEPT,
        "bucket": _bucket(),
    }


def _exports(options: Options) -> list[str]:
    return [f"export {name}={value}" for name, value in settings(options).items()]


def _image(backend: Backend) -> str:
    """The image that holds tiltune.

    Errors: ValueError where TILTUNE_IMAGE does not name it.
    """
    image = os.environ.get("TILTUNE_IMAGE")
    if not image:
        raise ValueError(
            f"{backend} runs images, and TILTUNE_IMAGE names none; build one from"
            f" {FOLDER / 'Dockerfile'}, push it, and set TILTUNE_IMAGE to its name."
        )
    return image


def _bucket() -> str:
    """A bucket name of this user on this machine; names of buckets are shared by everyone."""
    return "tiltune-" + hashlib.sha256(f"{getpass.getuser()}@{platform.node()}".encode()).hexdigest()[:12]


def submit(backend: Backend, text: str) -> int:
    """Hand the job file ``text`` to the cluster's program; returns that program's exit status.

    Errors: ValueError if the program is not installed.
    """
    words = SUBMIT[backend]
    if shutil.which(words[0]) is None:
        raise ValueError(
            f"{words[0]} is not installed here, so nothing was submitted; --dry-run prints the file for another machine."
        )
    with tempfile.TemporaryDirectory(prefix="tiltune-") as folder:
        file = Path(folder, TEMPLATES[backend])
        file.write_text(text, encoding="utf-8")
        if backend != "slurm":
            return subprocess.run([*words, str(file)]).returncode
        done = subprocess.run([*words, str(file)], stdout=subprocess.PIPE, text=True)
        if done.returncode == 0:
            print(slurm.told(done.stdout))
        return done.returncode
