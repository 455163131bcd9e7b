"""Random streams, one for each purpose: nothing is judged by the noise that it was trained on.

Torch's generator on the CPU reads the low 32 bits of a seed. An offset of 2**62, say, is none there.
"""

from __future__ import annotations

from typing import Literal

import torch

Purpose = Literal["training", "samples", "resampling", "judging", "certificate", "deployment", "reference"]
OFFSETS: dict[Purpose, int] = {
    "training": 0,
    "samples": 2**28,
    "resampling": 2**29,
    "judging": 2**30,
    "certificate": 2**31,
    "deployment": 2**31 + 2**30,
    "reference": 2**31 + 2**29,
}


def seed_for(purpose: Purpose, seed: int) -> int:
    """The seed of this purpose's generator, below 2**32."""
    return (seed + OFFSETS[purpose]) % 2**32


def stream(purpose: Purpose, seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for this purpose; the same seed gives other numbers for another one."""
    return torch.Generator(device).manual_seed(seed_for(purpose, seed))
