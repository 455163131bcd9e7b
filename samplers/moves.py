"""Moves of whole prior paths that leave p_prior(path) · exp(reward(sample)) as it is: Metropolis on the reward alone.

A proposal of `crank_nicolson` is reversible for the prior's law over paths, so that it is accepted with probability
min(1, exp(reward' - reward)): no density of any step and no gradient is needed, and acceptance does not fall merely because the
dimension grows. A move from an early step changes what a sample is, one from a late step its details, and the sizes that
suit both differ: each part of the chain has one of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from .noise_paths import NoisePaths, crank_nicolson
from .prior import Prior
from .trajectory import Trajectories
from .typed import integers

PARTS = 8  # of the chain
ACCEPTED = 0.3  # share of proposals that the sizes aim at
SMALLEST, LARGEST = 1e-3, 1.0
GAIN = 1.5  # of the logarithm of a size on the share above `ACCEPTED`

Reward = Callable[[Trajectories], Float[Tensor, " batch"]]  # nats, -E/alpha; -inf is zero density


class Moves:
    """Sizes of moves, and how they went.

    size, accepted: of moves from each part of the chain; accepted: the share in the last sweep.
    """

    def __init__(self) -> None:
        self.size = torch.full((PARTS,), 0.5, dtype=torch.float64)
        self.accepted = torch.zeros(PARTS, dtype=torch.float64)

    def sweep(
        self,
        prior: Prior,
        paths: NoisePaths,
        value: Float[Tensor, " batch"],
        reward: Reward,
        generator: torch.Generator,
        *,
        adapt: bool = True,
    ) -> tuple[NoisePaths, Float[Tensor, " batch"]]:
        """One move of every path from a random step of each part of the chain, in random order: `PARTS` rewards a path.

        value: the rewards of ``paths``. Returns the paths after the moves and their rewards. adapt: let the sizes follow the
        share that is accepted. A sweep of fixed sizes leaves the law exactly as it is, one that adapts but for O(1 / N).
        """
        order = torch.randperm(PARTS, generator=generator, device=generator.device)
        for part in integers(order):
            proposed = crank_nicolson(prior, paths, self._step(prior, part, generator), self.size[part].item(), generator)
            theirs = reward(proposed.trajectories)
            log_ratio = (theirs - value).nan_to_num(nan=-math.inf)  # from zero density to zero density: stay
            uniform = torch.rand(len(value), generator=generator, device=value.device)
            accepted = uniform.log() < log_ratio
            paths, value = paths.replaced(accepted, proposed), torch.where(accepted, theirs, value)
            share = accepted.double().mean().item()
            self.accepted[part] = share
            if adapt:
                size = self.size[part].item() * math.exp(GAIN * (share - ACCEPTED))
                self.size[part] = min(max(size, SMALLEST), LARGEST)
        return paths, value

    def _step(self, prior: Prior, part: int, generator: torch.Generator) -> int:
        """A step of this part of the chain, as far as noise follows; short chains have several parts of the same step."""
        steps = 1 + max(k for k in range(prior.chain.num_steps) if not prior.chain.noiseless(k))
        first = part * steps // PARTS
        stop = max(first + 1, (part + 1) * steps // PARTS)
        return int(torch.randint(first, stop, (), generator=generator, device=generator.device))
