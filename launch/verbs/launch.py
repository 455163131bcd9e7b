"""`tiltune launch`: the same training in several processes, here or on a cluster."""

from __future__ import annotations

import getpass
import hashlib
import os
import platform
import shlex
import shutil
import string
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .. import flags
from ..cluster import slurm
from ..cluster.torchrun import GRACE, REQUEUE, SIGNALS, UNSAVED

Backend = Literal["local", "slurm", "kubernetes", "skypilot"]

DESCRIPTION = f"""Run a command of tiltune in several processes: what follows -- is passed on as it is. Locally torchrun starts
them; for a cluster a job file is written and submitted. --dry-run prints that command or file instead. kubernetes and skypilot
need the name of an image that holds tiltune, in TILTUNE_IMAGE. Exit status: the processes' own (of the first that failed),
{REQUEUE} if they saved and want to run again, {UNSAVED} if they were told to stop before anything new was saved, 128 + N if
signal N ended them; of the program that submits; 2 bad input.

example: tiltune launch --cpu --nproc 2 -- train digits --out my-run

example: tiltune launch --backend slurm --nodes 2 --nproc 8 --dry-run -- train --config run.yaml > job.sbatch
"""

# Verbs that work in several processes.
LAUNCHED = ("train",)
# What outlives the machines of a cluster: a volume (kubernetes) or a bucket (skypilot) is mounted there.
KEPT = "/runs"
# Cores that SLURM is asked for, for each process that has a GPU: Python, data, communication, an energy.
CORES_PER_GPU = 4
SUBMIT = {"slurm": ("sbatch", "--parsable"), "kubernetes": ("kubectl", "create", "-f"), "skypilot": ("sky", "jobs", "launch")}
FOLDER = Path(__file__).parents[1] / "cluster" / "templates"
TEMPLATES = {"slurm": "slurm.sbatch", "kubernetes": "trainjob.yaml", "skypilot": "skypilot.yaml"}


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


class Template(string.Template):
    """A template in which % marks what is filled in, because $ is the shell's; %% is a percent sign."""

    delimiter = "%"


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit status, unless it is local: then this process becomes torchrun."""
    options, command = read(argv)
    if options.backend == "local":
        return local(options, command)
    text = job(options, command)
    if options.dry_run:
        print(text, end="")
        return 0
    if options.backend == "slurm":
        for doubt in slurm.doubts(command, os.environ.get("SBATCH_TIMELIMIT")):
            print(f"tiltune launch: {doubt}", file=sys.stderr)
    return submit(options.backend, text)


def read(argv: list[str]) -> tuple[Options, list[str]]:
    """The options before -- and the command after it.

    Errors: ValueError for a missing or unknown command, for counts below 1 and for what a backend cannot do.
    """
    if "--" not in argv and not {"-h", "--help"} & set(argv):
        raise ValueError("there is no -- before the command to run; write tiltune launch [options] -- train ….")
    position = argv.index("--") if "--" in argv else len(argv)
    options = flags.parse(Options, argv[:position], "tiltune launch", DESCRIPTION)
    command = argv[position + 1 :]
    if not command or command[0] not in LAUNCHED:
        given = repr(command[0]) if command else "nothing"
        raise ValueError(f"{given} follows --, which does not run in several processes; launch {' or '.join(LAUNCHED)}.")
    for name in ("nproc", "nodes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}, and nothing would run; give at least 1.")
    if options.backend == "local" and options.nodes > 1:
        raise ValueError(
            f"--nodes {options.nodes} needs a cluster, and --backend local is this machine; choose another --backend."
        )
    if options.backend in ("kubernetes", "skypilot") and not kept(command):
        raise ValueError(f"the run would be lost with its machine; keep it on the mounted storage: --out {KEPT}/my-run.")
    return options, command


def kept(command: list[str]) -> bool:
    """Whether the command's --out lies below `KEPT`."""
    out = flags.given(command, "--out")
    return out is not None and Path(os.path.normpath(out)).is_relative_to(KEPT)


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


def local(options: Options, command: list[str]) -> int:
    """Become torchrun; returns 0 only after a dry run."""
    nproc = processes(options)
    environment = settings(options) | {"OMP_NUM_THREADS": threads(nproc)}
    words = [sys.executable, "-m", f"{slurm.__package__}.torchrun", "--standalone", "--nproc-per-node", str(nproc)]
    words += ["--signals-to-handle", SIGNALS, "--shutdown-timeout", str(GRACE)]
    words += ["-m", f"{slurm.__package__}.worker", *command]
    if options.dry_run:
        print("env", *(f"{name}={shell(value)}" for name, value in environment.items()), *map(shell, words))
        return 0
    device = "CPU" if options.cpu else "a GPU each"
    print(f"{nproc} processes on {device}, OMP_NUM_THREADS={environment['OMP_NUM_THREADS']} each", file=sys.stderr, flush=True)
    os.execve(sys.executable, words, os.environ | environment)


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


def job(options: Options, command: list[str]) -> str:
    """The text of the job file for a cluster.

    Errors: ValueError where the image is not named, or as in `processes`.
    """
    nproc = processes(options)
    environment = settings(options)
    values: dict[str, str | int] = {
        "nodes": options.nodes,
        "nproc": nproc,
        "signals": SIGNALS,
        "grace": GRACE,
        "requeue": REQUEUE,
        "unsaved": UNSAVED,
    }
    if options.backend == "slurm":
        cores = f"#SBATCH --cpus-per-task={nproc if options.cpu else nproc * CORES_PER_GPU}"
        values["resources"] = cores if options.cpu else f"{cores}\n#SBATCH --gpus-per-node={nproc}"
        values["python"] = shell(sys.executable)
    else:
        image = os.environ.get("TILTUNE_IMAGE")
        if not image:
            raise ValueError(
                f"{options.backend} runs images, and TILTUNE_IMAGE names none; build one from"
                f" {FOLDER / 'Dockerfile'}, push it, and set TILTUNE_IMAGE to its name."
            )
        values["image"] = yaml_text(image if options.backend == "kubernetes" else f"docker:{image}")
    if options.backend == "kubernetes":
        # Kubernetes expands $(NAME) in a command; $$ is a $.
        values["command"] = "\n".join(f"        - {yaml_text(word.replace('$', '$$'))}" for word in command)
        # A pod's cores are not known here; one thread a process never makes them contend.
        variables = environment | {"OMP_NUM_THREADS": threads(nproc) if "OMP_NUM_THREADS" in os.environ else "1"}
        values["environment"] = "\n".join(
            f"        - {{name: {name}, value: {yaml_text(value)}}}" for name, value in variables.items()
        )
        values["resources"] = f'cpu: "{nproc}"' if options.cpu else f'nvidia.com/gpu: "{nproc}"'
        values["storage"] = KEPT
    else:
        values["command"] = " ".join(map(shell, command))
        indent = "" if options.backend == "slurm" else "  "
        values["environment"] = f"\n{indent}".join(f"export {name}={value}" for name, value in environment.items())
    if options.backend == "skypilot":
        gpus = ("H100", "A100-80GB", "A100", "L40S", "L4")
        choice = ", ".join(f"{name}: {nproc}" for name in gpus)
        values["resources"] = f"cpus: {nproc}+" if options.cpu else f"accelerators: {{{choice}}}  # any of these"
        values |= {"storage": KEPT, "bucket": bucket()}
    return Template((FOLDER / TEMPLATES[options.backend]).read_text(encoding="utf-8")).substitute(values)


def bucket() -> str:
    """A bucket name of this user on this machine; names of buckets are shared by everyone."""
    return "tiltune-" + hashlib.sha256(f"{getpass.getuser()}@{platform.node()}".encode()).hexdigest()[:12]


def shell(word: str) -> str:
    """``word`` quoted for bash, on one line whatever it holds."""
    if word.isprintable():
        return shlex.quote(word)
    plain = "".join(c if c.isprintable() and c not in "'\\" else "".join(f"\\x{b:02x}" for b in os.fsencode(c)) for c in word)
    return f"$'{plain}'"


def yaml_text(word: str) -> str:
    """``word`` as a YAML string, on one line whatever it holds.

    Errors: ValueError for bytes that are no text, which YAML cannot hold.
    """
    import yaml

    if any("\ud800" <= c <= "\udfff" for c in word):
        raise ValueError(f"{word!r} holds bytes that are no UTF-8, which a YAML file cannot pass on; rename what it names.")
    return yaml.safe_dump(word, default_style='"', width=sys.maxsize).strip()


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
