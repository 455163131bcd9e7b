"""Inpainting: a few pixels of an image are measured with noise, and the posterior over whole images is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..finetune.energies.energy import Energy
from ..finetune.energies.likelihoods import linear_measurement

REGIONS = ("upper", "box")


def measured_pixels(region: str, size: int, every: int) -> Tensor:
    """[size, size] bool: the 'upper' half or the middle 'box' of half the side, of both every ``every``-th row and column.

    Errors: ValueError for an unknown region or a thinning below 1.
    """
    if region not in REGIONS:
        raise ValueError(f"unknown region {region!r}; what is measured is one of {', '.join(REGIONS)}.")
    if every < 1:
        raise ValueError(f"every is {every}; measure every pixel of the region (1), every second row and column (2), and so on.")
    quarter = size // 4
    rows, columns = (range(0, size // 2, every), range(0, size, every))
    if region == "box":
        rows = columns = range(quarter, size - quarter, every)
    measured = torch.zeros(size, size, dtype=torch.bool)
    measured[torch.tensor(rows)[:, None], torch.tensor(columns)] = True
    return measured


@dataclass(frozen=True, eq=False)
class Inpainting:
    """A measurement and its energy: E(x) = sum over measured pixels of (x - value)² / (2 std²).

    image: [1, H, W] what was measured. measured: [1, H, W] bool. std: of the noise, in pixel units. value: [1, H, W] what
    was seen, 0 where nothing was.
    """

    image: Tensor
    measured: Tensor
    std: float
    value: Tensor

    @cached_property
    def _likelihood(self) -> Energy:
        return linear_measurement(self.measured, self.value, self.std)

    def __call__(self, x: Tensor) -> Tensor:
        return self._likelihood(x)

    def residual(self, x: Tensor) -> Tensor:
        """Measured pixels of images [B, 1, H, W] less what was seen, in units of the noise: [B, measured]."""
        return (x - self.value.to(x))[:, self.measured.to(x.device)] / self.std


def measure(image: Tensor, region: str, std: float, *, every: int, seed: int) -> Inpainting:
    """Measure an image [1, H, W] once, with noise of standard deviation ``std`` drawn from ``seed``.

    Errors: ValueError for an unknown region, or a noise that is not positive and finite.
    """
    measured = measured_pixels(region, image.shape[-1], every)[None]
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    value = torch.where(measured, image + std * noise, 0.0)
    problem = Inpainting(image, measured, std, value)
    _ = problem._likelihood  # refuses a wrong std here, not at the first sample
    return problem
