"""What is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .refusals import refuse, refuse_other_choices


@dataclass(frozen=True)
class PolicyConfig:
    """What is trained; it starts exactly at the prior."""

    kind: Literal["full", "lora", "residual"] = "full"
    """A full copy, low-rank adapters on the prior's own weights, or the frozen prior plus a second network of its size."""
    rank: int = 8
    """Of the adapters."""
    targets: tuple[str, ...] = ()
    """Names, or endings of names, of the layers that get adapters. None given: every layer larger than its adapter."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    def __post_init__(self) -> None:
        refuse_other_choices(self)
        refuse(self.rank < 1, f"rank is {self.rank}; adapters have at least rank 1.")
        refuse(
            bool(self.targets) and self.kind != "lora",
            f"targets names layers for adapters, but the policy is {self.kind!r}; choose 'lora', or leave targets out.",
        )
