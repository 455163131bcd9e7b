"""What a chain is built with: how many steps or which, and what the scheduler's own config does not say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

LastStep = Literal["prior"] | float


@dataclass(frozen=True)
class Options:
    """The arguments of `chain_from_scheduler` beside the scheduler.

    Errors: ValueError for a number of steps or timesteps that no chain has.
    """

    num_steps: int | None
    timesteps: Sequence[float] | None
    eta: float
    noise: Literal["flow_grpo", "memoryless"]
    noise_level: float
    last_step: LastStep

    def __post_init__(self) -> None:
        if (self.num_steps is None) == (self.timesteps is None):
            raise ValueError(
                "give exactly one of num_steps (evenly spaced by the scheduler) or timesteps (your own, descending)."
            )
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; a chain has at least one step.")
        if self.timesteps is not None and not len(self.timesteps):
            raise ValueError("timesteps is empty; a chain has at least one step.")
        if self.timesteps is not None and any(b >= a for a, b in pairwise(self.timesteps)):
            raise ValueError("timesteps must be strictly descending: sampling runs from noise (large t) to data.")


def refuse_custom_timesteps(scheduler: Any, options: Options) -> None:
    """Errors: ValueError for custom timesteps, for a scheduler that takes none."""
    if options.timesteps is not None:
        raise ValueError(
            f"{type(scheduler).__name__} takes no custom timesteps; place steps with DDPMScheduler or"
            " FlowMatchEulerDiscreteScheduler."
        )
