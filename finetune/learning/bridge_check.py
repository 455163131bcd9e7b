"""Whether a path's end may stand in for its next state: what the prior's own paths say at E = 0.

The mean of s_{k+1} given s_k and the path's end, c s_k + d x, has the kernel's own mean on average only as far as the network is
the exact denoiser of the chain's ends; for an s_k noised anew from the end, also as far as the chain reverses its noising. Where
it has not, a likelihood of such next states moves the policy away from the prior even at E = 0, where it should stay.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ...samplers.bridge import bridge_of
from ...samplers.condition import selected
from ...samplers.denoiser import evaluate
from ...samplers.prior import Prior
from ...samplers.trajectory import Trajectories, rows_at_once
from ...samplers.typed import symmetric_pinv
from .rows import states_of

PATHS = 400  # prior paths that are asked


@torch.no_grad()
def bridge_bias(prior: Prior, paths: Trajectories, fresh: float, generator: torch.Generator) -> float:
    """Nats of KL(prior || policy) by which bridged next states are sure to move a policy at E = 0; about 0 where none do.

    fresh: share of the states that are noised anew from their path's end.

    z = (c s_k + d x - mu) / sigma should be 0 on average at every state. At each step it is regressed on x_hat, on the state and
    on a constant, on each half of ``paths``; sum_k E[<r, z> - ½ |r|²] of that regression r on the other half is the gain in
    likelihood of a policy that follows it. It is a lower bound, since r is only linear, and below 0 by its noise where there is
    nothing to find.
    """
    chain, states, condition = prior.chain, paths.states[:, :PATHS], selected(paths.condition, slice(0, PATHS))
    count, bridge = states.shape[1], bridge_of(chain)
    rows = rows_at_once(prior.shape, prior.device)
    total = 0.0
    for k in chain.trained:
        features: list[Tensor] = []
        residuals: list[Tensor] = []
        for first in range(0, count, rows):
            some = slice(first, first + rows)
            path = torch.arange(count, device=states.device)[some]
            step = torch.full_like(path, k)
            state, end = states_of(chain, states, path, step, fresh, generator), states[-1, some]
            output = evaluate(prior.denoiser, chain, state, step, selected(condition, some))
            sigma = chain.kernel.std(step, state)
            residuals.append((bridge.mean(state, end, step) - chain.kernel.mean(state, step, output)) / sigma)
            features.append(torch.stack([chain.kernel.clean(state, step, output), state, torch.ones_like(state)]))
        feature, z = torch.cat(features, 1).flatten(2).double(), torch.cat(residuals).flatten(1).double()
        halves = slice(0, count // 2), slice(count // 2, count)
        total += sum(_gain(feature, z, learned, judged) for learned, judged in (halves, halves[::-1])) / count
    return total


def _gain(feature: Float[Tensor, " 3 n d"], z: Float[Tensor, " n d"], learned: slice, judged: slice) -> float:
    """Σ over the rows ``judged`` of <r, z> - ½ |r|², for the regression of z on feature on the rows ``learned``."""
    own = torch.einsum("ind,jnd->ij", feature[:, learned], feature[:, learned])
    along = torch.einsum("ind,nd->i", feature[:, learned], z[learned])
    r = torch.einsum("i,ind->nd", symmetric_pinv(own) @ along, feature[:, judged])
    return (r * z[judged]).sum().item() - 0.5 * r.square().sum().item()
