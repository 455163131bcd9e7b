"""Where training trajectories come from: functions (context, count, generator) → trajectories."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ...samplers.bridge import noise_back
from ...samplers.inflated import inflated_rollout
from ...samplers.prior import Prior
from ...samplers.rollout import rollout
from ...samplers.trajectory import Trajectories
from ..config.train import TrainConfig
from ..populations.population import Population
from .replay import Replay


@dataclass(frozen=True, eq=False)
class Context:
    """What a behavior may use. ``alpha`` is the configured temperature, ``progress`` runs from 0 to 1 over the run.

    replay: what earlier updates drew. keep_outputs: rollouts keep the prior's outputs. on_step: called between two steps of a
    rollout."""

    prior: Prior
    policy: nn.Module
    population: Population | None
    alpha: float
    progress: float
    noise_scale: float = 1.0
    on_step: Callable[[], None] | None = None
    replay: Replay | None = None
    keep_outputs: bool = False


Behavior = Callable[[Context, int, torch.Generator], Trajectories]


def on_policy(context: Context, count: int, generator: torch.Generator) -> Trajectories:
    """Rollouts of the current policy."""
    keep = context.keep_outputs
    return rollout(context.prior, context.policy, count, generator, on_step=context.on_step, keep_outputs=keep)


def prior(context: Context, count: int, generator: torch.Generator) -> Trajectories:
    """Rollouts of the prior: full coverage, few of them near the target."""
    return rollout(context.prior, None, count, generator, on_step=context.on_step)


def inflated(context: Context, count: int, generator: torch.Generator) -> Trajectories:
    """Policy rollouts with every kernel's noise times ``noise_scale``, annealed to 1 over the run."""
    scale = 1 + (context.noise_scale - 1) * (1 - context.progress)
    drawn = inflated_rollout(context.prior, context.policy, count, generator, scale, on_step=context.on_step)
    return drawn.with_(step_log_ratio=None)


def tilted_prior(context: Context, count: int, generator: torch.Generator) -> Trajectories:
    """Prior trajectories of the population, resampled whole by exp(-E/alpha): the exact tilted path law as N grows."""
    population = _population(context)
    drawn = population.trajectories.select(population.draw(count, context.alpha, generator))
    assert drawn.energy is not None
    log_z = population.log_z(context.alpha)[drawn.group]
    return drawn.with_(step_log_ratio=None, log_behavior=-drawn.energy / context.alpha - log_z)


def noised_back(context: Context, count: int, generator: torch.Generator) -> Trajectories:
    """Terminal samples of the population, drawn by exp(-E/alpha) and noised back: fresh trajectories without a rollout."""
    population = _population(context)
    drawn = population.trajectories.select(population.draw(count, context.alpha, generator))
    fresh = noise_back(context.prior, drawn.terminal, generator, drawn.condition)
    # Last steps of the prior, or a chain that leaves noise on its samples, end elsewhere than at the drawn sample, at another
    # energy.
    chain = context.prior.chain
    unchanged = not chain.prior_last_steps and chain.noise[-1] == 0
    return fresh.with_(energy=drawn.energy) if unchanged else fresh


def replay(context: Context, count: int, generator: torch.Generator) -> Trajectories:
    """Rollouts of the policies of the last updates, each with the density of the one that drew it."""
    assert context.replay is not None, "the trainer keeps what it drew for a behavior that needs it"
    return context.replay.draw(count, generator)


def _population(context: Context) -> Population:
    assert context.population is not None, "the trainer fills the population before a behavior that needs it"
    return context.population


BEHAVIORS: dict[str, Behavior] = {
    "on_policy": on_policy,
    "prior": prior,
    "inflated": inflated,
    "tilted_prior": tilted_prior,
    "noised_back": noised_back,
    "replay": replay,
}
NEEDS_POPULATION = frozenset({"tilted_prior", "noised_back"})


def needs_population(config: TrainConfig) -> bool:
    """Whether anything of a run draws on a population of prior trajectories."""
    phases = config.warm_start != "none" or config.soft_value_updates or config.forward_rows
    return bool(phases or set(config.shares) & NEEDS_POPULATION)


def draw(
    shares: dict[str, float], context: Context, count: int, generator: torch.Generator
) -> Iterator[tuple[str, Trajectories]]:
    """``count`` trajectories split over behaviors by their shares (which sum to 1), each drawn when it is asked for.

    Nothing is replayed in the first update, which is so much smaller."""
    for name, size in sizes(shares, count).items():
        if size and not (name == "replay" and context.replay is not None and context.replay.empty):
            yield name, BEHAVIORS[name](context, size, generator)


def sizes(shares: dict[str, float], count: int) -> dict[str, int]:
    """How many of ``count`` trajectories each behavior draws."""
    left, found = count, dict[str, int]()
    for position, (name, share) in enumerate(shares.items()):
        found[name] = left if position == len(shares) - 1 else min(left, round(share * count))
        left -= found[name]
    return found
