"""A finished run judged: fresh rollouts of both sides, the task's own criteria, and what is deployed of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..samplers.steering import systematic
from . import certificate as certificates
from .deployment import deployed_samplers, deployment_figures
from .energy_loading import parse_energy
from .estimators import ess
from .run import Run, Task, absolute_term, threads
from .strict_json import strict_json

if TYPE_CHECKING:
    from .certificate import Evidence
    from .energy import Energy

# Far from the training's generators, whose trajectories the certificate must not see again.
FRESH_SEED = 2**62
# Samples of each deployed sampler: what it loses shows in a few, and there are several samplers.
DEPLOYED_SIZE = 1000
# Common starts, and rollouts from each, that show what the chain remembers of its start.
STARTS, ROLLOUTS = 128, 8


def certify(
    run: Run,
    energy: Energy | None = None,
    *,
    terms: Sequence[str] = (),
    size: int | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], Evidence]:
    """Judge a run by fresh rollouts of both sides; returns every figure with the verdict, and the evidence behind them.

    energy: what to judge by; the training's own where None, under the conditions of `Run.energy`. terms: what ``energy`` is
    named by, for the record ("energy"; None for a function without a name). size, seed: the config's where None. A task
    judges by its own criteria; elsewhere the two sides judge each other ("judged_by"). "deployed" holds what plain diffusers
    loops around the policy give, and is not judged.
    """
    from tqdm import tqdm

    config, alpha = run.config.certificate, run.config.train.alpha
    size, seed = config.size if size is None else size, config.seed if seed is None else seed
    replace(config, size=size, seed=seed)  # refuses what no certificate can have
    if energy is None:
        energy, terms = run.energy(terms), terms or run.config.energy.terms
    each = min(size, DEPLOYED_SIZE)
    total = 2 * size + STARTS * ROLLOUTS * (run.prior.chain.start_std > 0) + each * len(deployed_samplers(run.prior))
    with threads(run.config.threads), tqdm(total=total, desc="certificate", dynamic_ncols=True, disable=not progress) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        generator = torch.Generator(run.prior.device).manual_seed(FRESH_SEED + seed)
        evidence = certificates.gather_evidence(
            run.prior, run.policy, energy, alpha, generator, size=size, starts=STARTS, rollouts=ROLLOUTS, on_progress=advance
        )
        figures = certificates.path_figures(evidence)
        verdict, reasons, compared = certificates.judge_unknown(evidence, figures)
        compared |= {"verdict": verdict, "reasons": reasons}
        judged_by = "its two sides"
        if run.task is not None:
            doubts = certificates.target_side_doubts(figures)
            try:
                figures |= run.task.figures(evidence, energy, generator)
                judged_by = f"the task {run.task.name}"
                verdict, reasons = certificates.conclude(run.task.criteria(figures), doubts)
            except ValueError as error:  # too few samples for one of the task's figures are no bad input
                verdict, reasons = "inconclusive", [*doubts, str(error)]
            figures["exact"] = _exact_figures(run.task, evidence, energy, generator)
        bar.set_description("deployed samplers")
        deployed = deployment_figures(run.policy, energy, evidence, generator, each, on_progress=advance)
        calls = evidence.energy_calls + each * (len(deployed) - 2)  # its first two rows are the evidence's own
    notes = ["training was interrupted; this is what it had reached"] if run.record["interrupted"] else []
    notes += [f"training stopped early: {run.record['stopped']}"] if run.record["stopped"] else []
    notes += energy_flags(run, terms)
    figures |= {
        "verdict": verdict,
        "reasons": reasons,
        "judged_by": judged_by,
        "flags": certificates.flags(figures) + notes,
        "verdict_unknown_truth": compared,
        "exit_status": certificates.EXIT_STATUS[verdict],
        "energy_calls": run.record["energy_calls"],
        "certificate_energy_calls": calls,
        "deployed": deployed,
        "energy": [absolute_term(term) for term in terms] or None,
        "alpha": alpha,
        "steps": run.prior.chain.num_steps,
        "size": size,
        "seed": seed,
    }
    return figures, evidence


def energy_flags(run: Run, terms: Sequence[str]) -> list[str]:
    """A sentence where the energy that ``terms`` name (a function without a name where empty) is not the training's."""
    own = run.config.energy.terms
    if _meant(run, terms) == _meant(run, own):
        return []
    judging, training = (" ".join(named) or "a function of its own" for named in (terms, own))
    return [f"the energy here is {judging}; the run was trained with {training}"]


def _meant(run: Run, terms: Sequence[str]) -> list[str]:
    """Terms in one spelling and order, whatever folder they were said in and however their numbers are written."""
    meant = []
    for spec in (parse_energy(absolute_term(term)) for term in terms):
        place = spec.place or ("" if run.task is None else run.task.module)
        called = (spec.arguments, sorted(spec.keywords.items())) if spec.call else None
        meant.append(repr((spec.scale, place, spec.name, called)))
    return sorted(meant)


def _exact_figures(task: Task, evidence: Evidence, energy: Energy, generator: torch.Generator) -> dict[str, Any]:
    """The task's figures of the policy's samples resampled by their weights, as `tiltune sample --exact` draws them."""
    effective = max(1, int(ess(evidence.log_weight) * len(evidence.samples)))
    index = systematic(evidence.log_weight.double().softmax(0), effective, generator)
    everything = torch.arange(len(evidence.prior_samples), device=index.device)
    try:
        found = task.figures(evidence.resampled(index, everything), energy, generator)
    except ValueError as error:  # too few effective samples to say anything
        found = {"missing": str(error)}
    return {"effective": effective, **found}


def write_certificate(run: Run, figures: dict[str, Any]) -> None:
    """certificate.json in the run's folder."""
    (run.folder / "certificate.json").write_text(strict_json(figures, indent=2) + "\n")
