"""Measure the reference that results are quoted against: python -m tiltune.tasks.data.make_reference [chain ...]

The certificate of the exact posterior denoiser against the shipped prior on the same chain (docs/theory.md, "The reference"),
100k rollouts a side, for the default chains; and W2 between exact sample sets. About ten minutes on one core.
"""

from __future__ import annotations

import json
import sys

import torch

from ...finetune.certificate.evidence import gather_evidence
from ...finetune.certificate.path_metrics import path_metrics
from ...finetune.estimators import mean
from ..gaussian_mixture import MixtureDenoiser
from ..metrics.known_truth import W2_SIZE, w2_sets
from ..mixture_chains import CHAINS, DATA, DEFAULT_STEPS, build_chain, in_states, shipped_prior
from ..mixture_target import energy, target_mixture

SIZE = 100_000
KEPT = ("log_z_forward", "log_z_forward_se", "elbo", "elbo_se", "eubo", "eubo_se", "gap", "gap_se", "ess", "pareto_k")


def measure(name: str) -> dict[str, float]:
    """Path metrics of the exact posterior denoiser on a default chain."""
    chain = build_chain(name)
    policy = MixtureDenoiser(in_states(target_mixture(), name), chain)
    generator = torch.Generator().manual_seed(0)
    evidence = gather_evidence(shipped_prior(name, chain), policy, energy, 1.0, generator, size=SIZE, starts=3)
    metrics = path_metrics(evidence)
    return {key: round(metrics[key], 5) for key in KEPT}


def exact_w2(pairs: int = 400) -> dict[str, float]:
    """W2 between two exact sample sets of 1000, over 400 pairs: 40 pairs would leave 4% on every ratio to it."""
    generator = torch.Generator().manual_seed(0)
    first, second = (target_mixture().sample(pairs * W2_SIZE, generator) for _ in range(2))
    value, error = mean(w2_sets(first, second, pairs))
    return {"pairs": pairs, "mean": round(value, 5), "se": round(error, 5)}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    path = DATA / "reference.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if not names:
        found["w2_exact"] = exact_w2()
    for name in names or CHAINS:
        found[name] = {"steps": DEFAULT_STEPS[name], "rollouts": SIZE, **measure(name)}
        print(name, found[name], flush=True)
        path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
