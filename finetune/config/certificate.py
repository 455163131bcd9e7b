"""How a result is judged."""

from __future__ import annotations

from dataclasses import dataclass

from .refusals import refuse


@dataclass(frozen=True)
class CertificateConfig:
    """How the result is judged."""

    size: int = 4000
    """Fresh rollouts a side. The verdict needs 300 effective ones among the weighted prior's."""
    seed: int = 0
    """Of these rollouts, which share no noise with the training's."""
    tolerance: float = 0.05
    """How far the share of a region or of a range of energies may be off for a pass, where only the two sides are compared."""

    def __post_init__(self) -> None:
        refuse(self.size < 100, f"certificate size is {self.size}; fewer than 100 rollouts a side show nothing.")
        refuse(self.seed < 0, f"certificate seed is {self.seed}; it must not be negative.")
        refuse(
            not 0 < self.tolerance < 1,
            f"certificate tolerance is {self.tolerance}; it is a difference of shares, between 0 and 1, such as 0.05.",
        )
