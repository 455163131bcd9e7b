"""Measure what the mixture task ships beside its priors: python -m tiltune.tasks.data.make_reference {step_kl,reference}

step_kl: KL per step of the exact posterior denoiser against the exact prior denoiser on 200 steps even in log-SNR; the
'ddpm' chain places its steps by it. reference: the figures of the exact posterior denoiser against the shipped prior on
the same chain (docs/theory.md, "The reference"), 100k rollouts a side, for the default chains.
"""

from __future__ import annotations

import json
import sys

import torch

from ...finetune.certificate import gather_evidence, path_figures
from ...samplers.policy import Prior
from ...samplers.rollout import rollout
from ...samplers.schedulers import chain_from_scheduler, place_timesteps
from ..gaussian_mixture import MixtureDenoiser
from ..mixture import (
    CHAINS,
    DATA,
    DEFAULT_STEPS,
    LOG_SNR,
    build_chain,
    energy,
    in_states,
    load_prior,
    prior_mixture,
    target_mixture,
)

KEPT = ("log_z_forward", "log_z_forward_se", "elbo", "elbo_se", "eubo", "eubo_se", "gap", "gap_se", "ess", "pareto_k")


def step_kl() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        variance_type="fixed_large",
    )
    wide = (LOG_SNR[0] - 0.5, LOG_SNR[1] + 0.6)
    chain = chain_from_scheduler(scheduler, timesteps=place_timesteps(scheduler, 200, log_snr=wide))
    prior = Prior(MixtureDenoiser(in_states(prior_mixture(), "ddpm"), chain), chain, (2,))
    policy = MixtureDenoiser(in_states(target_mixture(), "ddpm"), chain)
    ratios = rollout(prior, policy, 20_000, torch.Generator().manual_seed(0)).step_log_ratio
    assert ratios is not None
    kl = ratios.mean(1)
    level = (chain.signal / chain.noise).log()[: chain.num_kernels]
    smooth = torch.nn.functional.avg_pool1d(kl[None, None], 5, 1, 2)[0, 0]
    content = {"log_snr": [round(v, 4) for v in level.tolist()], "kl": [round(max(v, 0.0), 6) for v in smooth.tolist()]}
    (DATA / "step_kl.json").write_text(json.dumps(content) + "\n")
    print(f"path KL {kl.sum():.3f} nats over {chain.num_kernels} kernels")


def reference(names: list[str]) -> None:
    path = DATA / "reference.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        chain = build_chain(name)
        policy = MixtureDenoiser(in_states(target_mixture(), name), chain)
        generator = torch.Generator().manual_seed(0)
        evidence = gather_evidence(load_prior(name, chain), policy, energy, 1.0, generator, size=100_000, starts=2)
        figures = path_figures(evidence)
        found[name] = {"steps": DEFAULT_STEPS[name], "rollouts": 100_000, **{k: round(figures[k], 5) for k in KEPT}}
        print(name, found[name], flush=True)
        path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "step_kl":
        step_kl()
    else:
        reference(sys.argv[2:] or list(CHAINS))
