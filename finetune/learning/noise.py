"""The random numbers of one process."""

from __future__ import annotations

from typing import Any

import torch

from ...samplers.streams import Purpose, stream


class Noise:
    """A generator whose state belongs to the last complete step.

    Each process has a seed of its own: a shared one would give all of them the same trajectories.
    """

    def __init__(self, seed: int, rank: int, device: torch.device) -> None:
        self.seed = seed * 1_000_003 + rank
        self.generator = stream("training", self.seed, device)
        self.settle()

    def fresh(self, purpose: Purpose) -> torch.Generator:
        """Another generator, the same whenever it is asked for."""
        return stream(purpose, self.seed, self.generator.device)

    def reseed(self, global_step: int) -> None:
        """Go on with other noise, as on another number of processes."""
        self.generator.manual_seed((self.seed + global_step * 1009) % 2**32)
        self.settle()

    def settle(self) -> None:
        """A step is complete: `state_dict` is of now."""
        self._settled = self.generator.get_state()

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._settled}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.generator.set_state(state_dict["generator"])
        self.settle()
