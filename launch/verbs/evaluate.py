"""`tiltune evaluate`: judge a run by fresh rollouts of both sides, and write its certificate."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

from ...tasks.task import load_task
from .. import flags
from .evaluate_text import deployed, summary, verdict_line
from .tasks import open_with_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ...finetune.certificate.evidence import Evidence
    from ...finetune.energies.energy import Energy
    from ...finetune.runs.run import Run

LONGEST = 60  # letters of a prompt in a file's name
DESCRIPTION = """Draw fresh rollouts of a run's policy and of its prior, and measure how close the policy came to
p_prior(x) · exp(-E(x)/alpha). In this order: the verdict, on the terminal and in certificate.json; picture.png; what plain
diffusers samplers give with the policy's network, added to certificate.json. Whatever ends it leaves what was written. A run of
several labels or prompts is judged one by one, with a picture of each, and passes where all of them do. A shipped
task is judged by its own criteria, any other run by its two sides against each other. Exit status: 0 the certificate passes, 1
it fails, 3 it is inconclusive, 75 stopped by SIGTERM or SIGUSR1, 2 bad input, 70 an unexpected error, after its traceback.

example: tiltune evaluate my-run

example: tiltune evaluate my-run --energy my_energy.py:brightness --until-decided 40000
"""


@dataclass(frozen=True)
class Options:
    """What `tiltune evaluate` takes."""

    run: flags.RunFolder
    """Folder of the run."""
    energy: tuple[str, ...] = ()
    """What to judge by; the training's own where not given. To be said again where that is code of your own."""
    size: int | None = None
    """Rollouts a side; the config's where not given."""
    seed: int | None = None
    """Of these rollouts; the config's where not given."""
    tolerance: float | None = None
    """How far a share may be off for a pass, where only the two sides are compared; the config's (.05) where not given."""
    until_decided: int | None = None
    """While the verdict is inconclusive and more rollouts would decide, draw them: at most so many a side."""
    deployment: bool = True
    """Measure at last what plain diffusers samplers give with the policy's network."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit status."""
    options = flags.parse(Options, argv, "tiltune evaluate", DESCRIPTION)
    run = open_with_task(options.run)
    from ...finetune.distributed.signals import Preempted, preemptible, uninterrupted
    from ...finetune.runs.evaluate import certify, write_certificate
    from ..cluster.torchrun import REQUEUE

    energy = run.energy(options.energy)
    terms = options.energy or run.config.energy.terms
    chosen = {"size": options.size, "seed": options.seed, "tolerance": options.tolerance}
    judged: list[tuple[Run, dict[str, Any], Evidence]] = []
    certificate: dict[str, Any] = {}
    for one in run.by_condition():
        with preemptible():
            judged.append((one, *certify(one, energy, terms=terms, until_decided=options.until_decided, **chosen)))
        certificate = of_run(run, judged)
        with uninterrupted():
            write_certificate(run, certificate)
            print("" if one.condition is None else f"{one.condition}\n", summary(judged[-1][1], run.folder), sep="", flush=True)
    if run.prior.num_conditions > 1:
        print(f"\nall conditions: {verdict_line(certificate)}", flush=True)
    try:
        with preemptible():
            show(options, run, judged, energy)
    except Preempted as signal:
        print(f"{signal}: the verdict is written; what comes after it was left out", file=sys.stderr)
        return REQUEUE
    return certificate["exit_status"]


def of_run(run: Run, judged: list[tuple[Run, dict[str, Any], Evidence]]) -> dict[str, Any]:
    """The certificate of the whole run, from that of each condition that was judged so far."""
    from ...finetune.runs.verdicts import together

    table = run.prior.condition_table
    if table is None or len(table) == 1:
        return judged[0][1]
    certificates = {name: certificate for name, (_, certificate, _) in zip(table.names, judged, strict=False)}
    return together(certificates, table.names[len(judged) :])


def show(options: Options, run: Run, judged: list[tuple[Run, dict[str, Any], Evidence]], energy: Energy) -> None:
    """What follows a verdict: the pictures, then the deployed samplers. A cut leaves what is written by then."""
    from ...finetune.distributed.signals import uninterrupted
    from ...finetune.runs.evaluate import measure_deployment, write_certificate

    for one, certificate, evidence in judged:
        picture = run.folder / picture_name(one)
        picture.parent.mkdir(exist_ok=True)
        figure_of(one, certificate, evidence, energy).savefig(picture)
    if not options.deployment:
        return
    for place, (one, certificate, evidence) in enumerate(judged):
        judged[place] = one, measure_deployment(one, certificate, evidence, energy), evidence
        with uninterrupted():
            write_certificate(run, of_run(run, judged))
        if one.condition is not None:
            print(one.condition)
        for line in deployed(judged[place][1]["deployed"]):
            print(line)


def figure_of(run: Run, certificate: dict[str, Any], evidence: Evidence, energy: Energy) -> Figure:
    """The task's picture where the task judged, else that of its two sides."""
    from ..pictures import run_figure

    if run.config.task is not None and certificate["judged_by"] == f"the task {run.config.task}":
        return load_task(run.config.task).picture(evidence, energy, run.history, certificate)
    return run_figure(evidence, certificate)


def picture_name(run: Run) -> str:
    """picture.png, or one in pictures/ for each condition; a prompt that is no file's name gets one with its checksum."""
    if run.condition is None:
        return "picture.png"
    if re.fullmatch(r"[a-z0-9 ]+", run.condition) and len(run.condition) <= LONGEST:
        return f"pictures/{run.condition.replace(' ', '_')}.png"
    readable = re.sub(r"[^A-Za-z0-9]+", "_", run.condition)[:LONGEST]
    return f"pictures/{readable}-{crc32(run.condition.encode()):08x}.png"
