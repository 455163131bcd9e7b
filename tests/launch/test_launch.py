"""`tiltune launch`: what each backend would run, that no word of the user's is ever code, and whose exit status comes back."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tiltune.launch.cluster import jobs, slurm, torchrun
from tiltune.launch.cluster.environment import settings
from tiltune.launch.cluster.options import Options
from tiltune.launch.verbs import launch

ROOT = Path(launch.__file__).parents[2]
CHECKOUT = Path(__file__).parents[2]  # what is installed has no pyproject.toml
GOLDEN = Path(__file__).parent / "golden"
HOSTILE = [
    "train", "two words", "it's", '"quoted"', "$(touch x)", "`touch x`", "${HOME}", "$HOME", "$(PET_NNODES)", "$$", "a\nb\n  c",
    "%{nodes}", "%%", "#comment", ": [", "- item", "", "\\", "*", "~", "--", "-m", "--nnodes=9", "!", "&touch x", ";touch x",
    "tab\t", "bell\x07f", "\x7f", "\x85", "\u2028", "é", "😀", "\udcff", "null", "1", "yes", "'\n'", "EOF",
]  # fmt: skip
CASES = {
    "local.txt": ["--cpu", "--nproc", "2", "--", "train", "digits", "--out", "my run"],
    "slurm.sbatch": ["--backend", "slurm", "--nodes", "2", "--nproc", "8", "--", "train", "--config", "run.yaml"],
    "local_fsdp.txt": ["--cpu", "--nproc", "2", "--fsdp", "--", "train", "digits"],
    "slurm_fsdp.sbatch": ["--backend", "slurm", "--nproc", "8", "--fsdp", "--", "train", "--config", "run.yaml"],
    "slurm_cpu.sbatch": ["--backend", "slurm", "--cpu", "--nproc", "4", "--", "train", "digits"],
    "trainjob.yaml": ["--backend", "kubernetes", "--nodes", "2", "--nproc", "8", "--", "train", "digits", "--out", "/runs/d"],
    "trainjob_cpu.yaml": ["--backend", "kubernetes", "--cpu", "--", "train", "digits", "--out=/runs/d"],
    "skypilot.yaml": ["--backend", "skypilot", "--nodes", "2", "--nproc", "8", "--", "train", "digits", "--out", "/runs/d"],
    "skypilot_cpu.yaml": ["--backend", "skypilot", "--cpu", "--nproc", "4", "--", "train", "digits", "--out", "/runs/d"],
}


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.sys, "executable", "/opt/tiltune/bin/python")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.setattr(getpass, "getuser", lambda: "someone")
    monkeypatch.setattr(platform, "node", lambda: "laptop")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("TILTUNE_IMAGE", "registry.example/tiltune:0")


def dry(tiltune: Callable[..., Any], arguments: list[str]) -> str:
    shown = tiltune("launch", "--dry-run", *arguments)
    assert (shown.status, shown.err) == (0, "")
    return shown.out


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Name and bash code → a program of that name, found first; it may append to the file `said` in its folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    monkeypatch.chdir(tmp_path)

    def make(name: str, code: str) -> Path:
        (folder / name).write_text(f"#!/bin/bash\n{code}\n")
        (folder / name).chmod(0o755)
        return folder / name

    return make


SAY_WORDS = 'printf "%s\\0" "$@" > "$SAID"'


def said(folder: Path) -> list[str]:
    return [os.fsdecode(word) for word in (folder / "said").read_bytes().split(b"\0")[:-1]]


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_prints_what_the_golden_file_says_and_nothing_else(tiltune: Callable[..., Any], name: str) -> None:
    assert dry(tiltune, CASES[name]) == (GOLDEN / name).read_text()


@pytest.mark.parametrize("name", ["slurm.sbatch", "slurm_fsdp.sbatch", "slurm_cpu.sbatch", "skypilot.yaml", "skypilot_cpu.yaml"])
def test_shell_scripts_pass_shellcheck(name: str, tmp_path: Path) -> None:
    """`bash -n` alone where shellcheck is not installed."""
    script = tmp_path / "script.sh"
    text = (GOLDEN / name).read_text()
    script.write_text(text if name.startswith("slurm") else "#!/bin/bash\n" + yaml.safe_load(text)["run"])
    subprocess.run(["bash", "-n", script], check=True)
    beside = Path(sys.prefix, "bin", "shellcheck")
    checker = shutil.which("shellcheck") or (beside if beside.exists() else None)
    if checker is not None:
        done = subprocess.run([checker, script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        script.write_text('#!/bin/bash\necho $1 | grep "$(ls *)')  # control
        assert subprocess.run([checker, script], capture_output=True).returncode != 0


@pytest.mark.parametrize(("name", "nodes", "nproc"), [("trainjob.yaml", 2, 8), ("trainjob_cpu.yaml", 1, 1)])
def test_the_trainjob_has_the_fields_of_trainer_v2(name: str, nodes: int, nproc: int) -> None:
    found = yaml.safe_load((GOLDEN / name).read_text())
    assert (found["apiVersion"], found["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert re.fullmatch(r"[a-z][a-z0-9-]*-", found["metadata"]["generateName"])
    assert set(found["spec"]) == {"runtimeRef", "trainer", "runtimePatches"}
    trainer = found["spec"]["trainer"]
    assert set(trainer) == {"image", "numNodes", "numProcPerNode", "command", "env", "resourcesPerNode"}
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (nodes, nproc)
    assert all(isinstance(word, str) for word in trainer["command"])
    assert all(set(item) == {"name", "value"} and isinstance(item["value"], str) for item in trainer["env"])
    assert trainer["resourcesPerNode"]["requests"] == trainer["resourcesPerNode"]["limits"]
    (patch,) = found["spec"]["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > torchrun.GRACE  # or SIGKILL comes before torchrun's own
    assert pod["volumes"][0]["name"] == pod["containers"][0]["volumeMounts"][0]["name"]
    assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == jobs.KEPT


def test_the_skypilot_task_recovers_from_a_requeue_status_and_keeps_runs() -> None:
    found = yaml.safe_load((GOLDEN / "skypilot.yaml").read_text())
    assert set(found) == {"name", "num_nodes", "resources", "workdir", "file_mounts", "run"}
    assert found["num_nodes"] == 2 and set(found["resources"]["accelerators"].values()) == {8}
    assert found["resources"]["job_recovery"]["recover_on_exit_codes"] == [torchrun.REQUEUE, torchrun.UNSAVED]
    assert set(found["file_mounts"]) == {jobs.KEPT}
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]", found["file_mounts"][jobs.KEPT]["name"])


@pytest.mark.parametrize("name", ["accelerate_ddp", "accelerate_fsdp2"])
def test_accelerate_reads_its_config_and_asks_for_what_we_do(name: str) -> None:
    """A canary too: `settings` and `Processes` name FSDP2 as accelerate does."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = jobs.FOLDER / f"{name}.yaml"  # keys that accelerate does not know are refused
    words = ["--config_file", str(file), "--num_processes", "8", "-m", "tiltune", "train"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    environment = prepare_multi_gpu_env(arguments)
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    assert {key: value for key, value in environment.items() if key in sharded} == (sharded if name.endswith("fsdp2") else {})
    assert sharded.items() <= settings(Options(fsdp=True)).items()
    assert not {key: value for key, value in environment.items() if value == "true"}.keys() & {
        "FSDP_OFFLOAD_PARAMS",
        "FSDP_ACTIVATION_CHECKPOINTING",
    }


def test_the_dockerfile_copies_what_the_package_is_made_of() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    folders = {name.split(".")[1] for name in project["tool"]["setuptools"]["packages"] if "." in name}
    text = (jobs.FOLDER / "Dockerfile").read_text()
    copied = {word for line in text.splitlines() if line.startswith("COPY") for word in line.split()[1:-1]}
    assert folders <= copied
    assert {file.name for file in CHECKOUT.glob("*.py")} | {"pyproject.toml", project["project"]["readme"], "LICENSE"} <= copied
    assert all((CHECKOUT / name).exists() for name in copied)


def test_hostile_words_arrive_locally_as_they_are(tiltune: Callable[..., Any], programs: Any, tmp_path: Path) -> None:
    fake = programs("python", SAY_WORDS)
    line = dry(tiltune, ["--cpu", "--", *HOSTILE]).replace("/opt/tiltune/bin/python", str(fake))
    assert line.count("\n") == 1
    subprocess.run(["bash", "-c", line], check=True)
    assert said(tmp_path)[-len(HOSTILE) :] == HOSTILE
    assert not (tmp_path / "x").exists()
    subprocess.run(["bash", "-c", f"{fake} " + " ".join(HOSTILE[1:5]).replace("'", "")], check=True)  # control: unquoted
    assert (tmp_path / "x").exists()


def test_hostile_words_arrive_in_a_slurm_job_as_they_are(tiltune: Callable[..., Any], programs: Any, tmp_path: Path) -> None:
    programs("srun", SAY_WORDS)
    programs("scontrol", "echo node1")
    programs("squeue", "echo RUNNING")
    (tmp_path / "job").write_text(dry(tiltune, ["--backend", "slurm", "--nproc", "1", "--", *HOSTILE]), encoding="utf-8")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "4"}
    subprocess.run(["bash", "job"], check=True, env=os.environ | slurm)
    assert said(tmp_path)[-len(HOSTILE) :] == HOSTILE
    assert "node1:20007" in said(tmp_path)
    assert not (tmp_path / "x").exists()


def test_hostile_words_arrive_in_a_skypilot_task_as_they_are(
    tiltune: Callable[..., Any], programs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILTUNE_IMAGE", "x: [\n$(touch x)")
    programs("python", SAY_WORDS)
    command = [*HOSTILE, "--out", "/runs/d"]
    found = yaml.safe_load(dry(tiltune, ["--backend", "skypilot", "--nproc", "1", "--", *command]))
    assert found["resources"]["image_id"] == "docker:x: [\n$(touch x)"
    subprocess.run(
        ["bash", "-c", found["run"]], check=True, env=os.environ | {"SKYPILOT_NODE_IPS": "a\nb", "SKYPILOT_TASK_ID": "t"}
    )
    assert said(tmp_path)[-len(command) :] == command
    assert "a:29500" in said(tmp_path)
    assert not (tmp_path / "x").exists()


def test_hostile_words_arrive_in_a_pod_as_they_are(tiltune: Callable[..., Any]) -> None:
    """YAML holds no undecodable bytes; a word with one is refused in a sentence."""
    command = [word for word in HOSTILE if word != "\udcff"] + ["--out", "/runs/d"]
    found = yaml.safe_load(dry(tiltune, ["--backend", "kubernetes", "--nproc", "1", "--", *command]))
    variables = {"PET_NNODES": "1", "PET_MASTER_ADDR": "node", "PET_MASTER_PORT": "29500"}

    def expanded(word: str) -> str:
        """As Kubernetes does it: $$ is $, $(NAME) is a variable's value or stays."""
        return re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0]), word)

    words = [expanded(word) for word in found["spec"]["trainer"]["command"]]
    assert words[-len(command) :] == command
    assert "node:29500" in words
    shown = tiltune("launch", "--dry-run", "--backend", "kubernetes", "--nproc", "1", "--", "train", "\udcff", "--out", "/runs/d")
    assert (shown.status, shown.out, len(shown.err.splitlines())) == (2, "", 1)


# `tests/slurm` has the same on a real SLURM; here are the cases that take a second each.
SQUEUE = 'case "$*" in *%T*) echo RUNNING;; *%k*) cat comment;; esac'
SCONTROL = """case "$1" in
    requeue) echo "$2" > requeued;;
    update) echo "${3#Comment=}" > comment;;
    *) if [ "$2" = hostnames ]; then echo node1; else echo "PreemptTime=$PREEMPTED"; fi;;
esac"""
SRUN = """trap 'sleep .3; echo USR1 > heard; exit $ENDS' USR1
trap 'echo TERM > heard; exit 143' TERM
[ -z "$BEGINS" ] || touch "$TILTUNE_STATUS_FOLDER/0"
touch up
[ -n "$SENT" ] || exit "$ENDS"
while :; do sleep .05; done"""


@pytest.mark.parametrize(
    ("sent", "ends", "preempted", "comment", "requeued"),
    [
        (signal.SIGUSR1, 75, False, "", True),
        (signal.SIGUSR1, 75, False, "nothing new was saved", True),
        (signal.SIGUSR1, 76, False, "", True),
        (signal.SIGUSR1, 76, False, "my own", True),
        (signal.SIGUSR1, 76, False, "nothing new was saved", False),
        (signal.SIGUSR1, 1, False, "", False),
        (signal.SIGTERM, 75, False, "", False),
        (None, 75, True, "", True),
        (None, 76, True, "", True),
        (None, 76, True, "nothing new was saved", True),
        (None, 143, True, "", False),
        (None, 75, False, "", False),
        (None, 3, False, "", False),
        (None, 3, True, "", False),
    ],
)
def test_a_slurm_job_goes_back_into_the_queue_only_if_it_was_to_end_and_can_go_on(
    programs: Any, tmp_path: Path, sent: signal.Signals | None, ends: int, preempted: bool, comment: str, requeued: bool
) -> None:
    for name, code in (("srun", SRUN), ("squeue", SQUEUE), ("scontrol", SCONTROL)):
        programs(name, code)
    (tmp_path / "comment").write_text(comment + "\n")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_CPUS_PER_TASK": "4"}
    case = {"ENDS": str(ends), "BEGINS": "yes", "SENT": "" if sent is None else "yes"}
    case |= {"PREEMPTED": "2026-01-01T00:00:00" if preempted else "None"}
    job = subprocess.Popen(["bash", GOLDEN / "slurm.sbatch"], env=os.environ | slurm | case, stderr=subprocess.PIPE, text=True)
    if sent is not None:
        until = time.monotonic() + 10
        while not (tmp_path / "up").exists() and time.monotonic() < until:
            time.sleep(0.05)
        job.send_signal(sent)
    err = job.communicate(timeout=20)[1]
    assert job.returncode == ends
    assert (tmp_path / "requeued").exists() == requeued
    assert (tmp_path / "heard").exists() == (sent is not None)
    if sent is not None:
        assert (tmp_path / "heard").read_text() == "USR1\n", "TERM would have srun kill its own step"
    after = (tmp_path / "comment").read_text().strip()
    if requeued and sent is not None:
        assert after == {75: "saved" if comment else "", 76: "nothing new was saved"}[ends]
    elif requeued:
        assert after == comment, "a preemption says nothing of the time that a start takes"
    assert ("for the second time in a row" in err) == (ends == 76 and not requeued)


@pytest.mark.parametrize("killed", [138, 143])
def test_a_slurm_job_that_is_preempted_before_a_process_listens_goes_back(programs: Any, tmp_path: Path, killed: int) -> None:
    for name, code in (("srun", SRUN), ("squeue", SQUEUE), ("scontrol", SCONTROL)):
        programs(name, code)
    (tmp_path / "comment").write_text("\n")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_CPUS_PER_TASK": "4"}
    case = {"ENDS": str(killed), "BEGINS": "", "SENT": "", "PREEMPTED": "2026-01-01T00:00:00"}
    done = subprocess.run(["bash", GOLDEN / "slurm.sbatch"], env=os.environ | slurm | case, timeout=20)
    assert done.returncode == torchrun.UNSAVED and (tmp_path / "requeued").exists()


def test_the_warning_leaves_torchrun_its_grace() -> None:
    (warning,) = re.findall(r"--signal=B:USR1@(\d+)", (GOLDEN / "slurm.sbatch").read_text())
    assert int(warning) > torchrun.GRACE


@pytest.mark.parametrize(
    ("name", "program"), [("slurm.sbatch", "sbatch"), ("trainjob.yaml", "kubectl"), ("skypilot.yaml", "sky")]
)
def test_a_job_is_submitted_as_the_dry_run_prints_it(
    tiltune: Callable[..., Any], programs: Any, tmp_path: Path, name: str, program: str
) -> None:
    programs(program, f'cp "${{@: -1}}" "{tmp_path}/submitted"; {SAY_WORDS}; exit 5')
    assert tiltune("launch", *CASES[name]).status == 5
    assert (tmp_path / "submitted").read_text() == (GOLDEN / name).read_text()
    assert tuple(said(tmp_path)[:-1]) == jobs.SUBMIT[CASES[name][1]][1:]  # pyright: ignore[reportArgumentType]


def test_a_submitted_slurm_job_is_told_with_what_comes_next(tiltune: Callable[..., Any], programs: Any, monkeypatch: Any) -> None:
    programs("sbatch", "echo '1234;cluster'")
    programs("scontrol", "echo '   StdOut=/home/me/my logs/1234.out'")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "4:00:00")
    slurm = ("launch", "--backend", "slurm", "--cpu", "--", "train", "digits")
    shown = tiltune(*slurm, "--resume", "auto")
    assert shown.status == 0 and shown.err == ""
    assert shown.out.splitlines() == [
        "job 1234 is in the queue",
        "  watch  squeue --job 1234",
        "  log    tail -F '/home/me/my logs/1234.out'",
        "  stop   scancel 1234",
    ]
    programs("scontrol", "exit 1")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "4")
    shown = tiltune(*slurm, "--checkpoint-every=0")
    assert "tail -F slurm-1234.out" in shown.out
    lines = shown.err.splitlines()
    assert len(lines) == 3 and "--resume auto" in lines[0] and "no checkpoints" in lines[1] and "limit is 4 minutes" in lines[2]


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [
        ("30", 30),
        ("1:30", 1.5),
        ("4:00:00", 240),
        ("1-0", 1440),
        ("1-2:3", 1563),
        ("1-2:3:30", 1563.5),
        ("UNLIMITED", None),
        ("x", None),
    ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(limit: str, minutes: float | None) -> None:
    assert slurm.minutes(limit) == minutes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "digits"], "no -- before"),
        ([], "no -- before"),
        (["--cpu", "--"], "nothing follows --"),
        (["--cpu", "--", "evaluate", "run"], "'evaluate' follows --, which does not run in several processes; launch train"),
        (["--cpu", "--", "--help"], "'--help' follows --"),
        (["--cpu", "--nproc", "0", "--", "train"], "--nproc is 0"),
        (["--cpu", "--nodes", "0", "--", "train"], "--nodes is 0"),
        (["--cpu", "--nodes", "2", "--", "train"], "needs a cluster"),
        (["--nproc", "1", "--nproc", "2", "--", "train"], "--nproc is given 2 times"),
        (["--backend", "slurm", "--", "train"], "--nproc 8"),
        (["--", "train"], "no GPU"),
        (["--backend", "kubernetes", "--nproc", "1", "--", "train", "digits"], "--out /runs/my-run"),
        (["--backend", "skypilot", "--nproc", "1", "--", "train", "--out", "/runs/../x"], "--out /runs/my-run"),
        (["--backend", "kubernetes", "--nproc", "1", "--", "train", "--out=runs/x"], "--out /runs/my-run"),
    ],
)
def test_what_cannot_run_is_refused_in_one_sentence(
    tiltune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    shown = tiltune("launch", *arguments)
    assert (shown.status, shown.out, len(shown.err.splitlines())) == (2, "", 1)
    assert says in shown.err


def test_gpus_are_counted_and_no_two_processes_share_one(tiltune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    words = shlex.split(dry(tiltune, ["--", "train"]))
    assert words[words.index("--nproc-per-node") + 1] == "4"
    assert "OMP_NUM_THREADS=2" in words and "CUDA_VISIBLE_DEVICES=" not in words
    assert "at most 4" in tiltune("launch", "--nproc", "5", "--", "train").err


def test_a_missing_program_or_image_is_said(tiltune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("slurm.sbatch", "trainjob.yaml", "skypilot.yaml"):
        shown = tiltune("launch", *CASES[name])
        assert shown.status == 2 and "not installed" in shown.err and "--dry-run" in shown.err
    monkeypatch.delenv("TILTUNE_IMAGE")
    shown = tiltune("launch", "--dry-run", *CASES["trainjob.yaml"])
    assert shown.status == 2 and "TILTUNE_IMAGE" in shown.err


def test_the_threads_asked_for_are_kept(tiltune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "OMP_NUM_THREADS=4" in dry(tiltune, CASES["local.txt"])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS=3" in dry(tiltune, CASES["local.txt"])


def test_torchrun_still_has_what_we_rely_on() -> None:
    """The canary: it fails before anything else does when torchrun changes."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

    parsed = run.parse_args(shlex.split((GOLDEN / "local.txt").read_text().partition(".torchrun ")[2]))
    assert (parsed.standalone, parsed.module, parsed.max_restarts) == (
        True,
        True,
        0,
    )  # a status of 75 is never restarted in place
    assert (parsed.nproc_per_node, parsed.signals_to_handle) == ("2", torchrun.SIGNALS)
    assert (parsed.training_script, parsed.training_script_args[0]) == ("tiltune.launch.cluster.worker", "train")
    assert parsed.shutdown_timeout == torchrun.GRACE and hasattr(LaunchConfig, "shutdown_timeout")
    job = (GOLDEN / "slurm.sbatch").read_text().partition(".torchrun ")[2].partition(" &\n")[0]
    parsed = run.parse_args(shlex.split(job.replace("\\\n", " ")))
    assert (parsed.nnodes, parsed.rdzv_backend) == ("2", "c10d")
    assert SignalException("", signal.SIGUSR1).sigval is signal.SIGUSR1
    failures = {rank: ProcessFailure(rank, 1, status, "nowhere") for rank, status in ((0, 75), (1, -9))}
    failures[1].timestamp = failures[0].timestamp - 1
    assert ChildFailedError("", failures).get_first_failure()[1].exitcode == -9


def test_an_older_torchrun_is_asked_for_less_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.launcher import api

    words = ["--standalone", "--shutdown-timeout", "100", "-m", "x"]
    assert torchrun.supported(words) == words and not capsys.readouterr().err
    monkeypatch.setattr(api, "LaunchConfig", object)
    assert torchrun.supported(words) == ["--standalone", "-m", "x"]
    assert "30 s" in capsys.readouterr().err


STUB = """
import os, signal, sys, time
from types import SimpleNamespace
from tiltune.launch import cli
from tiltune.launch.cluster import worker

def verb(words):
    rank, kind = int(os.environ["RANK"]), words[0]
    if kind == "exit":
        if rank != 1:
            time.sleep(.2 if words[1] != "0" else 0)
        return int(words[1]) if rank == 1 or words[1] == "75" else 0
    stopped = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: stopped.append(1))
    open(f"up{rank}", "w").close()
    while not stopped:
        time.sleep(.02)
    time.sleep(float(words[1]))
    return 75 if kind == "save" or rank == 0 else 1

cli.import_module = lambda name, package: SimpleNamespace(main=verb)
worker.main()
"""
SCENARIOS = {
    "all end well": (["exit", "0"], None, "100", 0),
    "all ask for more": (["exit", "75"], None, "100", 75),
    "one fails": (["exit", "3"], None, "100", 3),
    "a warning, and all save": (["save", ".2"], "SIGUSR1", "100", 75),
    "a save that is cut off": (["save", "9"], "SIGUSR1", "1", 128 + signal.SIGUSR1),
    "one saves and one does not": (["half", "0"], "SIGTERM", "100", 128 + signal.SIGTERM),
}
RUN = """
import glob, json, os, signal, sys, threading, time
from tiltune.launch.cluster import torchrun

def send(name):
    while len(glob.glob("up*")) < 2:
        time.sleep(.02)
    os.kill(os.getpid(), getattr(signal, name))

statuses = {}
for title, (words, name, grace, _) in json.loads(sys.argv[1]).items():
    for file in glob.glob("up*"):
        os.remove(file)
    if name:
        threading.Thread(target=send, args=[name], daemon=True).start()
    flags = ["--standalone", "--nproc-per-node", "2", "--monitor-interval", ".05", "--shutdown-timeout", grace]
    statuses[title] = torchrun.run([*flags, "--signals-to-handle", torchrun.SIGNALS, "-m", "stub", "train", *words])
print(json.dumps(statuses))
"""


def test_the_status_of_the_processes_survives_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun alone would end with 1 in all of these but the first."""
    monkeypatch.undo()
    (tmp_path / "stub.py").write_text(STUB)
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}:{ROOT.parent}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(SCENARIOS)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {title: status for title, (*_, status) in SCENARIOS.items()}
    assert "tiltune launch: rank 1 ended first, with status 3." in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells a process that its parent is gone")
@pytest.mark.parametrize("told", [True, False])
def test_a_process_hears_sigterm_when_its_torchrun_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
    """Without being told (the control) it would train on with nobody to stop it."""
    monkeypatch.undo()
    child = "\n".join((
        "import os, signal, time", "from tiltune.launch.cluster import worker", "worker.stop_with_parent()" if told else "",
        "open('up.new', 'w').write(str(os.getpid()))", "os.rename('up.new', 'up')", "time.sleep(30)",
    ))  # fmt: skip
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    environment = os.environ | {"PYTHONPATH": f"{ROOT.parent}:{os.environ.get('PYTHONPATH', '')}"}
    started = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, env=environment)
    until = time.monotonic() + 20
    while not (tmp_path / "up").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process = psutil.Process(int((tmp_path / "up").read_text()))
    started.kill()
    started.wait()
    until = time.monotonic() + (10 if told else 0.5)
    while running(process) and time.monotonic() < until:
        time.sleep(0.02)
    assert running(process) != told
    if not told:
        process.kill()


def running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_launch_is_two_processes_of_tiltune_and_ends_as_they_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    (tmp_path / "torch.py").write_text("raise SystemExit('a file of the current folder ran')")
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    words = [sys.executable, "-m", "tiltune", "launch", "--cpu", "--nproc", "2", "--", "train", "no such task"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    # The first to end takes the other with it, which may not have come to say the same.
    assert done.stderr.count("unknown task 'no such task'") in (1, 2)
    assert "2 processes on CPU, OMP_NUM_THREADS=" in done.stderr
