"""`tiltune study`: a question answered by many trainings, as one folder of tables, a figure and an answer in words."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from ...finetune.distributed.signals import Preempted, preemptible
from .. import flags
from ..cluster.torchrun import REQUEUE, UNSAVED

if TYPE_CHECKING:
    from ..study.study import Study

Name = Literal["reward", "equivalence", "behaviors", "dimension", "baselines", "clipping", "horizon", "estimators", "temperature"]

DESCRIPTION = """Answer a question by many trainings, and write the answer with its tables and a figure into --out. The same
command goes on with a study that was stopped: runs that are finished are kept. A folder of anything else is refused. Exit status:
0 the study is finished, 130 interrupted, 75 told to stop by SIGTERM or SIGUSR1 after new runs were saved, 76 before that, 2 bad
input.

reward: is the reward -E, or exp(-E)?
equivalence: RTB and Trust-PCL are one loss up to alpha²; does that survive training?
behaviors: where should trajectories come from, at equal energy calls?
dimension: does the gap between on-policy and off-policy methods widen with the dimension?
baselines: which baseline serves an on-policy training best?
clipping: what does clipping an update buy?
horizon: what does a short horizon of Trust-PCL cost in bias of the value, and what does it save in variance?
estimators: which estimator of the gradient says most for each network evaluation?
temperature: what does alpha trade between energy, KL to the prior, and diversity?

example: tiltune study dimension --quick --out my-study
"""


@dataclass(frozen=True)
class Options:
    """What `tiltune study` takes."""

    name: Annotated[Name, flags.POSITIONAL]
    quick: bool = False
    """Fewer and smaller problems, two seeds: under a minute on two cores."""
    full: bool = False
    """Larger budgets and more seeds: hours."""
    out: Path | None = None
    """The study's folder; study-NAME where not given, or study-NAME-quick and -full."""
    seeds: int | None = None
    """How many trainings of each kind, on a random problem each (on the same one in the study of rewards); 5, 2 with --quick, 10
    with --full."""
    jobs: int = os.cpu_count() or 1
    """Trainings side by side, in a process of one thread each; the cores where not given. Numbers do not depend on it."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit status."""
    options = flags.parse(Options, argv, "tiltune study", DESCRIPTION)
    if options.quick and options.full:
        raise ValueError("--quick and --full are two sizes; give one of them.")
    if options.jobs < 1:
        raise ValueError(f"--jobs {options.jobs}: at least one training at a time is needed.")
    size = "quick" if options.quick else "full" if options.full else "default"
    out = options.out or Path("-".join(["study", options.name, *([size] if size != "default" else [])]))

    from ...finetune.runs.loading import loading

    with loading("torch"):
        from ..study.study import named

        study = named(options.name, size, options.seeds)
    return _carried_out(study, out, options.jobs)


def _carried_out(study: Study, out: Path, jobs: int) -> int:
    from ..study.study import carry_out, finished

    before = finished(study, out)
    try:
        with preemptible():
            answer = carry_out(study, out, jobs)
    except KeyboardInterrupt as stopped:
        done = finished(study, out)
        print(
            f"stopped: {done} of {len(study.runs)} runs are kept in {out}; the same command goes on from there", file=sys.stderr
        )
        if isinstance(stopped, Preempted):
            return REQUEUE if done > before else UNSAVED
        return 130
    print(f"{answer}\nwritten to {out}")
    return 0
