"""What the two estimates of the soft value are worth at each step, by values alone.

With h_k the ratio of tilted to prior density at step k, and any function f of the state (Donsker and Varadhan 1983),

    E_tilted[f(s_k)] - log E_prior[exp f(s_k)] <= KL(tilted || prior) of s_k,        with equality at f = log h_k + const

So the best mixture f = a · classifier + b · cumulants is the one that this is largest for, on paths of the population that the
networks have not seen. It is concave in a and b. No network but the value's own is evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...samplers.shapes import Index
from ..estimators import effective_number
from ..populations.population import Population
from .path_data import PathData
from .soft_value import SoftValue, importance_weight

EXPECTED, SPREAD = 0.5, 0.3  # of each estimate's factor before anything is measured: Gaussian
ROWS = 8192  # states at once


class Calibration(NamedTuple):
    """log h_k = Σ factor_k · estimates - offset_k, nats.

    factor: by state of the chain and estimate. offset: by state and condition. nats: of KL(tilted || prior) that log h accounts
    for at each state, in the mean over conditions.
    """

    factor: Float[Tensor, "states 2"]
    offset: Float[Tensor, "states conditions"]
    nats: Float[Tensor, " states"]


class Sides(NamedTuple):
    """Of one condition: its paths, and their weights toward the tilted law and the prior, of sum 1 each."""

    path: Index
    tilted: Float[Tensor, " n"]
    plain: Float[Tensor, " n"]


@torch.no_grad()
def calibrate(
    soft_value: SoftValue, data: PathData, population: Population, alpha: float, on_progress: Callable[[], None] | None = None
) -> Calibration:
    """At the temperature ``alpha`` that the networks have learned at, from the first trained step to what the last one leads to.

    Where few paths are effective, the factors stay near `EXPECTED`. on_progress: called after each step of the chain.
    """
    group, chain, count = population.trajectories.group, data.prior.chain, len(population)
    states, path = chain.last_trained + 2, torch.arange(count, device=group.device)
    estimates = torch.zeros(states, count, 2, dtype=torch.float64, device=group.device)
    for k in range(chain.trained[0], states):
        for some in torch.split(path, ROWS):
            step = torch.full_like(some, k)
            estimates[k, some] = soft_value.estimates(data(step, some), step, some, 1.0, group[some]).double()
        if on_progress:
            on_progress()
    tilted, plain = (importance_weight(population, each).double() for each in (alpha, math.inf))
    groups = population.trajectories.groups
    sides = [Sides(index, *(weight[index] / weight[index].sum() for weight in (tilted, plain))) for index in groups]
    factor = _best(estimates, sides, effective_number(population.log_weight(alpha), groups))
    log_h = torch.einsum("kne,ke->kn", estimates, factor)
    offset = torch.stack([_log_mean(log_h[:, side.path], side.plain) for side in sides], 1)
    nats = torch.stack([log_h[:, side.path] @ side.tilted for side in sides], 1) - offset
    return Calibration(factor.float(), offset.float(), nats.mean(1).float())


def _log_mean(value: Float[Tensor, "states n"], weight: Float[Tensor, " n"]) -> Float[Tensor, " states"]:
    return (value + weight.log()).logsumexp(1)


def _best(estimates: Float[Tensor, "states n 2"], sides: list[Sides], effective: float) -> Float[Tensor, "states 2"]:
    """The factors of the largest bound, less what they are from `EXPECTED`; all steps at once, since none sees another."""
    parts = [(estimates[:, side.path], side) for side in sides]
    factor = torch.full((len(estimates), 2), EXPECTED, dtype=torch.float64, device=estimates.device, requires_grad=True)
    search = torch.optim.LBFGS([factor], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Float[Tensor, ""]:
        search.zero_grad()
        with torch.enable_grad():
            far = 0.5 * (factor - EXPECTED).square().sum() / (SPREAD**2 * effective)
            for each, side in parts:
                value = torch.einsum("kne,ke->kn", each, factor)
                far = far - (value @ side.tilted - _log_mean(value, side.plain)).sum() / len(parts)
            far.backward()  # pyright: ignore[reportUnknownMemberType]
        return far.detach()

    search.step(loss)  # pyright: ignore[reportUnknownMemberType]
    return factor.detach()
