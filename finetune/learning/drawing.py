"""What an update learns from: trajectories of its behaviors with energies and log-ratios."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...samplers.log_ratio import outputs, step_log_ratio
from ...samplers.trajectory import Trajectories, concatenate
from ..energies.error import EnergyError
from .batch import Batch
from .behaviors import Context, draw
from .state import TrainState


class Drawn(NamedTuple):
    """on_policy: how many of them, the first ones, the policy of now drew. terms: {term of the energy: its mean over these}."""

    trajectories: Trajectories
    batch: Batch
    on_policy: int
    terms: dict[str, float]


def draw_batch(state: TrainState, progress: float) -> Drawn:
    """Of one update. progress: from 0 to 1 over the updates."""
    parts, terms = _trajectories(state, progress)
    if _asks_outputs(state):
        parts = {name: _with_prior_outputs(state, part) for name, part in parts.items()}
    trajectories = concatenate(list(parts.values()))
    on_policy = len(parts["on_policy"]) if "on_policy" in parts else 0
    return Drawn(trajectories, _batch(state, parts, trajectories, on_policy), on_policy, terms)


def _asks_outputs(state: TrainState) -> bool:
    """Whether what the prior says along the trajectories is asked for more than once."""
    valued = state.preparation.soft_value is not None and (state.objective.takes_soft_value or state.objective.learns_soft_value)
    return state.config.epochs > 1 or valued


def _trajectories(state: TrainState, progress: float) -> tuple[dict[str, Trajectories], dict[str, float]]:
    """({behavior: trajectories with energies}, {term: its mean over the policy's own samples})."""
    config = state.config
    population = state.preparation.population
    replays = "replay" in config.shares
    context = Context(
        state.prior,
        state.wrapped,
        population,
        config.alpha,
        progress,
        config.noise_scale,
        on_step=state.processes.poll,
        replay=state.replay,
        keep_outputs=replays or _asks_outputs(state),
    )
    parts: dict[str, Trajectories] = {}
    terms: dict[str, float] = {}
    drawn = draw(config.shares, context, state.size["batch_size"], state.noise.generator)
    for name, part in state.energies.evaluate_each(drawn):
        parts[name] = part
        if name == "on_policy":
            terms = state.energies.meter.term_means
    if replays:
        state.replay.add(parts["on_policy"])
    return parts, terms


def _with_prior_outputs(state: TrainState, part: Trajectories) -> Trajectories:
    """Evaluated once for all epochs and for the soft value, where the rollout has not kept them."""
    if part.prior_outputs is not None:
        return part
    chain = state.prior.chain
    flat = outputs(chain, state.prior.denoiser, part)
    return part.with_(prior_outputs=flat.view(chain.num_kernels, len(part), *flat.shape[1:]))


def _batch(state: TrainState, parts: dict[str, Trajectories], trajectories: Trajectories, on_policy: int) -> Batch:
    """What the objective is a function of."""
    energy, valid = state.energies.capped(trajectories, on_policy)
    each = torch.stack([valid[index].sum() for index in trajectories.groups])
    usable = int(state.processes.gather(each[None]).sum(0).max())
    if usable < 2:
        raise EnergyError(
            f"only {usable} of this update's energies are valid; the policy moved to where the energy is NaN or -inf."
        )
    soft_value = state.preparation.soft_value if state.objective.takes_soft_value else None
    value = None if soft_value is None else soft_value.along(trajectories, state.prior)
    group = None if trajectories.condition is None else trajectories.group  # nothing to gather without conditions
    return Batch(_log_ratios(state, parts), energy, valid, trajectories.log_behavior, value, group)


def _log_ratios(state: TrainState, parts: dict[str, Trajectories]) -> Float[Tensor, " kernels batch"]:
    """Known from the rollout where the policy drew them, evaluated elsewhere."""
    chain, prior = state.prior.chain, state.prior.denoiser
    ratios = [
        step_log_ratio(chain, prior, state.wrapped, part) if part.step_log_ratio is None else part.step_log_ratio
        for part in parts.values()
    ]
    return torch.cat(ratios, 1)
