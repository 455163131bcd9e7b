"""The scheduler that a folder is run with: its own, as its pipeline would run it, or another one on its config."""

from __future__ import annotations

from typing import Any, cast

from .folder import Layout, load_scheduler

SCHEDULERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "euler_ancestral": "EulerAncestralDiscreteScheduler"}


def scheduler_of(layout: Layout, other: str | None, variance: str | None) -> Any:
    """The folder's scheduler, as its pipeline would run it, or another one on its config; with the variance asked for."""
    import diffusers

    scheduler: Any = load_scheduler(layout.scheduler)
    wanted = SCHEDULERS[other] if other is not None else "DDIMScheduler" if layout.pipeline == "DDIMPipeline" else None
    if wanted is not None and type(scheduler).__name__ != wanted:
        if other is not None and "beta_schedule" not in scheduler.config:
            name = type(scheduler).__name__
            raise ValueError(f"scheduler {other} needs a diffusion's betas, and {name} has none; leave it out.")
        # Latents have no range to be clipped to, and some schedulers clip where a config does not say.
        unsaid = {"clip_sample": False} if layout.decoder is not None and "clip_sample" not in scheduler.config else {}
        scheduler = getattr(diffusers, wanted).from_config(scheduler.config, **unsaid)
    if variance is None:
        return scheduler
    if type(scheduler).__name__ != "DDPMScheduler":
        raise ValueError(f"variance={variance!r} is DDPMScheduler's choice; {type(scheduler).__name__} has none, leave it out.")
    return cast(Any, type(scheduler)).from_config(scheduler.config, variance_type=variance)


def refuse_unused(scheduler: Any, eta: float, noise: str, noise_level: float) -> None:
    """Errors: ValueError for an option that this scheduler would ignore."""
    name = type(scheduler).__name__
    if eta != 1.0 and name != "DDIMScheduler":
        raise ValueError(f"eta={eta:g} is DDIM's noise, and this prior has a {name}; leave eta out, or take the scheduler ddim.")
    flow = name == "FlowMatchEulerDiscreteScheduler" and not scheduler.config.stochastic_sampling
    if (noise, noise_level) != ("memoryless", 0.7) and not flow:
        raise ValueError(f"noise={noise!r} makes a deterministic flow stochastic, and this prior's {name} is none; leave it out.")
