"""Measure the reference that results are quoted against: python -m tiltune.tasks.data.make_reference [chain ...]

The figures of the exact posterior denoiser against the shipped prior on the same chain (docs/theory.md, "The reference"),
100k rollouts a side, for the default chains. About ten minutes on one core.
"""

from __future__ import annotations

import json
import sys

import torch

from ...finetune.certificate import gather_evidence, path_figures
from ..gaussian_mixture import MixtureDenoiser
from ..mixture import CHAINS, DATA, DEFAULT_STEPS, build_chain, energy, in_states, load_prior, target_mixture

SIZE = 100_000
KEPT = ("log_z_forward", "log_z_forward_se", "elbo", "elbo_se", "eubo", "eubo_se", "gap", "gap_se", "ess", "pareto_k")


def measure(name: str) -> dict[str, float]:
    """Path figures of the exact posterior denoiser on a default chain."""
    chain = build_chain(name)
    policy = MixtureDenoiser(in_states(target_mixture(), name), chain)
    generator = torch.Generator().manual_seed(0)
    evidence = gather_evidence(load_prior(name, chain), policy, energy, 1.0, generator, size=SIZE, starts=3)
    figures = path_figures(evidence)
    return {key: round(figures[key], 5) for key in KEPT}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    path = DATA / "reference.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        found[name] = {"steps": DEFAULT_STEPS[name], "rollouts": SIZE, **measure(name)}
        print(name, found[name], flush=True)
        path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:] or list(CHAINS))
