"""Twisted proposals: at every step the policy proposes several next states, and a value of states chooses one.

A Gaussian kernel of few large steps cannot be the tilted prior's, whatever its mean: log h_{k+1}, which tells where it should
bend, is not linear within one step's noise. So of M candidates one is taken with probability in proportion to exp(u_m), where u
is any function, and the weight of the trajectory is multiplied by mean_m exp(u_m) / exp(u_chosen). This leaves the weight's
expectation what it was for the policy alone, for every u (twisted particle filters, Whiteley and Lee 2014; the estimate of the
proposal's own normalizer as in Andrieu and Roberts 2009). Here u = strength · (value(s_{k+1}) - log-ratio of the step).

Where ``value`` is log h, strength 1 is best as M grows. Where it is a poor estimate, or the policy's kernels leave nothing to
gain, choosing by it adds variance. So the strength is measured (`strength_of`) on trajectories of strength 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .denoiser import evaluate
from .policy import Policy
from .rollout import draw_start, step, step_noise
from .shapes import States
from .trajectory import Trajectories

OUTLIER = 8.0  # interquartile ranges below the median, from where on a log-weight has no part in measuring the strength


class Twisted(NamedTuple):
    """trajectories: their ``log_behavior`` is what the log-weight subtracts, the choice among candidates included.

    noise: sum over steps of value - log-ratio of the chosen candidate, above the mean of all.
    """

    trajectories: Trajectories
    noise: Float[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class Twist:
    """value: (states s_k, k) → an estimate of log h_k = log E_prior[exp(log_potential) | s_k], nats, up to a constant for each k.
    candidates: how many next states each step chooses from.

    Errors: ValueError for fewer than two candidates.
    """

    value: Callable[[States, int], Float[Tensor, " n"]]
    candidates: int

    def __post_init__(self) -> None:
        if self.candidates < 2:
            raise ValueError(f"{self.candidates} candidates leave no choice; give 2 or more, 16 say.")

    @torch.no_grad()
    def rollout(self, policy: Policy, strength: float, batch: int, generator: torch.Generator, *, keep: bool = True) -> Twisted:
        """``batch`` trajectories; one policy and one prior evaluation a step, ``candidates`` of the value. keep: False keeps only
        the terminal states. Strength 0 is the policy's own law."""
        prior, kernel = policy.prior, policy.prior.chain.kernel
        chain, condition = prior.chain, prior.condition(batch)
        state = draw_start(prior, batch, generator)
        states = state.new_empty((chain.num_steps + 1 if keep else 1, *state.shape))  # in place, as `rollout` does
        states[0] = state
        ratios = list[Tensor]()
        chosen_by, noise = state.new_zeros(batch), state.new_zeros(batch)
        each = torch.arange(batch, device=state.device)
        for k in range(chain.num_steps):
            if k not in chain.trained:
                state = step(prior, None, state, k, step_noise(chain, k, state, generator), condition).following
            else:
                prior_output = evaluate(prior.denoiser, chain, state, k, condition)
                output = evaluate(policy, chain, state, k, condition)
                shift = kernel.shift(state, k, output, prior_output)
                candidates, ratio = list[Tensor](), list[Tensor]()
                for _ in range(self.candidates):
                    drawn = step_noise(chain, k, state, generator)
                    assert drawn is not None  # a trained step has noise
                    candidates.append(kernel.sample(state, k, output, drawn))
                    ratio.append(kernel.log_ratio_from_noise(drawn, shift))
                above = torch.stack([self.value(one, k + 1) for one in candidates]) - torch.stack(ratio)
                above = above - above.mean(0)
                choice = torch.multinomial((strength * above).T.softmax(1), 1, generator=generator)[:, 0]
                state, own = torch.stack(candidates)[choice, each], above[choice, each]
                ratios.append(torch.stack(ratio)[choice, each])
                chosen_by += strength * own - (strength * above).logsumexp(0) + math.log(self.candidates)
                noise += own
            if keep:
                states[k + 1] = state
        states[-1] = state
        log_ratio = torch.stack(ratios)
        behavior = log_ratio.sum(0) + chosen_by
        return Twisted(Trajectories(states, step_log_ratio=log_ratio, log_behavior=behavior, condition=condition), noise)


def strength_of(log_weight: Float[Tensor, " n"], noise: Float[Tensor, " n"]) -> float:
    """The strength between 0 and 1 that takes most variance from these log-weights of strength 0: the slope of their regression
    on ``noise``, which has mean zero given the state at every step, whatever the value is."""
    known = log_weight.isfinite()
    if known.sum() < 2:
        return 0.0
    weight, ours = log_weight[known].double(), noise[known].double()
    low, middle, high = (weight.quantile(share) for share in (0.25, 0.5, 0.75))
    kept = weight >= middle - OUTLIER * (high - low)
    weight, ours = weight[kept] - weight[kept].mean(), ours[kept] - ours[kept].mean()
    own = ours.square().sum().item()
    return min(max((weight * ours).sum().item() / own, 0.0), 1.0) if own > 0 else 0.0
