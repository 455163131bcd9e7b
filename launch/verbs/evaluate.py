"""`tiltune evaluate`: judge a run by fresh rollouts of both sides, and write its certificate."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

from ...tasks.task import load_task
from .. import flags
from .evaluate_text import deployed, summary, summary_lines, verdict_line
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
several labels or prompts is judged one by one, with a picture of each, and passes where all of them do; picture.png then has
them in rows. Held-out prompts are judged beside them and are no part of the verdict. A shipped
task is judged by its own criteria, any other run by its two sides against each other. Exit status: 0 the certificate passes, 1
it fails, 3 it is inconclusive, 75 stopped by SIGTERM or SIGUSR1, 2 bad input, 70 an unexpected error, after its traceback.

example: tiltune evaluate my-run

example: tiltune evaluate my-run --energy my_energy.py:brightness --until-decided 40000

example: tiltune evaluate my-text-run --held-out "a bird" "a sweet" --beside my-reward-only-run
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
    held_out: tuple[str, ...] = ()
    """Prompts that the training has not seen, or a file of them, judged beside the run's own and apart from its verdict."""
    beside: flags.RunFolder | None = None
    """Another run of the same text-to-image prior, whose pictures of the same prompts and seeds stand beside this one's."""
    deployment: bool = True
    """Measure at last what plain diffusers samplers give with the policy's network."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit status."""
    options = flags.parse(Options, argv, "tiltune evaluate", DESCRIPTION)
    run = open_with_task(options.run)
    from ...finetune.distributed.signals import Preempted, preemptible, uninterrupted
    from ...finetune.runs.evaluate import certify, write_certificate
    from ..cluster.torchrun import REQUEUE

    sides = Side(run, []), Side(unseen(run, options.held_out), [], held_out=True) if options.held_out else None
    own, held_out = sides
    other = None if options.beside is None else beside(run, open_with_task(options.beside))
    energy = run.energy(options.energy)
    terms = options.energy or run.config.energy.terms
    chosen = {"size": options.size, "seed": options.seed, "tolerance": options.tolerance}
    certificate: dict[str, Any] = {}
    for side in filter(None, sides):
        for one in side.runs():
            with preemptible():
                side.judged.append((one, *certify(one, energy, terms=terms, until_decided=options.until_decided, **chosen)))
            certificate = of_run(own, held_out)
            with uninterrupted():
                write_certificate(run, certificate)
                print(side.title(one), summary(side.judged[-1][1], run.folder), sep="", flush=True)
        if side.run.prior.num_conditions > 1:
            whole = side.certificate()
            print(f"\n{side.whole}: {verdict_line(whole)}", *summary_lines(whole), sep="\n", flush=True)
    try:
        with preemptible():
            show(options, own, held_out, energy, other)
    except Preempted as signal:
        print(f"{signal}: the verdict is written; what comes after it was left out", file=sys.stderr)
        return REQUEUE
    return certificate["exit_status"]


@dataclass(frozen=True)
class Side:
    """The conditions of a run, or prompts that it has not seen, and what is judged of them so far."""

    run: Run
    judged: list[tuple[Run, dict[str, Any], Evidence]]
    held_out: bool = False

    @property
    def whole(self) -> str:
        return "all held-out prompts" if self.held_out else "all conditions"

    def runs(self) -> list[Run]:
        """One for each law. A held-out prompt has its name also where it is the only one."""
        return [self.run.only(row) for row in range(self.run.prior.num_conditions)] if self.held_out else self.run.by_condition()

    def title(self, one: Run) -> str:
        """The line above what is said of a condition."""
        return "" if one.condition is None else f"\n{one.condition}{' (held out)' if self.held_out else ''}\n"

    def certificate(self) -> dict[str, Any]:
        """Of the whole side, from that of each condition that was judged so far."""
        from ...finetune.runs.verdicts import together

        table = self.run.prior.condition_table
        if table is None or (len(table) == 1 and not self.held_out):
            return self.judged[0][1]
        certificates = {name: certificate for name, (_, certificate, _) in zip(table.names, self.judged, strict=False)}
        return together(certificates, table.names[len(self.judged) :])


def unseen(run: Run, prompts: tuple[str, ...]) -> Run:
    """The run on held-out prompts. Errors: ValueError for prompts that it was trained on."""
    found = run.on_prompts(prompts)
    known = sorted(set(found.config.prior.prompts or ()) & set(run.config.prior.prompts or ()))
    if known:
        raise ValueError(f"--held-out {known[0]!r}: {run.folder} was trained on it; leave it out.")
    return found


def of_run(own: Side, held_out: Side | None) -> dict[str, Any]:
    """The certificate of the run, with that of the held-out prompts beside it, which is no part of the verdict."""
    return own.certificate() | ({"held_out": held_out.certificate()} if held_out and held_out.judged else {})


def beside(run: Run, other: Run) -> Run:
    """The other run on the prompts of this one.

    Errors: ValueError for runs of other priors.
    """
    source, its = run.prior.source, other.prior.source
    if run.config.prior.prompts is None or source is None or its is None or source.path != its.path:
        raise ValueError(f"--beside {other.folder}: it is no run of prompts on the prior of {run.folder}; name one that is.")
    return other.on_prompts(run.config.prior.prompts)


def show(options: Options, own: Side, held_out: Side | None, energy: Energy, other: Run | None) -> None:
    """What follows a verdict: the pictures, then the deployed samplers. A cut leaves what is written by then."""
    from ...finetune.distributed.signals import uninterrupted
    from ...finetune.runs.evaluate import measure_deployment, write_certificate
    from ..pictures import is_images
    from ..rows_picture import rows_figure

    run, sides = own.run, [own, *([held_out] if held_out else [])]
    for one, certificate, evidence in [judged for side in sides for judged in side.judged]:
        picture = run.folder / picture_name(one)
        picture.parent.mkdir(exist_ok=True)
        figure_of(one, certificate, evidence, energy).savefig(picture)
    if (run.prior.num_conditions > 1 or other is not None) and is_images(own.judged[0][2].samples):
        rows_figure(own.judged, other).savefig(run.folder / "picture.png")
    if not options.deployment:
        return
    for side in sides:
        for place, (one, certificate, evidence) in enumerate(side.judged):
            side.judged[place] = one, measure_deployment(one, certificate, evidence, energy), evidence
            with uninterrupted():
                write_certificate(run, of_run(own, held_out))
            print(side.title(one).strip(), *deployed(side.judged[place][1]["deployed"]), sep="\n")


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
