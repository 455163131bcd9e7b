"""The 25 → 9 mode task of the RTB paper (arXiv 2405.20971, section 5.1): a known prior, a known target, log Z = 0.

p25: equal modes on {-10, -5, 0, 5, 10}², covariance 0.3 I. p9: nine of them, unequally weighted.
E = log p25 - log p9, so that at alpha = 1 the tilted prior is p9 exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..samplers.chain import Chain
from .gaussian_mixture import GaussianMixture

if TYPE_CHECKING:
    from ..samplers.prior import Prior

DATA = Path(__file__).parent / "data"
MODE_VARIANCE = 0.3
TARGET_MODES = {
    (-10, -5): 4,
    (-5, -10): 10,
    (-5, 0): 4,
    (10, -5): 5,
    (0, 0): 10,
    (0, 5): 5,
    (5, -5): 4,
    (5, 0): 15,
    (5, 10): 4,
}
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


def _isotropic(weights: Tensor, means: Tensor, variance: float = MODE_VARIANCE) -> GaussianMixture:
    covariance = variance * torch.eye(2, dtype=torch.float64)
    return GaussianMixture(weights / weights.sum(), means, covariance.expand(len(means), 2, 2))


def prior_mixture() -> GaussianMixture:
    """p25."""
    axis = torch.arange(-10.0, 11.0, 5.0, dtype=torch.float64)
    return _isotropic(torch.ones(25, dtype=torch.float64), torch.cartesian_prod(axis, axis))


def target_mixture(alpha: float = 1.0, variance: float = MODE_VARIANCE) -> GaussianMixture:
    """p25 (p9 / p25)^(1/alpha), normalized: nine modes weighted (1/25) (25 v)^(1/alpha).

    Exact at alpha = 1; elsewhere up to the mass between modes, `tilt_error`.
    """
    means = torch.tensor(list(TARGET_MODES), dtype=torch.float64)
    share = torch.tensor(list(TARGET_MODES.values()), dtype=torch.float64)
    return _isotropic((share / share.sum()) ** (1 / alpha), means, variance)


def energy(x: Tensor) -> Tensor:
    """E(x) = log p25(x) - log p9(x), nats; x [N, 2] → [N]."""
    return prior_mixture().log_density(x) - target_mixture().log_density(x)


def ideal_log_z(alpha: float = 1.0) -> float:
    """log of the integral of p25 (p9/p25)^(1/alpha): 0 at alpha = 1. On a grid of step 0.05 otherwise."""
    return 0.0 if alpha == 1.0 else _grid(alpha)[0]


def tilt_error(alpha: float) -> float:
    """Total variation between the true tilted law and `target_mixture(alpha)`, on a grid of step 0.05."""
    return 0.0 if alpha == 1.0 else _grid(alpha)[1]


@cache
def _grid(alpha: float) -> tuple[float, float]:
    axis = torch.arange(-14.0, 14.0, 0.05, dtype=torch.float64) + 0.025
    points = torch.cartesian_prod(axis, axis)
    log_density = prior_mixture().log_density(points) - energy(points) / alpha
    log_z = (log_density.logsumexp(0) + 2 * torch.log(torch.tensor(0.05, dtype=torch.float64))).item()
    gap = log_density.softmax(0) - target_mixture(alpha).log_density(points).softmax(0)
    return log_z, 0.5 * gap.abs().sum().item()


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


def load_prior(name: str, chain: Chain) -> Prior:
    """The shipped MLP prior of a chain's noise process, with that chain."""
    from ..samplers.mlp import MLPDenoiser
    from ..samplers.prior import Prior

    folder = DATA / f"mixture_{PROCESS[name]}"
    network = MLPDenoiser.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    return Prior(network, chain, (2,), to_data(name))


def to_data(name: str) -> Callable[[Tensor], Tensor] | None:
    """State → paper coordinates: the variance-preserving chains run in units of `SCALE`, the others in the paper's own."""
    scale = SCALE[PROCESS[name]]
    return None if scale == 1.0 else lambda state: state * scale


def in_states(mixture: GaussianMixture, name: str) -> GaussianMixture:
    """A mixture in paper coordinates → the same in the states of a chain."""
    scale = SCALE[PROCESS[name]]
    return GaussianMixture(mixture.weights, mixture.means / scale, mixture.covariances / scale**2)
