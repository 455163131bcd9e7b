"""A finished run judged: fresh rollouts of both sides, the task's own criteria, and then what is deployed of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ...samplers.resampling import systematic
from ...samplers.streams import stream
from ..certificate.criteria import (
    EXIT_STATUS,
    fail_gross_misses,
    flags,
    rollouts_to_trust,
    target_side_doubts,
    unjudged,
    worse_than_prior,
)
from ..certificate.deployment import deployed_samplers, deployment_metrics
from ..certificate.evidence import gather_evidence
from ..certificate.path_metrics import path_metrics
from ..certificate.reference import reference_paths
from ..certificate.verdict import judge_unknown
from ..energies.names import parse_energy
from ..estimators import ess
from ..strict_json import strict_json
from .bar import counting_bar, progress_bar
from .build import threads
from .energies import absolute_term
from .manifest import replace_file
from .run import Run
from .task import Task

if TYPE_CHECKING:
    from ..certificate.evidence import Evidence
    from ..certificate.reference import ReferencePaths
    from ..energies.energy import Energy

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
    tolerance: float | None = None,
    until_decided: int | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], Evidence]:
    """Judge a run by fresh rollouts of both sides; returns every figure with the verdict, and the evidence behind them.

    energy: what to judge by; the training's own where None, under the conditions of `Run.energy`. terms: what ``energy`` is
    named by, for the record ("energy"; None for a function without a name). size, seed, tolerance: the config's where None. A
    task judges by its own criteria; elsewhere the two sides judge each other ("judged_by"). until_decided: while the verdict is
    inconclusive and more rollouts would decide, draw them, at most so many a side. What plain diffusers loops around the policy
    give is another step, `measure_deployment`.

    Errors: ValueError for a run of several conditions: each has a law of its own, and is judged alone (`Run.by_condition`).
    """
    given = {"size": size, "seed": seed, "tolerance": tolerance}
    config = replace(run.config.certificate, **{name: value for name, value in given.items() if value is not None})
    _refuse(run, config.size, until_decided)
    if energy is None:
        energy, terms = run.energy(terms), terms or run.config.energy.terms
    generator = stream("certificate", config.seed, run.prior.device)
    evidence: Evidence | None = None
    wanted = config.size
    with threads(run.config.threads):
        reference = _reference(run, energy, config.seed)
        while True:
            drawn = _draw(run, energy, wanted - (0 if evidence is None else len(evidence.samples)), generator, evidence, progress)
            evidence = replace(drawn, reference=reference) if evidence is None else evidence.joined(drawn)
            metrics = _judge(run, energy, evidence, config.tolerance, generator, progress)
            more = metrics["rollouts_to_decide"]
            if metrics["verdict"] != "inconclusive" or more is None or until_decided is None or wanted >= until_decided:
                break
            wanted = min(until_decided, max(more, 5 * wanted // 4))
    notes = ["training was interrupted; this is what it had reached"] if run.record["interrupted"] else []
    notes += [f"training stopped early: {run.record['stopped']}"] if run.record["stopped"] else []
    budget = run.record.get("over_budget")
    notes += [f"the updates ended at their budget: {budget}"] if budget else []
    notes += unjudged(metrics)
    metrics |= {
        "flags": energy_flags(run, terms) + worse_than_prior(metrics) + flags(metrics) + notes,
        "exit_status": EXIT_STATUS[metrics["verdict"]],
        "energy_calls": run.record["energy_calls"],
        "certificate_energy_calls": evidence.energy_calls,
        "certificate_energy_calls_by_side": {
            "policy": evidence.energy_calls - evidence.target_calls,
            "prior and target": evidence.target_calls,
        },
        "target_side": "importance" if evidence.climbed is None else "smc",
        "energy": [absolute_term(term) for term in terms] or None,
        "alpha": run.config.train.alpha,
        "steps": run.prior.chain.num_steps,
        "size": len(evidence.samples),
        "seed": config.seed,
    }
    return metrics, evidence


def _refuse(run: Run, size: int, until_decided: int | None) -> None:
    if run.prior.num_conditions > 1:
        raise ValueError(
            f"this run has {run.prior.num_conditions} conditions, each with a law of its own: certify every one of"
            " run.by_condition()."
        )
    if until_decided is not None and until_decided < size:
        raise ValueError(
            f"until_decided is {until_decided}, fewer than the {size} rollouts a side of the first look; give more, or a"
            " smaller size."
        )


def _draw(run: Run, energy: Energy, size: int, generator: torch.Generator, before: Evidence | None, progress: bool) -> Evidence:
    """``size`` fresh rollouts a side under a bar, and those from common starts where there is no evidence yet."""
    starts = STARTS if before is None else 0
    population = run.config.train.population
    if before is not None:
        population = "importance" if before.climbed is None else "smc"
    total = 2 * size + starts * ROLLOUTS * (run.prior.chain.start_std > 0)
    with progress_bar(total, "certificate", progress) as advance:
        return gather_evidence(
            run.prior,
            run.policy,
            energy,
            run.config.train.alpha,
            generator,
            size=size,
            starts=starts,
            rollouts=ROLLOUTS,
            population=population,
            bar=lambda total, label: counting_bar(total, label, progress),
            on_progress=advance,
        )


def _reference(run: Run, energy: Energy, seed: int) -> ReferencePaths | None:
    """Paths of the target's exact denoiser where the task knows it; what they cost is in no budget."""
    if run.task is None or run.task.reference is None:
        return None
    alpha = run.config.train.alpha
    try:
        exact = run.task.reference(run.config.prior, energy, alpha)
    except ValueError:  # the task's metrics say why
        return None
    if exact is None:
        return None
    generator = stream("reference", seed, run.prior.device)
    return reference_paths(run.prior, exact, run.policy, energy, alpha, generator)


def _judge(
    run: Run, energy: Energy, evidence: Evidence, tolerance: float, generator: torch.Generator, progress: bool
) -> dict[str, Any]:
    """All metrics of the evidence, with the verdict of its two sides, and the task's own in its place where there is one."""
    with progress_bar(2 if run.task is None else 4, "judging", progress) as advance:
        metrics = path_metrics(evidence)
        advance(1)
        verdict, reasons, own = judge_unknown(evidence, metrics, tolerance)
        advance(1)
        compared = {"verdict": verdict, "reasons": reasons, **own}
        more, judged_by = own.get("rollouts_to_decide"), "its two sides"
        for name in ("cell_tv", "cell_tv_se"):
            metrics["prior"][name] = own.get(f"prior_{name}", math.nan)
        metrics["gap_share_of_prior"] = metrics["gap"] / metrics["prior"]["gap"] if metrics["prior"]["gap"] else math.nan
        if run.task is not None:
            sides = {"verdict_unknown_truth": compared}
            try:
                metrics |= run.task.metrics(run.config.prior, evidence, energy, generator)
                judged_by = f"the task {run.task.name}"
                verdict, reasons = run.task.judge(metrics | sides)
            except ValueError as error:  # too few samples for one of the task's metrics are no bad input
                reasons = [*target_side_doubts(metrics), str(error)]
                verdict, reasons = fail_gross_misses("inconclusive", reasons, metrics | sides)
            advance(1)
            metrics["exact"] = _exact_metrics(run, run.task, evidence, energy, generator)
            by_prior = verdict == "inconclusive" and evidence.reference is None
            more = rollouts_to_trust(metrics, len(evidence.samples)) if by_prior else None
            advance(1)
    return metrics | {
        "verdict": verdict,
        "reasons": reasons,
        "judged_by": judged_by,
        "rollouts_to_decide": more,
        "verdict_unknown_truth": compared,
    }


def measure_deployment(
    run: Run, certificate: dict[str, Any], evidence: Evidence, energy: Energy | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """The certificate of `certify` with "deployed" beside the verdict: what plain diffusers loops around the policy give.

    energy: as in `certify`. Nothing of it is judged.
    """
    energy = run.energy() if energy is None else energy
    size = min(len(evidence.samples), DEPLOYED_SIZE)
    generator = stream("deployment", certificate["seed"], run.prior.device)
    total = size * len(deployed_samplers(run.prior))
    with threads(run.config.threads), progress_bar(total, "deployed samplers", progress and total > 0) as advance:
        deployed = deployment_metrics(run.policy, energy, evidence, generator, size, on_progress=advance)
    calls = certificate["certificate_energy_calls"] + total
    return certificate | {"deployed": deployed, "certificate_energy_calls": calls}


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


def _exact_metrics(run: Run, task: Task, evidence: Evidence, energy: Energy, generator: torch.Generator) -> dict[str, Any]:
    """The task's metrics of the policy's samples resampled by their weights, as `tiltune sample --exact` draws them."""
    effective = max(1, int(ess(evidence.log_weight) * len(evidence.samples)))
    index = systematic(evidence.log_weight.double().softmax(0), effective, generator)
    everything = torch.arange(len(evidence.target_energy), device=index.device)
    try:
        found = task.metrics(run.config.prior, evidence.resampled(index, everything), energy, generator)
    except ValueError as error:  # too few effective samples to say anything
        found = {"missing": str(error)}
    return {"effective": effective, **found}


def write_certificate(run: Run, metrics: dict[str, Any]) -> None:
    """certificate.json in the run's folder, whole at any moment."""
    replace_file(run.folder / "certificate.json", strict_json(metrics, indent=2) + "\n")
