"""The chain of the tasks whose prior is a closed form of unit variance."""

from __future__ import annotations

from ..samplers.chain import Chain
from ..samplers.schedulers.dispatch import chain_from_scheduler

TIMESTEPS = 1000  # of the scheduler; a chain has at most so many steps


def cosine_chain(steps: int) -> Chain:
    """DDPM with large variance, which is exact for data of unit variance, from pure noise: cosine, v_prediction, no clipping.

    v_prediction is well-conditioned at both ends: the output is the noise where there is little, and the sample where there is
    nothing else.
    """
    from diffusers import DDPMScheduler

    if not 2 <= steps <= TIMESTEPS:
        raise ValueError(f"steps is {steps}; this chain takes 2 to {TIMESTEPS} of them.")
    scheduler = DDPMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        variance_type="fixed_large",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    return chain_from_scheduler(scheduler, steps)
