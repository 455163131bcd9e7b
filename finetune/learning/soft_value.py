"""The soft value of a state, learned on the population: log h_k(s) = log E_prior[exp(-E/alpha) | s_k = s] - log Z, nats.

h_k is the density ratio of tilted to prior states at step k, so a classifier of the two estimates it: with w the population's
weights of mean 1, the minimum of E[w softplus(-f) + softplus(f)] is f = log h_k. Two networks, each trained on half of the
population: `of_paths` and `calibrate` judge a path by the one that has not seen its energy. They do not see the state itself but
what the prior expects of the data there, x_hat (`estimated_data`).

The same networks give a second estimate: the first two cumulants of -E/alpha given the state, m and v, by least squares, so
that log h ≈ m + v/2 + const. It learns from the energies of all paths, where the classifier learns from the few that have weight,
and is exact where E given s is Gaussian. `calibrate` finds out how much of each to follow.

It is the baseline of `reinforce_kl`, where an error in it costs variance only, and the control variate of the forward KL, where
an error also counts as far as that phase's shortcuts (bridged means, states noised anew) miss the chain's own law:
docs/theory.md says how far.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from ...samplers.prior import Prior
from ...samplers.shapes import Index, States
from ...samplers.trajectory import Trajectories
from ...samplers.typed import backward, forked_rng
from ..populations.population import Population
from .path_data import PathData
from .value_network import ValueNetwork

WAVES = 64
SEES = "x_hat"  # what the networks are functions of
BATCH, LEARNING_RATE, WEIGHT_DECAY = 512, 2e-3, 0.3
VARIANCE_SHARE = 0.3  # of the squared error of the variance beside that of the mean
DEEPEST = 30.0  # nats below the best path of the population, beyond which one is as bad as another
LARGEST = math.log(60.0)  # h is bounded above: where it is larger the population holds too few states to know it


class SoftValue:
    """log h_k(s), by the mean of two networks; a path of the population is judged by the one that has not seen it (``half``).

    times: the temperature at which the networks have learned, over the target's. It is above 1 where too few paths are effective
    at the target's (`temperature_within_reach`), and what was learned is then continued to it.
    """

    def __init__(self, networks: tuple[ValueNetwork, ValueNetwork], half: Int[Tensor, " batch"], times: float = 1.0) -> None:
        self.networks, self.half, self.times = networks, half, times

    def state_dict(self) -> dict[str, Any]:
        networks = [network.state_dict() for network in self.networks]
        return {"networks": networks, "half": self.half, "times": self.times, "sees": SEES}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], shape: tuple[int, ...], steps: int, device: torch.device) -> SoftValue:
        """The soft value whose `state_dict` this is, on states of this shape, up to the step ``steps``.

        Errors: ValueError for one of an earlier version, which saw the states themselves.
        """
        if state.get("sees") != SEES:
            raise ValueError("the soft value is one of an earlier version of tiltune, which judged by other inputs; train anew.")
        networks: list[ValueNetwork] = []
        for weights in state["networks"]:
            with forked_rng():
                network = ValueNetwork(shape, steps, spread=weights["spread"], waves=weights["waves"].shape[1])
            network.load_state_dict(weights)
            networks.append(network.to(device).eval().requires_grad_(False))
        return cls((networks[0], networks[1]), state["half"].to(device), state["times"])

    @torch.no_grad()
    def __call__(self, data: States, step: Index, group: Index | None = None) -> Float[Tensor, " n"]:
        """Nats, for states that no path of the population has; ``data``: x_hat there."""
        values = [network(data, step, group) for network in self.networks]
        return (0.5 * self.times * (values[0] + values[1])).clamp(max=LARGEST)

    def along(self, trajectories: Trajectories, prior: Prior) -> Float[Tensor, "kernels batch"]:
        """Nats, of the states that the trained steps of such trajectories lead from."""
        data, group = PathData(prior, trajectories), trajectories.group
        path = torch.arange(len(trajectories), device=group.device)
        return torch.stack(
            [self(data(step, path), step, group) for step in (torch.full_like(path, k) for k in prior.chain.trained)]
        )

    @torch.no_grad()
    def of_paths(self, data: States, step: Index, path: Index, group: Index | None = None) -> Float[Tensor, " n"]:
        """The same for states of (or noised from the end of) the population's paths ``path``."""
        values = [network(data, step, group) for network in self.networks]
        return (self.times * self._unseen(values[0], values[1], path)).clamp(max=LARGEST)

    def _unseen(
        self, first: Float[Tensor, " n *heads"], second: Float[Tensor, " n *heads"], path: Index
    ) -> Float[Tensor, " n *heads"]:
        """Of the networks' answers those of the one that has not seen the path; the mean for paths that came after both."""
        half = torch.where(path < len(self.half), self.half[path.clamp(max=len(self.half) - 1)], 2)
        half = half.view(-1, *[1] * (first.ndim - 1))
        return torch.where(half == 0, second, torch.where(half == 1, first, 0.5 * (first + second)))

    def estimates(
        self, data: States, step: Index, path: Index | None, times: float, group: Index | None = None
    ) -> Float[Tensor, " n 2"]:
        """log h by classification and by cumulants (up to a constant), with a graph; ``path`` as in `of_paths`.

        times: 1 for the temperature at which the networks have learned, ``self.times`` for the target's.
        """
        first, second = (network.estimates(data, step, times, group) for network in self.networks)
        if path is None:
            return 0.5 * (first + second)
        return self._unseen(first, second, path)


def importance_weight(population: Population, alpha: float) -> Float[Tensor, " batch"]:
    """Of the population's paths toward the tilted law, or the prior where ``alpha`` is infinite; of mean 1 within each
    condition."""
    if math.isinf(alpha) and population.log_proposal is None:
        return torch.ones_like(population.energy)
    return population.weight(alpha).float() * len(population.trajectories)


def standardized(population: Population, alpha: float) -> tuple[Float[Tensor, " batch"], Float[Tensor, " conditions"]]:
    """-E/alpha of the population's paths with mean 0 and standard deviation 1 within each condition; those deviations.

    Cut at `DEEPEST` nats below the best: a few huge penalties would otherwise be all that there is to regress on. What has no
    finite energy counts as the worst that has one.
    """
    everything, spreads = population.log_tilt(alpha), list[float]()
    standard = torch.empty_like(everything)
    for index in population.trajectories.groups:
        reward = everything[index]
        finite = reward[reward.isfinite()]
        reward = reward.clamp(min=max(finite.min().item(), finite.max().item() - DEEPEST))
        spreads.append(max(reward.std().item(), 1e-6) if len(reward) > 1 else 1.0)
        standard[index] = (reward - reward.mean()) / spreads[-1]
    return standard, torch.tensor(spreads, device=standard.device)


def fit_soft_value(
    population: Population,
    data: PathData,
    alpha: float,
    updates: int,
    generator: torch.Generator,
    on_progress: Callable[[], None] | None = None,
    times: float = 1.0,
    waves: int = WAVES,
) -> SoftValue:
    """Train both networks for ``updates`` steps each; ``on_progress`` is called after each step.

    data: what the prior expects along the population's paths. alpha: the target's temperature; they learn at ``times`` of it.
    waves: Fourier features of vectors, none where the gradient of log h is what is wanted.
    """
    learned = times * alpha
    weight, of_prior = (importance_weight(population, each) for each in (learned, math.inf))
    group, prior = population.trajectories.group, data.prior
    chain = prior.chain
    device, count = group.device, len(population)
    half = torch.zeros(count, dtype=torch.long, device=device)
    half[torch.randperm(count, generator=generator, device=device)[count // 2 :]] = 1
    scale = data.spread()
    reward, spread = standardized(population, learned)
    last = chain.last_trained + 1  # nothing is asked before the first trained step, nor after what the last one leads to
    networks: list[ValueNetwork] = []
    # Initial weights and dropout come from the global generator: forked, so that the caller's is left alone.
    with forked_rng([device] if device.type == "cuda" else []):
        for side in (0, 1):
            seed = int(torch.randint(2**31, (), generator=generator, device=device))
            torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
            network = ValueNetwork(prior.shape, last, scale, spread, waves).to(device).train()
            optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
            mine = (half == side).nonzero()[:, 0]
            for update in range(updates):
                optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - update / updates) * min(1.0, (update + 1) / 100)
                path = mine[torch.randint(len(mine), (BATCH,), generator=generator, device=device)]
                step = torch.randint(chain.trained[0], last + 1, (BATCH,), generator=generator, device=device)
                value, mean, variance = network.heads(data(step, path), step, group[path]).unbind(1)
                miss = reward[path] - mean
                loss = (weight[path] * functional.softplus(-value) + of_prior[path] * functional.softplus(value)).mean()
                loss = loss + miss.square().mean() + VARIANCE_SHARE * (miss.detach().square() - variance).square().mean()
                optimizer.zero_grad()
                backward(loss)
                optimizer.step()  # pyright: ignore[reportUnknownMemberType]
                if on_progress:
                    on_progress()
            networks.append(network.eval().requires_grad_(False))
    return SoftValue((networks[0], networks[1]), half, times)
