"""Moments of a law that is known, for the metrics that compare moments."""

import torch
from torch import Tensor

from tiltune.tasks.metrics.moments import Moments


def exact_moments(mean: Tensor, spread: Tensor) -> Moments:
    """Known ones: mean, spread [P]."""
    zero = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    return Moments(mean.double(), spread.double(), zero, zero)
