"""Which trained steps of the chain are looked at, where not all of them are."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...samplers.chain import Chain
from ...samplers.shapes import Index, States


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


def sampled_steps(
    chain: Chain,
    batch: int,
    share: float,
    generator: torch.Generator,
    probability: Float[Tensor, " kernels"] | None = None,
) -> tuple[Index, Float[Tensor, " n"]]:
    """(rows, weight) of this share of the steps of each of ``batch`` trajectories: flat (k, b), k slowest, in order.

    Each trajectory draws its own G steps by ``probability``, `step_share` where None, at equal strides from a start of its own.
    weight is 1 / (G p_k), so that the weighted sum over them has the sum over all steps as its mean.
    """
    probability = (step_share(chain) if probability is None else probability).to(generator.device)
    count = max(1, round(share * chain.num_kernels))
    first = torch.rand((1, batch), generator=generator, device=generator.device)
    points = (torch.arange(count, device=generator.device)[:, None] + first) / count
    kernel = torch.searchsorted(probability.cumsum(0), points).clamp(max=chain.num_kernels - 1)
    row = (kernel * batch + torch.arange(batch, device=generator.device)).flatten().sort().values
    return row, 1 / (count * probability[row // batch])


def states_of(
    chain: Chain,
    states: Float[Tensor, " states batch *state"],
    path: Index,
    step: Index,
    fresh: float,
    generator: torch.Generator,
) -> States:
    """States at ``step`` of paths ``path``: a share ``fresh`` noised anew from the path's end."""
    stored = states[step, path]
    around = (-1, *[1] * (stored.ndim - 1))
    signal, noise = (column.to(stored)[step].view(around) for column in (chain.signal, chain.noise))
    anew = signal * states[-1, path] + noise * torch.randn(stored.shape, generator=generator, device=stored.device)
    chosen = torch.rand(len(step), generator=generator, device=stored.device) < fresh
    return torch.where(chosen.view(around), anew, stored)
