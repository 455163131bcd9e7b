"""Resample and move: copies that a resampling made become different samples of the same law (Gilks and Berzuini 2001).

Where few proposals carry the weight, `importance_resample` hands out many copies of each. A proposal is also a path of the prior,
by the noise from which the prior makes it, so that `Moves` at the target lead it on within the law that it stands for. All
samples move alike: if one copy of each proposal stayed, those that stay would be proposals without their weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from .moves import Moves
from .noise_paths import NoisePaths, noise_of
from .policy import Policy
from .proposals import without_nan
from .resampling import Resampled
from .shapes import Index
from .trajectory import Trajectories, concatenate

SWEEPS = 3  # where some samples are copies of others
NUMBERS = 2**24  # of states that move at once


def move(
    policy: Policy,
    log_potential: Callable[[Float[Tensor, " batch *data"]], Shaped[Tensor, " batch"]],
    drawn: Resampled,
    generator: torch.Generator,
    sweeps: int,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Float[Tensor, " n *data"], Bool[Tensor, " n"]]:
    """(samples, whether each differs from its proposal) after ``sweeps`` of `Moves` on the samples of ``drawn``.

    log_potential: as it was drawn with, `PARTS` a sample and sweep. on_progress: receives the number of potentials just asked
    for. The sizes of the moves adapt in all sweeps but the last; this adds a bias of order 1 / (number of samples).
    """
    prior = policy.prior
    samples, moved = drawn.samples.clone(), torch.zeros_like(drawn.index, dtype=torch.bool)
    at_once = max(1, NUMBERS // ((prior.chain.num_steps + 1) * math.prod(prior.shape)))

    def reward(some: Trajectories) -> Float[Tensor, " batch"]:
        potential = log_potential(prior.to_data(some.terminal)).to(drawn.log_potential)
        if on_progress is not None:
            on_progress(len(some))
        return without_nan(potential)

    moves = Moves()
    for part in torch.split(torch.arange(len(samples), device=samples.device), at_once):
        paths = _paths(policy, drawn, drawn.index[part])
        # Kernels that are not deterministic can choose another candidate the second time: such a path is not the proposal.
        again = torch.isclose(prior.to_data(paths.states[-1]), samples[part], rtol=1e-3, atol=1e-3).flatten(1).all(1)
        value, before = drawn.log_potential[drawn.index[part]], paths.states[-1]
        for sweep in range(sweeps):
            paths, value = moves.sweep(prior, paths, value, reward, generator, adapt=sweep < sweeps - 1)
        differs = again & (paths.states[-1] != before).flatten(1).any(1)
        moved[part] = differs
        samples[part[differs]] = prior.to_data(paths.states[-1][differs])
    return samples, moved


def _paths(policy: Policy, drawn: Resampled, proposal: Index) -> NoisePaths:
    """These proposals as paths of the prior."""
    found: list[Trajectories] = []
    places: list[Index] = []
    for part in drawn.parts:
        mine = ((part.first <= proposal) & (proposal < part.first + part.size)).nonzero()[:, 0]
        if len(mine):
            found.append(part.again(policy).select(proposal[mine] - part.first))
            places.append(mine)
    return noise_of(policy.prior, concatenate(found).select(torch.cat(places).argsort()))
