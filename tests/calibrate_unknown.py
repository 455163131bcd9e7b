"""The rates of the verdict by the two sides alone, on held-out mixtures: part of `python tests/calibrate.py`.

Each row is a kind of sampler, each column a number of rollouts a side, and each entry pools three dimensions and two mixtures in
each. Certificates are bootstrapped from a pool of exact samples a sampler, or of rollouts of the exact denoiser.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from tiltune.finetune.certificate.criteria import EXIT_STATUS
from tiltune.finetune.certificate.evidence import Evidence
from tiltune.finetune.certificate.path_metrics import path_metrics
from tiltune.finetune.certificate.verdict import judge_unknown
from toys.held_out_mixtures import DIMENSIONS, HeldOut, certificate, held_out, planted, rollouts

COUNTS = Path(__file__).with_name("calibration_unknown.json")
SIZES = (300, 1000, 4000, 20_000)
SEEDS = (0, 1)
POOL = 80_000
EXACT = "exact denoiser"
NOISE = 0.75  # of the paths' log-ratio: an effective share of .57, that of exact denoisers on chains of 50 to 100 steps


def counted(pool: Evidence, size: int, certificates: int) -> Counter[str]:
    """Verdicts over ``certificates`` of ``size`` rollouts a side; "thick": those with 300 effective target samples."""
    generator, count = torch.Generator().manual_seed(size), Counter[str]()
    for index in range(certificates):
        evidence = pool.resampled(*torch.randint(len(pool.samples), (2, size), generator=generator))
        metrics = path_metrics(evidence)
        verdict = judge_unknown(evidence, metrics, seed=index)[0]
        count.update([verdict, *([f"thick {verdict}", "thick"] if metrics["target_ess"] >= 300 else [])])
    return count


def exact_on_a_chain(task: HeldOut) -> Evidence:
    """The exact denoiser on K = 50 steps of DDPM, with the chain's own bias in its samples."""
    return rollouts(task, task.target(), POOL // 2)


def exact_samples(task: HeldOut, name: str, noise: float) -> Evidence:
    """The `certificate` of a planted sampler, to be bootstrapped."""
    return certificate(task, planted(task)[name], POOL, noise, torch.Generator().manual_seed(0))


def samplers() -> Iterable[tuple[str, Callable[[HeldOut], Evidence]]]:
    """What is measured: (row of the table, task → its pool)."""
    for noise in (0.0, NOISE, 1.4):
        yield f"exact, path noise {noise:g}", lambda task, noise=noise: exact_samples(task, EXACT, noise)
    yield "exact denoiser, K = 50", exact_on_a_chain
    for name in planted(held_out(DIMENSIONS[0])):
        if name != EXACT:
            yield name, lambda task, name=name: exact_samples(task, name, NOISE)


def main(certificates: int) -> None:
    """``certificates`` of each size a row, spread over dimensions and mixtures; prints the table and keeps the counts."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    each = max(1, certificates // (len(DIMENSIONS) * len(SEEDS)))
    print("| sampler | " + " | ".join(f"{size:,} a side" for size in SIZES) + " |")
    print("|---" * (1 + len(SIZES)) + "|")
    for row, of in samplers():
        total = {size: Counter[str]() for size in SIZES}
        for dim in DIMENSIONS:
            for seed in SEEDS:
                pool = of(held_out(dim, seed))
                for size in SIZES:
                    total[size] += counted(pool, size, each)
        found[row] = {str(size): dict(count) for size, count in total.items()}
        COUNTS.write_text(json.dumps(found, indent=2) + "\n")
        print(f"| {row} | " + " | ".join(map(shown, total.values())) + " |", flush=True)


def shown(count: Counter[str]) -> str:
    """pass / fail / inconclusive in percent."""
    total = sum(count[verdict] for verdict in EXIT_STATUS)
    return " / ".join(f"{100 * count[verdict] / total:.1f}" for verdict in EXIT_STATUS)
