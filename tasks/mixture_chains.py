"""The chains of the mixture task, and its shipped priors on them: MLPs, one a noise process. Imports no torch by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..samplers.chain import Chain
    from ..samplers.prior import Prior
    from .gaussian_mixture import GaussianMixture

DATA = Path(__file__).parent / "data"
CHAINS = ("ddpm", "ddim", "flow", "brownian")
PROCESS = {"ddpm": "vp", "ddim": "vp", "flow": "flow", "brownian": "brownian"}
# Units in which each process runs. DDPM's large variance is exact for data of unit variance (the mixture's is 50.3): in raw
# units the K = 50 chain starves the outer modes by 10%.
SCALE = {"vp": 50.3**0.5, "flow": 1.0, "brownian": 1.0}
# Steps that an equal stretch of log(signal/noise) gets on 'ddpm'. Policy and prior differ between 0 and 2.2 (all but .02 of
# the path's 1.2 nats, by the exact denoisers), and the spread of a mode is made between 1 and 3: steps go where either is.
STEP_PROFILE = (
    (-1.3, 0.0, 0.6, 1.2, 1.8, 2.4, 3.0, 3.6, 4.2, 4.8),
    (0.3, 0.6, 1.05, 1.7, 2.4, 2.2, 1.15, 0.5, 0.15, 0.1),
)
DEFAULT_STEPS = {"ddpm": 50, "ddim": 50, "flow": 50, "brownian": 100}


def shipped_reference() -> dict[str, Any]:
    """Figures of the exact posterior denoiser by chain, and ``w2_exact`` (`data/make_reference` measures them)."""
    return json.loads((DATA / "reference.json").read_text())


def build_chain(name: str, num_steps: int | None = None) -> Chain:
    """The task's chains: 'ddpm' (large variance, cosine, steps placed), 'ddim' (eta = 1), 'flow' (the memoryless SDE) and
    'brownian'. 'ddpm' places its steps by `STEP_PROFILE`.

    Errors: ValueError for an unknown name or a number of steps that the scheduler cannot take.
    """
    if name not in CHAINS:
        raise ValueError(f"unknown chain {name!r}; the mixture task has {', '.join(CHAINS)}.")
    steps = DEFAULT_STEPS[name] if num_steps is None else num_steps
    from ..samplers.schedulers.brownian import brownian_chain
    from ..samplers.schedulers.dispatch import chain_from_scheduler
    from ..samplers.schedulers.placement import place_timesteps

    if name == "brownian":
        return brownian_chain(steps)
    from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

    vp = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}
    if name == "ddpm":
        scheduler = DDPMScheduler(variance_type="fixed_large", **vp)
        levels = (STEP_PROFILE[0][0], STEP_PROFILE[0][-1])
        placed = place_timesteps(scheduler, steps, log_snr=levels, profile=STEP_PROFILE, power=1.0)
        return chain_from_scheduler(scheduler, timesteps=placed)
    if name == "ddim":
        return chain_from_scheduler(DDIMScheduler(timestep_spacing="trailing", **vp), steps, eta=1.0)
    return chain_from_scheduler(FlowMatchEulerDiscreteScheduler(), steps, noise="memoryless")


def shipped_prior(name: str, chain: Chain) -> Prior:
    """The shipped MLP prior of a chain's noise process, with that chain."""
    from ..samplers.mlp import MLPDenoiser
    from ..samplers.prior import Prior

    folder = DATA / f"mixture_{PROCESS[name]}"
    network = MLPDenoiser.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    said = (f"{chain.name}, K = {chain.num_steps}",)
    return Prior(network, chain, (2,), to_data(name), data_variance=data_variance(name), decisions=said)


def to_data(name: str) -> Callable[[Tensor], Tensor] | None:
    """State → paper coordinates: the variance-preserving chains run in units of `SCALE`, the others in the paper's own."""
    scale = SCALE[PROCESS[name]]
    return None if scale == 1.0 else lambda state: state * scale


def in_states(mixture: GaussianMixture, name: str) -> GaussianMixture:
    """A mixture in paper coordinates → the same in the states of a chain."""
    from .gaussian_mixture import GaussianMixture

    scale = SCALE[PROCESS[name]]
    return GaussianMixture(mixture.weights, mixture.means / scale, mixture.covariances / scale**2)


def data_variance(name: str) -> float:
    """Variance of the prior's samples in the states of a chain, in each coordinate."""
    from .mixture_target import prior_mixture

    return round(in_states(prior_mixture(), name).moments()[1].diagonal().max().item(), 2)
