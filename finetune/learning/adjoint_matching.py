"""Adjoint Matching (arXiv 2409.08861), to compare with: regression on the energy's gradient, carried back along each trajectory.

    a_K = grad (E/alpha)(s_K),    a_k = (d mean_prior(s_k) / d s_k)^T a_{k+1},    loss = ½ mean sum_k |delta_k + sigma_k a_{k+1}|²

a is the lean adjoint: it follows the prior's drift, where the whole adjoint would follow the policy's. The trajectories are the
policy's own, and no gradient goes through a. It needs energies that torch can differentiate, through `Prior.to_data`, and
forgotten starts. Its fixed point is the tilted law in continuous time; a chain of K steps leaves an error, which objectives on
log-ratios do not have.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...samplers.denoiser import evaluate
from ...samplers.log_ratio import rows_of
from ...samplers.prior import Prior
from ...samplers.trajectory import Trajectories
from ..energies.energy import Energy
from .gradients import backward_likelihood


def lean_adjoint(prior: Prior, drawn: Trajectories, energy: Energy, alpha: float) -> Float[Tensor, "kernels batch *state"]:
    """a_{k+1} of every trained step k. K forward and backward passes through the prior.

    Errors: ValueError for an energy without a gradient.
    """
    chain = prior.chain
    with torch.enable_grad():
        last = drawn.terminal.detach().requires_grad_(True)
        value = energy(prior.to_data(last))
        if not value.requires_grad:
            raise ValueError("Adjoint Matching follows the energy's gradient, and torch finds none: the energy is a black box.")
        (adjoint,) = torch.autograd.grad(value.sum() / alpha, last)
        found: dict[int, Tensor] = {}
        for k in reversed(range(chain.trained[0], chain.num_steps)):
            found[k] = adjoint
            if k == chain.trained[0]:
                break
            state = drawn.states[k].detach().requires_grad_(True)
            mean = chain.kernel.mean(state, k, evaluate(prior.denoiser, chain, state, k, drawn.condition))
            (adjoint,) = torch.autograd.grad(mean, state, adjoint.to(mean))
    return torch.stack([found[k] for k in chain.trained])


def backward_adjoint_matching(
    policy: nn.Module, prior: Prior, drawn: Trajectories, adjoint: Float[Tensor, "kernels batch *state"], chunk: int
) -> Float[Tensor, ""]:
    """Accumulate the gradient of the loss on trajectories that hold the prior's outputs; returns the loss.

    Up to ½ |sigma a|² that is the negative log-ratio of next states that the prior would draw by the noise -sigma a.
    """
    chain, count = prior.chain, len(drawn)
    assert drawn.prior_outputs is not None
    total = torch.zeros((), device=prior.device)
    outputs, carried = drawn.prior_outputs.flatten(0, 1), adjoint.flatten(0, 1)
    for first in range(0, chain.num_kernels * count, chunk):
        rows = slice(first, first + chunk)
        state, _, step, condition = rows_of(drawn, chain, rows)
        wanted = -chain.kernel.std(step, state) * carried[rows]
        following = chain.kernel.sample(state, step, outputs[rows], wanted)
        weight = torch.full((len(state),), 1 / count).to(state)
        none = torch.zeros_like(weight)
        total += backward_likelihood(policy, chain, outputs[rows], state, following, step, weight, none, condition)
        total += 0.5 * wanted.square().sum() / count
    return total
