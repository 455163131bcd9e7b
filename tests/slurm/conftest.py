"""A SLURM cluster on this machine, on loopback, in a folder of its own: job files are tried on the real thing.

It changes nothing outside its folder. Its nodes are slurmds on ports of their own, named by addresses of the loopback range, so
that their names need no entry anywhere. `missing` says what is needed and not there.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
PACKAGES = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
REQUEUE_DELAY = 10  # seconds that a requeued job waits, a site has 120
KILL_WAIT = 60  # between the SIGTERM of scancel and SIGKILL

CONFIG = """
ClusterName=loop
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={delay}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
FirstJobId={first}
KillWait={kill_wait}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=60 PriorityTier=9 PreemptMode=OFF
"""


def missing() -> str | None:
    """What keeps a cluster from starting here; None where nothing does."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if absent:
        return f"{', '.join(absent)} not installed: {PACKAGES}"
    return "slurmd needs root" if os.geteuid() != 0 else None


def wait_for(what: Callable[[], bool], seconds: float, named: str) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"waited {seconds:g} s in vain until {named}"
        time.sleep(0.2)


class Cluster:
    """Started by `with`; jobs in the partition ``urgent`` preempt those in ``main``."""

    def __init__(self, folder: Path, nodes: int = 2, cores: int = 4) -> None:
        self.folder, self.names = folder, [f"127.0.0.{number + 2}" for number in range(nodes)]
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
        with ExitStack() as held:  # all at once, so that no two are the same
            sockets = [held.enter_context(socket.socket()) for _ in range(nodes + 1)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            port, *others = (each.getsockname()[1] for each in sockets)
        lines = [
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={other} CPUs={cores} State=UNKNOWN"
            for name, other in zip(self.names, others, strict=True)
        ]
        # Jobs find each other by their number: those of two clusters on one machine must not have the same.
        first = 1 + 100 * secrets.randbelow(90)
        text = CONFIG.format(
            folder=folder, port=port, first=first, nodes="\n".join(lines), delay=REQUEUE_DELAY, kill_wait=KILL_WAIT
        )
        for part in ("state", "spool"):
            (folder / part).mkdir(parents=True)
        (folder / "slurm.conf").write_text(text)
        (folder / "munge.key").touch(0o600)
        (folder / "munge.key").write_bytes(secrets.token_bytes(1024))

    def __enter__(self) -> Cluster:
        folder = self.folder
        try:
            self.run(
                "munged", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key",
                f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed",
            )  # fmt: skip
            self.run("slurmctld")
            wait_for(lambda: "UP" in self.run("scontrol", "ping", check=False), 30, "slurmctld answers")
            for name in self.names:
                self.run("slurmd", "-N", name)
            wait_for(
                lambda: self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").count("\n") >= 2 * len(self.names), 60, "idle"
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Jobs first, whose processes nobody would end otherwise; then the daemons."""
        subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True)
        end = time.monotonic() + KILL_WAIT
        while self.run("squeue", "-h", check=False).strip() and time.monotonic() < end:
            time.sleep(0.5)
        files = [*self.folder.glob("slurmd-*.pid"), self.folder / "slurmctld.pid", self.folder / "munged.pid"]
        daemons = [int(file.read_text()) for file in files if file.exists()]
        for daemon in daemons:
            os.kill(daemon, signal.SIGTERM)
            wait_for(lambda daemon=daemon: not Path(f"/proc/{daemon}").exists(), 30, f"{daemon} ends")

    def submit(self, text: str, folder: Path, *options: str) -> Job:
        return Job(self, text, folder, *options)

    def run(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def grace(self, seconds: int) -> None:
        """Between SIGTERM and the end of what is preempted in ``main``."""
        self.run("scontrol", "update", "PartitionName=main", f"GraceTime={seconds}")

    def preempt(self) -> None:
        """An urgent job takes all nodes for two seconds."""
        every = f"--nodes={len(self.names)}"
        self.run("sbatch", "-p", "urgent", every, "--ntasks-per-node=1", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")


class Job:
    """A job file of `tiltune launch`, submitted; ``options`` go to sbatch, over what the file says."""

    def __init__(self, cluster: Cluster, text: str, folder: Path, *options: str) -> None:
        self.cluster, self.log = cluster, folder / "job.out"
        file = folder / "job.sbatch"
        file.write_text(text)
        self.number = cluster.run("sbatch", "--parsable", "-D", str(folder), "-o", str(self.log), *options, str(file)).strip()

    def running(self) -> None:
        wait_for(lambda: self.cluster.run("squeue", "-h", "-j", self.number, "-t", "RUNNING", check=False) != "", 120, "it runs")

    def listening(self) -> None:
        """Waits until the job file catches USR1. What is sent before its shell runs, SLURM itself drops without a word."""

        def caught(process: psutil.Process) -> bool:
            try:
                if "slurm_script" not in " ".join(process.cmdline()) or process.environ().get("SLURM_JOB_ID") != self.number:
                    return False
                (mask,) = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                return False
            return bool(int(mask, 16) >> (signal.SIGUSR1 - 1) & 1)

        wait_for(lambda: any(map(caught, psutil.process_iter())), 120, "the job file listens")

    def ended(self, seconds: float = 300) -> dict[str, str]:
        """JobState, ExitCode and Restarts, once it is over for good."""
        over = "COMPLETED|FAILED|CANCELLED|TIMEOUT"
        wait_for(lambda: re.search(f"JobState=({over})", self.shown) is not None, seconds, "the job is over")
        return {name: self.field(name) for name in ("JobState", "ExitCode", "Restarts")}

    def field(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", self.shown)
        assert found is not None, self.shown
        return found[1]

    @property
    def shown(self) -> str:
        return self.cluster.run("scontrol", "show", "job", self.number)

    def signal(self, *words: str) -> None:
        self.cluster.run("scancel", *words, self.number)

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of four cores; each process of pytest has its own."""
    if (why := missing()) is not None:
        pytest.fail(f"no SLURM can be started here: {why}")
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture
def waiting() -> Any:
    """`wait_for`."""
    return wait_for
