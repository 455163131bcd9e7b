"""`tiltune audit`: judge what another toolkit trained, by the tilt that it is closest to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...finetune.config.energy import EnergyConfig
from ...finetune.config.prior import PriorConfig
from ...finetune.config.run import RunConfig
from ...finetune.runs.folder import holds_anything
from ...tasks.task import TASKS, load_task
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
the objective, but the base must be run as it was trained: name it as --prior, or a shipped TASK, with its steps, scheduler and
guidance. It writes audit.json and picture.png. Exit status: 0 it draws the tilt that it is closest to, 1 it does not or was not
trained, 3 inconclusive, 2 bad input, 70 an unexpected error, after its traceback.

example: tiltune audit --prior my-sd --policy my-lora --energy my_energy.py:aesthetic --prompts "a cat" --scheduler ddim
"""
FEWEST = 100  # rollouts a side that show anything


@dataclass(frozen=True)
class Own:
    """What `tiltune audit` takes besides the prior."""

    policy: Path
    """Folder of what was trained: a LoRA of peft or diffusers, or a whole network or pipeline."""
    energy: tuple[str, ...]
    """FILE.py:NAME, what is to be low. Of a reward, -1*FILE.py:NAME."""
    size: int = 1000
    """Rollouts a side, of each prompt."""
    tolerance: float = 0.05
    """How far a share may be off for a pass."""
    seed: int = 0
    """Of these rollouts."""
    threads: int = 1
    """CPU threads of torch."""
    out: Path | None = None
    """New folder for audit.json and picture.png; runs/audit- and the policy's name where not given."""


Options = flags.with_prior(PriorConfig(), Own, tuple(TASKS))


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit status."""
    named = argv[0] if argv and argv[0] in TASKS else None
    base = PriorConfig() if named is None else load_task(named).recipe().prior
    options = flags.parse(flags.with_prior(base, Own, tuple(TASKS)), argv, "tiltune audit", DESCRIPTION)
    if options.task != named:
        raise ValueError(f"name the task first: tiltune audit {options.task} ….")
    out = options.out or Path("runs") / f"audit-{options.policy.resolve().name}"
    if holds_anything(out):
        raise ValueError(f"{out} is not an empty folder; nothing was touched. Name another one with --out.")
    if options.size < FEWEST:
        raise ValueError(f"--size {options.size}: fewer than {FEWEST} rollouts a side show nothing.")
    from ...finetune.certificate.audit import audit
    from ...finetune.runs.build import threads
    from ...finetune.runs.manifest import replace_file
    from ...finetune.strict_json import strict_json
    from ...samplers.loading.hints import REMEMBERED, widest_variance

    run, energy = adopted(options)
    share = run.prior.chain.remembered_share(run.prior.data_variance or widest_variance(run.prior.shape))
    print(*run.prior.decisions, f"start: the samples remember a share of {share:.2g} of it", sep="\n")
    runs = run.by_condition()
    with threads(options.threads):
        sides = evidence_of(runs, energy, options.size, options.seed)
        found, judged = audit(sides, options.tolerance, remembers=share > REMEMBERED)
    for one in found["conditions"]:
        print("", *of_condition(one), sep="\n")
    print("", *overall(found), sep="\n")
    out.mkdir(parents=True, exist_ok=True)
    told = {"prior": named or run.config.prior.source, "policy": str(options.policy), "energy": list(options.energy)}
    replace_file(out / "audit.json", strict_json(told | found, indent=2) + "\n")
    picture_of([(one, *own) for one, own in zip(runs, judged, strict=True)]).savefig(out / "picture.png")
    print(f"written to {out}")
    return found["exit_status"]


def adopted(options: Any) -> tuple[Run, Energy]:
    """(what was trained elsewhere, as a run beside its base; the energy).

    Errors: ValueError for an energy that cannot be loaded, and for folders that do not go together.
    """
    from ...finetune.runs.build import load_prior
    from ...finetune.runs.energies import load_energies
    from ...finetune.runs.prompts import from_file
    from ...finetune.runs.run import Run
    from ...samplers.loading.foreign import load_foreign_policy

    task = None if options.task is None else load_task(options.task)
    prior = from_file(flags.built(PriorConfig, options.prior))
    if task is None and prior.source is None:
        raise ValueError("name what the training began at: --prior FOLDER, or a shipped task.")
    config = RunConfig(task=options.task, prior=prior, energy=EnergyConfig(options.energy), threads=options.threads)
    energy = load_energies(config, task)  # before the networks, which may take minutes
    base = load_prior(config, task)
    return Run(options.policy, config, base, load_foreign_policy(base, options.policy), {}, task), energy


def evidence_of(runs: list[Run], energy: Energy, size: int, seed: int) -> dict[str, Evidence]:
    """Rollouts of both sides, by condition, on the CPU; all of them from one stream."""
    from ...finetune.certificate.evidence import gather_evidence
    from ...finetune.runs.bar import progress_bar
    from ...samplers.streams import stream
    from ...tasks.metrics.samples import on_cpu

    generator, sides = stream("certificate", seed, runs[0].prior.device), {}
    with progress_bar(2 * size * len(runs), "rollouts") as advance:
        for one in runs:
            options: dict[str, Any] = {"size": size, "starts": 0, "population": "importance", "on_progress": advance}
            sides[one.condition or ""] = on_cpu(gather_evidence(one.prior, one.policy, energy, math.inf, generator, **options))
    return sides


def picture_of(judged: list[tuple[Run, dict[str, Any], Evidence]]) -> Any:
    """Base, policy and tilt: in rows where they are pictures."""
    from ..pictures import is_images, run_figure
    from ..rows_picture import rows_figure

    _, certificate, side = judged[0]
    return rows_figure(judged) if is_images(side.samples) else run_figure(side, certificate)
