"""Calibrate the verdicts: python tests/calibrate.py [certificates] [name ...]

Exact samplers give the false alarm rate, planted failures the power.
Known truth: a pool of rollouts of each planted sampler on the default 'ddpm' chain against the shipped prior, bootstrapped into
certificates of the size that `tiltune 2d` uses. Its two-sided verdict is beside it. About 15 minutes on one core.
Two sides alone: certificates of several sizes on held-out mixtures (`calibrate_unknown`), printed as a table; 25 minutes.
The names are those of `planted`, "exact samples", and "mixtures"; all without any.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import calibrate_unknown
from tiltune.finetune.certificate.criteria import judge_known
from tiltune.finetune.certificate.evidence import Evidence, gather_evidence
from tiltune.finetune.certificate.path_metrics import path_metrics
from tiltune.finetune.certificate.verdict import judge_unknown
from tiltune.samplers.chain import Chain
from tiltune.tasks.gaussian_mixture import GaussianMixture, MixtureDenoiser
from tiltune.tasks.metrics.known_truth import MODE_SAMPLES, W2_SETS, W2_SIZE, mode_spreads, mode_tv, w2_sets
from tiltune.tasks.mixture_chains import build_chain, in_states, shipped_prior, shipped_reference
from tiltune.tasks.mixture_target import MODE_VARIANCE, energy, prior_mixture, target_mixture

POOL, SIZE, W2_POOL = 80_000, 40_000, 80


def keep_modes(kept: Tensor) -> GaussianMixture:
    """The target with only some of its modes, renormalized."""
    truth = target_mixture()
    weights = truth.weights[kept]
    return GaussianMixture(weights / weights.sum(), truth.means[kept], truth.covariances[kept])


def mistaken_target() -> GaussianMixture:
    """p25 · exp(exp(-E)): what a density handed over as a reward aims at."""
    prior = prior_mixture()
    logits = (-energy(prior.means)).exp()
    return GaussianMixture((prior.weights.log() + logits).softmax(0), prior.means, prior.covariances)


def planted() -> dict[str, GaussianMixture]:
    """What each sampler aims at. The first is the truth; the lost mode is one of the lightest, the hardest to miss."""
    index = torch.arange(9)
    return {
        "exact denoiser": target_mixture(),
        "one mode of nine lost": keep_modes(index != 0),
        "temperature off by 1.5": target_mixture(alpha=1.5),
        "mode spreads 20% too wide": target_mixture(variance=MODE_VARIANCE * 1.2**2),
        "mode spreads 20% too narrow": target_mixture(variance=MODE_VARIANCE * 0.8**2),
        "only modes (0,0) and (5,0)": keep_modes((index == 4) | (index == 7)),
        "double exponentiation": mistaken_target(),
    }


def pool(name: str, chain: Chain) -> Evidence:
    """Rollouts of a planted sampler, as the closed-form denoiser of what it aims at."""
    policy = MixtureDenoiser(in_states(planted()[name], "ddpm"), chain)
    generator = torch.Generator().manual_seed(0)
    return gather_evidence(shipped_prior("ddpm", chain), policy, energy, 1.0, generator, size=POOL)


def rates(evidence: Evidence, samples: Tensor, bootstraps: int) -> dict[str, float]:
    """Shares of fail and inconclusive verdicts over ``bootstraps`` certificates; samples [POOL, 2] of the sampler."""
    generator = torch.Generator().manual_seed(1)
    truth = target_mixture()
    reference = shipped_reference()
    own_w2 = w2_sets(samples.double(), truth.sample(W2_POOL * W2_SIZE, generator), W2_POOL)
    count = {"known fail": 0, "known inconclusive": 0, "unknown fail": 0, "unknown inconclusive": 0}

    def draw(size: int, total: int) -> Tensor:
        return torch.randint(total, (size,), generator=generator)

    for index in range(bootstraps):
        chosen = draw(SIZE, POOL)
        again = evidence.resampled(chosen, draw(SIZE, POOL))
        metrics = path_metrics(again)
        x = samples[chosen]
        sets = draw(W2_SETS, W2_POOL)
        metrics |= {
            "mode_tv": mode_tv(x[:MODE_SAMPLES], truth),
            "mode_spread_error": (mode_spreads(x, truth) - 1).abs().nan_to_num(nan=torch.inf).max().item(),
            "w2_ratio": own_w2[sets].mean().item() / reference["w2_exact"]["mean"],
            "log_z_error": abs(metrics["log_z"] - reference["ddpm"]["log_z_forward"]),
            "gap_reference": reference["ddpm"]["gap"],
        }
        known = judge_known(metrics)[0]
        unknown = judge_unknown(again, metrics, seed=index)[0]
        for kind, verdict in (("known", known), ("unknown", unknown)):
            if verdict != "pass":
                count[f"{kind} {verdict}"] += 1
    return {key: value / bootstraps for key, value in count.items()}


def main(bootstraps: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    chain = build_chain("ddpm")
    path = Path(__file__).with_name("calibration.json")
    found = json.loads(path.read_text()) if path.exists() else {}

    def record(name: str, measure: Callable[[], dict[str, float]]) -> None:
        if not names or name in names:
            found[name] = {"bootstraps": bootstraps, **measure()}
            print(f"{name:<28} {found[name]}", flush=True)
            path.write_text(json.dumps(found, indent=2) + "\n")

    def exact_samples() -> dict[str, float]:
        # Exact terminal samples with the path metrics of the exact denoiser: no chain's bias in what is judged.
        evidence = pool("exact denoiser", chain)
        return rates(evidence, target_mixture().sample(POOL, torch.Generator().manual_seed(2)), bootstraps)

    record("exact samples", exact_samples)
    for name in planted():

        def planted_rates(name: str = name) -> dict[str, float]:
            evidence = pool(name, chain)
            return rates(evidence, evidence.samples, bootstraps)

        record(name, planted_rates)
    if not names or "mixtures" in names:
        calibrate_unknown.main(bootstraps)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200, sys.argv[2:])
