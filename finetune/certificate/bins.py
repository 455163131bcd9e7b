"""Numbers cut into ranges of equal share."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

BINS = 10


def filled(energy: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Energies in float64 on the CPU; invalid ones fall into the highest bin, as forbidden ones do."""
    return energy.double().cpu().nan_to_num(nan=math.inf, posinf=math.inf)


def weighted_quantiles(value: Float[Tensor, " n"], weight: Float[Tensor, " n"], count: int) -> Float[Tensor, " {count-1}"]:
    """The edges that cut a weighted sample into equal shares."""
    ordered, order = value.sort()
    cumulative = weight[order].cumsum(0) / weight.sum()
    points = torch.arange(1, count, dtype=cumulative.dtype) / count
    return ordered[torch.searchsorted(cumulative, points).clamp(max=len(value) - 1)]
