"""The chain of a diffusers scheduler, read through its public fields only. What does not fit a table is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

from ..chain import Chain
from .ddim import ddim_chain
from .ddpm import ddpm_chain
from .euler_ancestral import euler_ancestral_chain
from .flow import flow_chain
from .options import LastStep, Options

BUILDERS: dict[str, Callable[[Any, Options], Chain]] = {
    "DDPMScheduler": ddpm_chain,
    "DDIMScheduler": ddim_chain,
    "EulerAncestralDiscreteScheduler": euler_ancestral_chain,
    "FlowMatchEulerDiscreteScheduler": flow_chain,
}


def chain_from_scheduler(
    scheduler: Any,
    num_steps: int | None = None,
    *,
    timesteps: Sequence[float] | None = None,
    eta: float = 1.0,
    noise: Literal["flow_grpo", "memoryless"] = "memoryless",
    noise_level: float = 0.7,
    last_step: LastStep = "prior",
) -> Chain:
    """The chain of a diffusers scheduler, run with ``num_steps`` steps or with custom ``timesteps`` (descending).

    eta: DDIM's noise (its own argument of ``step``). noise, noise_level: the SDE of a flow-matching scheduler.
    last_step: what a noiseless last step becomes, 'prior' (it belongs to the prior) or a sigma shared by both.
    Custom timesteps: DDPM takes integers below ``num_train_timesteps``; flow matching takes sigma · 1000.

    Errors: ValueError for a scheduler, an option or a row that the table cannot hold.
    """
    options = Options(num_steps, timesteps, eta, noise, noise_level, last_step)
    name = type(scheduler).__name__
    if name not in BUILDERS:
        raise ValueError(
            f"{name} does not fit a one-step Gaussian chain (multistep and deterministic solvers have no kernel density)."
            f" Use one of {', '.join(sorted(BUILDERS))}; most checkpoints load with"
            " DDPMScheduler.from_config(scheduler.config) or DDIMScheduler with eta > 0."
        )
    scheduler = copy.deepcopy(scheduler)
    if getattr(scheduler.config, "thresholding", False):
        raise ValueError(
            f"{name} has thresholding=True: a per-sample quantile is not a table row, and its kernel is not Gaussian around"
            " a fixed function of the output. Set thresholding=False (clip_sample=True is supported)."
        )
    return BUILDERS[name](scheduler, options)
