"""Which trained steps of the chain the rows of a batch are at."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...samplers.chain import Chain


def step_share(chain: Chain) -> Float[Tensor, " kernels"]:
    """The share of rows at each trained step: half even, half by `Chain.sensitivity`.

    The narrow kernels at the end, where little is to be learned, hold nearly all of what a change of the network moves, in nats,
    and so nearly all of the noise of a gradient. With few rows there they drown what the others have to say.
    """
    moves = chain.sensitivity.float()
    return 0.5 * moves / moves.sum() + 0.5 / chain.num_kernels


def stratified(probability: Float[Tensor, " kernels"], count: int, generator: torch.Generator) -> Int[Tensor, " {count}"]:
    """``count`` indices drawn by ``probability``: one uniform draw, then equal strides.

    They are rows of a matrix of log-ratios; `Chain.step_of_row` gives their steps.
    """
    cumulative = probability.cumsum(0)
    first = torch.rand((), generator=generator, device=cumulative.device)
    points = (torch.arange(count, device=cumulative.device) + first) / count
    return torch.searchsorted(cumulative, points).clamp(max=len(probability) - 1)
