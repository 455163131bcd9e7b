"""Resample and move: copies that a resampling made become different samples of the same law (Gilks and Berzuini 2001).

Where few proposals carry the weight, `importance_resample` hands out many copies of each. A proposal is also a path of the prior,
by the noise from which the prior makes it, so that `Moves` at the target lead it on within the law that it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from .moves import PARTS, Moves
from .noise_paths import NoisePaths, noise_of
from .policy import Policy
from .prior import Prior
from .resampling import Resampled
from .rollout import rollout
from .trajectory import Trajectories

SWEEPS = 3  # where some samples are copies of others


def move(
    policy: Policy,
    log_potential: Callable[[Float[Tensor, " batch *data"]], Shaped[Tensor, " batch"]],
    drawn: Resampled,
    generator: torch.Generator,
    sweeps: int,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Float[Tensor, " n *data"], Bool[Tensor, " n"]]:
    """(samples, whether each has moved) after ``sweeps`` of `Moves` on the samples of ``drawn``.

    log_potential: as it was drawn with, `PARTS` a sample and sweep. on_progress: receives the number of potentials just asked
    for. The sizes of the moves adapt in all sweeps but the last; what that costs in exactness falls with the number of samples.
    """
    prior, paths = policy.prior, _paths(policy, drawn)
    value, before = drawn.log_potential[drawn.index], paths.states[-1]

    def reward(some: Trajectories) -> Float[Tensor, " batch"]:
        potential = log_potential(prior.to_data(some.terminal)).to(value)
        if on_progress is not None:
            on_progress(len(some))
        return potential.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)

    moves = Moves()
    for sweep in range(sweeps):
        paths, value = moves.sweep(prior, paths, value, reward, 1.0, generator, adapt=sweep < sweeps - 1)
    return prior.to_data(paths.states[-1]), (paths.states[-1] != before).flatten(1).any(1)


def potentials_asked(count: int, sweeps: int) -> int:
    """What `move` asks for ``count`` samples."""
    return count * sweeps * PARTS


def _paths(policy: Policy, drawn: Resampled) -> NoisePaths:
    """The proposals that were chosen, rolled out again from their noise, so that the others need not be kept."""
    prior: Prior = policy.prior
    again = torch.Generator(device=prior.device)
    found: list[NoisePaths] = []
    places: list[Tensor] = []
    for part, state in enumerate(drawn.noise):
        mine = (drawn.index // drawn.batch == part).nonzero()[:, 0]
        if not len(mine):
            continue
        again.set_state(state)
        first = part * drawn.batch
        paths = rollout(prior, policy, min(drawn.batch, len(drawn.log_weight) - first), again)
        found.append(noise_of(prior, paths.select(drawn.index[mine] - first)))
        places.append(mine)
    order = torch.cat(places).argsort()
    states, noise = (torch.cat([getattr(one, name) for one in found], 1)[:, order] for name in ("states", "noise"))
    return NoisePaths(states, noise, prior.condition(len(order)))
