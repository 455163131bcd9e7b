"""`tiltune audit`: judge what another toolkit trained, by the tilt that it is closest to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ...finetune.config.energy import EnergyConfig
from ...finetune.config.prior import PriorConfig
from ...finetune.config.run import RunConfig
from ...tasks.task import TASKS, Task, load_task
from .. import flags
from .audit_text import of_condition, overall

if TYPE_CHECKING:
    from ...finetune.certificate.evidence import Evidence
    from ...finetune.energies.energy import Energy
    from ...finetune.runs.run import Run

DESCRIPTION = """Judge a LoRA or a network that another toolkit trained from a base toward an energy (or minus a reward), such as
TRL's DDPO, ddpo-pytorch, flow_grpo or Flow-Factory: anything that saved diffusers or peft files as safetensors. It says whether
training changed anything, how far the policy moved, KL(policy || base) over paths in nats, for each prompt; the temperature
alpha whose tilt p_base(x) · exp(-E(x)/alpha) it is closest to; how close that is; and what it lost. Nothing need be known of
how it was trained, but the base must be run as it was trained: give its steps, scheduler and guidance. Exit status: 0 it draws
the tilt that it is closest to, 1 it does not or was not trained, 3 inconclusive, 2 bad input.

example: tiltune audit my-sd --policy my-ddpo-lora --energy my_energy.py:aesthetic --prompts "a cat" "a dog" --scheduler ddim
"""


@dataclass(frozen=True)
class Options:
    """What `tiltune audit` takes."""

    base: Annotated[str, flags.POSITIONAL, tyro.conf.arg(metavar="BASE")]
    """Folder or hub id of what the training began at, or the name of a shipped task."""
    policy: Path
    """Folder of what was trained: a LoRA of peft or diffusers, or a whole network or pipeline."""
    energy: tuple[str, ...]
    """FILE.py:NAME, what is to be low; minus the reward: a scale of -1 turns a function of a reward into one: -1*FILE.py:NAME."""
    prompts: tuple[str, ...] | None = None
    """Of a text-to-image base, or a file of them."""
    labels: tuple[int, ...] | None = None
    """Of a class-conditional base."""
    steps: int = 50
    """K, the number of denoising steps."""
    scheduler: Literal["ddpm", "ddim", "euler_ancestral"] | None = None
    """In place of the base's own, where that one is none of a chain."""
    eta: float = 1.0
    """DDIM's share of noise."""
    noise: Literal["memoryless", "flow_grpo"] = "memoryless"
    """The noise that turns a flow into a stochastic sampler."""
    noise_level: float = 0.7
    """Scale of the flow_grpo noise."""
    guidance: float | None = None
    """Scale of classifier-free guidance; 1: none. The pipeline's own where not given."""
    negative_prompt: str = ""
    size: int = 1000
    """Rollouts a side, of each prompt."""
    tolerance: float = 0.05
    """How far a share may be off for a pass."""
    seed: int = 0
    threads: int = 1
    """CPU threads of torch."""
    out: Path | None = None
    """New folder for audit.json and picture.png; runs/audit- and the policy's name where not given."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit status."""
    options = flags.parse(Options, argv, "tiltune audit", DESCRIPTION)
    out = options.out or Path("runs") / f"audit-{options.policy.resolve().name}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder; nothing was touched. Name another one with --out.")
    task = load_task(options.base) if options.base in TASKS else None
    if task is not None and options.prompts is None and task.recipe().prior.prompts:
        options = replace(options, prompts=task.recipe().prior.prompts)
    run = adopted(options, task)
    from ...finetune.runs.bar import progress_bar
    from ...finetune.runs.build import threads
    from ...finetune.runs.manifest import replace_file
    from ...finetune.strict_json import strict_json
    from ..pictures import is_images, run_figure
    from ..rows_picture import rows_figure

    print(*run.prior.decisions, sep="\n")
    energy, runs = run.energy(options.energy), run.by_condition()
    with threads(options.threads), progress_bar(2 * options.size * len(runs), "rollouts") as advance:
        sides = [evidence_of(one, energy, options, advance) for one in runs]
    found, judged = audit(runs, sides, options.tolerance)
    for one in found["conditions"]:
        print("", *of_condition(one), sep="\n")
    print("", *overall(found), sep="\n")
    out.mkdir(parents=True, exist_ok=True)
    told = {"base": options.base, "policy": str(options.policy), "energy": list(options.energy)}
    replace_file(out / "audit.json", strict_json(told | found, indent=2) + "\n")
    rows = [(one, certificate, evidence) for one, certificate, evidence in zip(runs, judged, sides, strict=True)]
    shown = rows_figure(rows) if is_images(sides[0].samples) else run_figure(sides[0], judged[0])
    shown.savefig(out / "picture.png")
    print(f"written to {out}")
    return found["exit_status"]


def adopted(options: Options, task: Task | None) -> Run:
    """What was trained elsewhere as a run beside its base. Errors: ValueError for folders that do not go together."""
    from ...finetune.runs.build import load_prior
    from ...finetune.runs.prompts import from_file
    from ...finetune.runs.run import Run
    from ...samplers.loading.foreign import load_foreign_policy

    shared = ("prompts", "labels", "steps", "scheduler", "eta", "noise", "noise_level", "guidance", "negative_prompt")
    prior = PriorConfig(source=None if task else options.base, **{name: getattr(options, name) for name in shared})
    config = RunConfig(
        task=None if task is None else task.name,
        prior=from_file(prior),
        energy=EnergyConfig(options.energy),
        threads=options.threads,
    )
    base = load_prior(config, task)
    return Run(options.policy, config, base, load_foreign_policy(base, options.policy), {}, task)


def evidence_of(run: Run, energy: Energy, options: Options, advance: Any) -> Evidence:
    """Rollouts of both sides, at no alpha yet."""
    import math

    from ...finetune.certificate.evidence import gather_evidence
    from ...samplers.streams import stream

    generator = stream("certificate", options.seed, run.prior.device)
    sizes = {"size": options.size, "starts": 0, "population": "importance"}
    return gather_evidence(run.prior, run.policy, energy, math.inf, generator, **sizes, on_progress=advance)


def audit(runs: list[Run], sides: list[Evidence], tolerance: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what is found, of all and of each condition; each one's figures at the closest alpha)."""
    from ...finetune.certificate.closest_alpha import closest_alpha
    from ...finetune.runs.verdicts import SEVEREST

    closest = closest_alpha([side.energy for side in sides], [side.prior_energy for side in sides])
    judged = [_at(side, closest.alpha, tolerance) for side in sides]
    conditions = [
        {"condition": run.condition, **_figures(side, certificate)} | asdict(closest_alpha([side.energy], [side.prior_energy]))
        for run, side, certificate in zip(runs, sides, judged, strict=True)
    ]
    untouched = all(bool((side.log_ratio == 0).all()) for side in sides)
    verdict = next(severe for severe in SEVEREST if any(one["verdict"] == severe for one in judged))
    kinds = {"untouched": untouched, "moved": any(one["kl_to_prior"] - 2.6 * one["kl_to_prior_se"] > 0 for one in conditions)}
    status = 1 if untouched or verdict == "fail" or closest.alpha == float("inf") else {"pass": 0, "inconclusive": 3}[verdict]
    return {**kinds, "closest": asdict(closest), "verdict": verdict, "exit_status": status, "conditions": conditions}, judged


def _at(side: Evidence, alpha: float, tolerance: float) -> dict[str, Any]:
    """The figures of paths and the verdict of the two sides at this alpha."""
    from ...finetune.certificate.path_metrics import path_metrics
    from ...finetune.certificate.verdict import judge_unknown

    tilted = replace(side, alpha=alpha)
    metrics = path_metrics(tilted)
    verdict, reasons, own = judge_unknown(tilted, metrics, tolerance)
    return metrics | own | {"verdict": verdict, "reasons": reasons, "alpha": alpha}


def _figures(side: Evidence, certificate: dict[str, Any]) -> dict[str, Any]:
    """What is told of one condition."""
    from ...finetune.certificate.closest_alpha import least_kl
    from ...finetune.estimators import weighted_mean
    from ...tasks.metrics.diversity import pairwise_distance
    from ...tasks.metrics.samples import even

    tilted = replace(side, alpha=certificate["alpha"])
    target = tilted.target_weight.cpu()
    own, of_target, of_prior = (
        pairwise_distance(samples.cpu(), weight)[0]
        for samples, weight in (
            (side.samples, even(len(side.samples))),
            (side.prior_samples, target),
            (side.prior_samples, even(len(side.prior_samples))),
        )
    )
    energy = {
        "energy_prior": certificate["prior"]["mean_energy"],
        "energy_policy": certificate["mean_energy"],
        "energy_target": weighted_mean(side.prior_energy, target)[0],
    }
    names = (
        "kl_to_prior",
        "kl_to_prior_se",
        "kl_to_target",
        "kl_from_target",
        "gap",
        "gap_se",
        "cell_tv",
        "undercovered",
        "reasons",
    )
    return {
        "verdict": certificate["verdict"],
        **energy,
        "least_kl": least_kl(side.prior_energy.cpu(), certificate["alpha"]),
        "diversity": own / of_target,
        "diversity_of_prior": own / of_prior,
        **{name: certificate.get(name) for name in names},
    }
