"""Estimators of one gradient, that of KL(policy || tilted law) over paths, each with what it costs in network evaluations.

A trajectory costs 2 K evaluations to draw, policy and prior, and each of its steps that is learned from 3 more: one forward
pass, and a backward pass, which takes about two. Notation: l_k is the log-ratio of step k, delta_k its shift, eps_k the noise it
drew, B the number of trajectories.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...finetune.learning.adjoint_matching import backward_adjoint_matching, lean_adjoint
from ...finetune.learning.gradients import backward_likelihood, backward_trajectories
from ...finetune.learning.objectives import ahead_of
from ...finetune.learning.rows import sampled_steps
from ...samplers.denoiser import evaluate
from ...samplers.log_ratio import rows_of
from ...samplers.policy import Policy
from ...samplers.rollout import rollout
from ...samplers.trajectory import Trajectories
from .problem import Problem

ROLLOUT, ROW = 2, 3  # network evaluations of a step that is drawn, and of one that is learned from
ADJOINT = 2  # of one that an adjoint is carried back along: forward and backward by the state alone
CHUNK = 2048

Weights = Callable[[Tensor, Tensor], Tensor]  # ([kernels, B] of l, [B] of E) → [kernels, B], by which log policy is weighted


@dataclass(frozen=True)
class Estimator:
    """label: in tables. weights: None for those with a backward pass of their own. share: of the steps that are learned from;
    even: drawn with equal chances. unbiased: whether it has the mean of the others."""

    label: str
    weights: Weights | None
    share: float = 1.0
    even: bool = False
    unbiased: bool = True


def others(value: Tensor) -> Tensor:
    """Less the mean of the other trajectories, over B: the weights of an average."""
    count = value.shape[-1]
    return (value - value.mean(-1, keepdim=True)) / (count - 1)


def whole_path(ratio: Tensor, energy: Tensor) -> Tensor:
    """x = Λ + E, which is constant at the optimum: log-variance, and REINFORCE-KL with leave-one-out."""
    return others(ratio.sum(0) + energy).expand_as(ratio)


def to_go(ratio: Tensor, energy: Tensor) -> Tensor:
    """Step k answers for l_k and what follows it. What came before is noise to it; but the sum is no longer constant."""
    return others(ahead_of(ratio) + energy)


def no_baseline(ratio: Tensor, energy: Tensor) -> Tensor:
    """x itself."""
    return ((ratio.sum(0) + energy) / len(energy)).expand_as(ratio)


ESTIMATORS = {
    "whole": Estimator("whole path, all steps", whole_path),
    "quarter": Estimator("whole path, a quarter of the steps by sensitivity", whole_path, 0.25),
    "quarter_even": Estimator("whole path, a quarter of the steps evenly", whole_path, 0.25, even=True),
    "tenth": Estimator("whole path, a tenth of the steps by sensitivity", whole_path, 0.1),
    "to_go": Estimator("what is still to come, all steps", to_go),
    "split": Estimator("split: exact KL, energy by REINFORCE, all steps", None),
    "no_baseline": Estimator("no baseline, all steps", no_baseline),
    "adjoint": Estimator("Adjoint Matching (another loss; gradients of E)", None, unbiased=False),
}


def estimate(name: str, problem: Problem, policy: Policy, count: int, generator: torch.Generator) -> int:
    """Accumulate one estimate on the policy's weights; returns the network evaluations that it takes."""
    estimator, chain = ESTIMATORS[name], problem.prior.chain
    drawn = rollout(problem.prior, policy, count, generator, keep_outputs=estimator.weights is None)
    assert drawn.step_log_ratio is not None
    energy = problem.energy(problem.prior.to_data(drawn.terminal)).float()
    spent = ROLLOUT * chain.num_steps * count
    if estimator.weights is None:
        if name == "adjoint":
            adjoint = lean_adjoint(problem.prior, drawn, problem.energy, problem.alpha)
            backward_adjoint_matching(policy, problem.prior, drawn, adjoint, CHUNK)
            return spent + (ROW + ADJOINT) * chain.num_kernels * count
        _backward_split(problem, policy, drawn, energy)
        return spent + ROW * chain.num_kernels * count
    g = estimator.weights(drawn.step_log_ratio, energy)
    sampled = None
    if estimator.share < 1:
        even = torch.full((chain.num_kernels,), 1 / chain.num_kernels) if estimator.even else None
        sampled = sampled_steps(chain, count, estimator.share, generator, even)
    backward_trajectories(policy, chain, drawn, g, CHUNK, sampled=sampled)
    return spent + ROW * (g.numel() if sampled is None else len(sampled[0]))


def _backward_split(problem: Problem, policy: Policy, drawn: Trajectories, energy: Tensor) -> None:
    """The KL in closed form at each step, and REINFORCE for what step k does to what follows.

        gradient = mean over b of sum_k (delta_k + c_k eps_k) · grad delta_k,    c_k = E + sum_{j>k} ½ |delta_j|² less the others'

    c_k follows from delta at all steps, which the rollout knows; here they are computed once more, and not counted.
    """
    chain, count = problem.prior.chain, len(drawn)
    assert drawn.prior_outputs is not None
    state, following, step, _ = rows_of(drawn, chain, slice(None))
    prior_output = drawn.prior_outputs.flatten(0, 1)
    with torch.no_grad():
        shift = chain.kernel.shift(state, step, evaluate(policy, chain, state, step, None), prior_output)
        drawn_noise = chain.kernel.standardize(following, state, step, prior_output) - shift
        noised = chain.kernel.sample(state, step, prior_output, drawn_noise)
        kl = (0.5 * shift.flatten(1).square().sum(1)).view(chain.num_kernels, count)
        later = ahead_of(kl) - kl
        cost = others(energy + later).flatten()
    weight = torch.full((len(state),), 1 / count, device=state.device)
    for first in range(0, len(state), CHUNK):
        rows = slice(first, first + CHUNK)
        of = prior_output[rows], state[rows], noised[rows], step[rows], weight[rows], (weight + cost)[rows]
        backward_likelihood(policy, chain, *of)
