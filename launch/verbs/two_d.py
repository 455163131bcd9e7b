"""`tiltune 2d`: the mixture task trained, then judged, from the shipped prior to a certificate in under a minute."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from ...finetune.config.prior import PriorConfig
from ...finetune.config.run import RunConfig
from ...finetune.runs import folder
from ...finetune.runs.lock import RunLock
from ...finetune.runs.manifest import replace_file
from ...finetune.strict_json import strict_json
from ...tasks import mixture
from ...tasks.task import Task
from ..cluster.torchrun import UNSAVED
from .train import status
from .two_d_text import comparison, summary

if TYPE_CHECKING:
    from torch import Tensor

    from ...finetune.certificate.evidence import Evidence
    from ...finetune.energies.energy import Energy
    from ...finetune.runs.run import Run
    from ...samplers.prior import Prior

STARTED = time.perf_counter()
DESCRIPTION = """Fine-tune the shipped prior (25 equal modes) onto a known target (9 unequal modes), and certify the result.

Writes certificate.json, metrics.jsonl, picture.png, config.json and the policy into --out, with the config.yaml and
run.json of a run of `tiltune train mixture`. Exit status: 0 the certificate passes, 1 it fails, 3 it is inconclusive,
2 bad input, 75 or 76 told to stop after or before something new was saved, 70 an error of Tiltune or of the machine.

example: tiltune 2d --objective rtb --chain brownian --seed 1 --out my-run
"""
# What --compare writes, or wrote over, is no run that `run.train` would put aside.
FILES = ("certificate.json", "metrics.jsonl", "picture.png", "config.json", "policy")
COMPARISON = ("certificate.json", "picture.png")  # what --compare writes


@dataclass(frozen=True)
class Options:
    """What `tiltune 2d` takes."""

    objective: Literal["rtb", "log_variance", "trust_pcl", "reinforce_kl"] = "log_variance"
    """All four share their optimum."""
    alpha: float = 1.0
    """Temperature: the target is p_prior · exp(-E/alpha)."""
    chain: Literal["ddpm", "ddim", "flow", "brownian"] = "ddpm"
    """The sampler; brownian is the RTB paper's own."""
    steps: int | None = None
    """K, the number of steps; 50, and 100 for brownian, where not given."""
    warm_start: Literal["tlm", "none"] = "tlm"
    """Forward-KL fit to weighted prior paths first; none leaves all the work to the objective."""
    seed: int = 0
    out: Path = field(default_factory=lambda: Path("tiltune-2d"))
    """Where the run is written; refused if it holds another run, unless --overwrite."""
    overwrite: bool = False
    """Replace the run in --out."""
    compare: bool = False
    """Run RTB, Trust-PCL, log-variance, REINFORCE-KL and the published mistake on equal terms; prints one table, writes
    certificate.json and picture.png only."""
    threads: int = 1
    """Torch threads. More than one slows this small network down sixfold when the cores are shared."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit status."""
    import tyro

    options = tyro.cli(Options, args=argv, prog="tiltune 2d", description=DESCRIPTION)
    return compare(options) if options.compare else single(options)


def recipe(options: Options) -> RunConfig:
    """The task's recipe with the options."""
    config = mixture.recipe(
        options.chain,
        options.steps,
        objective=options.objective,
        alpha=options.alpha,
        warm_start=options.warm_start,
        seed=options.seed,
    )
    train = replace(config.train, checkpoint_every=0)
    return replace(config, train=train, device="cpu", threads=options.threads)


def prepare(options: Options) -> RunConfig:
    """The config; refuses what cannot work before anything heavy is imported."""
    if options.steps is not None and options.steps < 2:
        raise ValueError(f"--steps {options.steps}: the task needs at least 2 steps.")
    if options.threads < 1:
        raise ValueError(f"--threads {options.threads}: at least one thread is needed.")
    config = recipe(options)
    found = [name for name in FILES if (options.out / name).exists()]
    if found and not options.overwrite:
        raise ValueError(
            f"{options.out} already holds a run ({', '.join(found)}); nothing was touched. Name another folder with --out, or"
            " add --overwrite."
        )
    if not is_comparison(options.out):
        folder.refuse_occupied(options.out, options.overwrite)
    return config


def is_comparison(out: Path) -> bool:
    """Whether ``out`` holds what --compare leaves, and nothing else of a run."""
    return {name for name in (*folder.FILES, *FILES) if (out / name).exists()} == set(COMPARISON)


def single(options: Options) -> int:
    """One fine-tuning and its certificate."""
    config = prepare(options)
    trained, energy = train(options, config, options.out)
    said = {"task": "mixture", "chain": options.chain, "steps": config.prior.steps, "train": config.train.to_dict()}
    (options.out / "config.json").write_text(json.dumps(said, indent=2) + "\n")
    if trained.record["preempted"]:
        return status(trained.record)
    certificate, evidence = certify(options, trained, energy)
    mixture.TASK.picture(evidence, energy, trained.history, certificate).savefig(options.out / "picture.png")
    certificate["seconds"] = round(time.perf_counter() - STARTED, 1)
    write_certificate(options.out, certificate)
    print(summary(certificate, options.out))
    return certificate["exit_status"]


def train(options: Options, config: RunConfig, out: Path, training_energy: Energy | None = None) -> tuple[Run, Energy]:
    """The run in ``out``, and the task's own energy, which judges it whatever it was trained with."""
    import torch

    from ...finetune.runs import train as runs
    from ...finetune.runs.energies import load_energies
    from ...tasks.mixture_target import certified_target

    torch.set_num_threads(options.threads)
    certified_target(options.alpha)
    if is_comparison(out):
        folder.remove_run(out)
    task = announced(options)
    trained = runs.train(config, out, task=task, energy=training_energy, overwrite=options.overwrite)
    return trained, load_energies(config, task)


def announced(options: Options) -> Task:
    """The task, with a prior that says in its one line also the temperature and the objective."""

    def load_prior(config: PriorConfig) -> Prior:
        prior = mixture.load_prior(config)
        prior.decisions = (f"{prior.decisions[0]}, alpha = {options.alpha:g}, objective {options.objective}",)
        return prior

    return replace(mixture.TASK, load_prior=load_prior)


def certify(options: Options, trained: Run, energy: Energy) -> tuple[dict[str, Any], Evidence]:
    """The run's certificate, with what the training said of itself beside it."""
    from ...finetune.runs import evaluate

    record = trained.record
    certificate, evidence = evaluate.certify(trained, energy, terms=("energy",))
    certificate |= {
        "log_z_trained": record["log_z"],
        "objective": options.objective,
        "chain": options.chain,
        "seed": options.seed,
        "train_seconds": record["seconds"],
        "improvement": record["improvement"],
    }
    return certificate, evidence


def write_certificate(out: Path, certificate: dict[str, Any]) -> None:
    """certificate.json, whole at any moment."""
    replace_file(out / "certificate.json", strict_json(certificate, indent=2) + "\n")


def mistaken_energy(x: Tensor) -> Tensor:
    """The published mistake: the density exp(-E) handed over as a reward, which targets p_prior · exp(exp(-E))."""
    from ...finetune.energies.energy import from_reward
    from ...tasks.mixture_target import energy

    return from_reward(lambda samples: (-energy(samples)).exp())(x)


def compare(options: Options) -> int:
    """Four objectives and the published mistake on equal terms; exit status 0 if the four pass and it does not."""
    prepare(options)
    from ...tasks.mixture_target import certified_target, target_mixture
    from ...tasks.plots.mixture import comparison_figure

    certified_target(options.alpha)
    options.out.mkdir(parents=True, exist_ok=True)
    with RunLock(options.out):
        runs = compared(options)
        if runs is None:
            return UNSAVED
        folder.remove_run(options.out)
        print(comparison(runs))
        comparison_figure(runs, target_mixture(options.alpha)).savefig(options.out / "picture.png")
        write_certificate(options.out, {name: certificate for name, (_, certificate) in runs.items()})
    verdicts = [certificate["verdict"] for _, certificate in runs.values()]
    return 0 if verdicts[:4] == ["pass"] * 4 and verdicts[4] == "fail" else 1


def compared(options: Options) -> dict[str, tuple[Tensor, dict[str, Any]]] | None:
    """{name: (samples, certificate)} of each training, None where SIGTERM or SIGUSR1 ended one."""
    settings: dict[str, tuple[Any, Energy | None]] = {
        "RTB": ("rtb", None),
        "Trust-PCL": ("trust_pcl", None),
        "log-variance": ("log_variance", None),
        "REINFORCE-KL": ("reinforce_kl", None),
        "REINFORCE-KL, r = exp(-E)": ("reinforce_kl", mistaken_energy),
    }
    runs: dict[str, tuple[Tensor, dict[str, Any]]] = {}
    population_size = recipe(replace(options, objective="rtb")).train.population_size
    for name, (objective, training_energy) in settings.items():
        print(f"== {name}", file=sys.stderr)
        chosen = replace(options, objective=objective)
        config = recipe(chosen)
        # Equal terms: one population, and the one behavior that every objective may use alone.
        train_config = replace(config.train, behavior={"on_policy": 1.0}, population_size=population_size)
        config = replace(config, train=train_config)
        with TemporaryDirectory() as scratch:
            trained, energy = train(chosen, config, Path(scratch) / "run", training_energy)
            if trained.record["preempted"]:
                return None
            certificate, evidence = certify(chosen, trained, energy)
        runs[name] = (evidence.samples, certificate)
    return runs
