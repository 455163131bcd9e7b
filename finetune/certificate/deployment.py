"""What a policy loses where it is deployed: its network in plain diffusers loops, against the trained chain and the target.

The certificate holds for the chain that was trained. What others run is ``scheduler.set_timesteps`` and ``scheduler.step``:
other step counts, other spacings, no noise. None of these samples the tilted law by construction, so the loss is measured.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...samplers.condition import context_of
from ...samplers.policy import Policy
from ...samplers.prior import Prior
from ...samplers.rollout import in_parts
from ...samplers.shapes import States, Timestep
from ...samplers.trajectory import rows_at_once
from ..energies.energy import Energy, EnergyMeter
from ..estimators import even, mean, weighted_mean
from .bins import BINS, filled, weighted_quantiles
from .evidence import Evidence
from .partition import CELLS, binned_distance, k_means, nearest, share_distance


@dataclass(frozen=True, eq=False)
class Deployed:
    """A diffusers scheduler and how its loop is run. timesteps: custom ones, in place of ``steps`` even ones."""

    name: str
    scheduler: Any
    steps: int
    options: dict[str, float]
    timesteps: tuple[int, ...] | None = None


def deployed_samplers(prior: Prior) -> list[Deployed]:
    """The prior's scheduler at K, 2K and K // 2 steps (as they were trained first, where those steps are not even), and DDIM of
    the same schedule with eta 0 and 1 at K, where it can be converted. Empty for a prior without a scheduler."""
    scheduler, steps = prior.scheduler, prior.chain.num_steps
    if scheduler is None:
        return []
    kind = type(scheduler).__name__
    name = " ".join([kind.removesuffix("Scheduler"), *(f"{key}={value:g}" for key, value in prior.step_options.items())])
    samplers = []
    if kind == "DDPMScheduler" and not has_even_steps(prior):  # the others take no timesteps of integers
        placed = tuple(int(t) for t in prior.chain.timesteps.tolist())
        samplers.append(Deployed(f"{name}, trained timesteps", scheduler, steps, prior.step_options, placed))
    counts = [count for count in (steps, 2 * steps, steps // 2) if 1 <= count <= scheduler.config.num_train_timesteps]
    samplers += [Deployed(name, scheduler, count, prior.step_options) for count in counts]
    if kind != "FlowMatchEulerDiscreteScheduler":
        from diffusers import DDIMScheduler

        # Euler ancestral never clips, which DDIM would by default.
        extra = {} if "clip_sample" in scheduler.config else {"clip_sample": False}
        ddim = DDIMScheduler.from_config(scheduler.config, **extra)
        samplers += [Deployed(f"DDIM eta={eta}", ddim, steps, {"eta": float(eta)}) for eta in (0, 1)]
    return [one for n, one in enumerate(samplers) if (one.name, one.steps) not in {(x.name, x.steps) for x in samplers[:n]}]


def has_even_steps(prior: Prior) -> bool:
    """Whether the chain runs the steps that its scheduler spaces by itself."""
    scheduler = copy.deepcopy(prior.scheduler)
    scheduler.set_timesteps(prior.chain.num_steps)
    own = scheduler.timesteps.cpu().double()
    return len(own) == prior.chain.num_steps and bool((own == prior.chain.timesteps).all())


@torch.no_grad()
def draw_deployed(
    policy: Policy,
    deployed: Deployed,
    count: int,
    generator: torch.Generator,
    on_progress: Callable[[int], None] | None = None,
) -> Float[Tensor, " {count} *state"]:
    """Terminal states of a plain diffusers loop around the policy's network, `rows_at_once` at a time.

    ``on_progress`` receives the number of samples just drawn, those of a batch in parts, one with every step.
    """
    prior, scheduler = policy.prior, copy.deepcopy(deployed.scheduler)
    states, batch = [], rows_at_once(prior.shape, prior.device)
    for first in range(0, count, batch):
        if deployed.timesteps is None:
            scheduler.set_timesteps(deployed.steps)
        else:
            scheduler.set_timesteps(timesteps=list(deployed.timesteps))
        shape = (min(batch, count - first), *prior.shape)
        state = getattr(scheduler, "init_noise_sigma", 1.0) * torch.randn(shape, generator=generator, device=prior.device)
        step, condition = in_parts(shape[0], len(scheduler.timesteps), on_progress), prior.condition(shape[0])
        for t in scheduler.timesteps:
            step()
            fed = scheduler.scale_model_input(state, t) if hasattr(scheduler, "scale_model_input") else state
            output = policy(fed, t.to(state.device), condition).to(state.dtype)
            state = _step(scheduler, output, t, state, generator, deployed.options)
        states.append(state)
    return torch.cat(states)


def _step(
    scheduler: Any, output: States, t: Timestep, state: States, generator: torch.Generator, options: dict[str, float]
) -> States:
    if not getattr(scheduler.config, "stochastic_sampling", False):
        return scheduler.step(output, t, state, generator=generator, return_dict=False, **options)[0]
    # This one draws its noise from torch's global generator, whatever it is given.
    devices = [] if state.device.type == "cpu" else [state.device]
    with torch.random.fork_rng(devices=devices, device_type=state.device.type if devices else "cuda"):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator, device=state.device)))
        return scheduler.step(output, t, state, return_dict=False)[0]


def deployment_metrics(
    policy: Policy,
    energy: Energy,
    evidence: Evidence,
    generator: torch.Generator,
    size: int = 2000,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """What each deployed sampler gives: one row each, after a row of the weighted prior and one of the trained chain.

    sampler, steps; energy and energy_se: the mean over finite energies and its standard error; violation_rate: the share of
    others. Then the total variation of ten energy bins and of 25 cells (k-means), each with what sampling alone explains
    (_null, 99.7%): against the trained chain's samples (chain_energy_tv, chain_cell_tv) and against the weighted prior
    (target_energy_tv, target_cell_tv). None where nothing is compared, or where fewer than 25 samples of a half carry weight.
    ``size`` samples a row, each with an energy call, and a call of ``on_progress`` with every batch. They are not clamped, as a
    pipeline's images are.
    """
    prior, steps = policy.prior, policy.prior.chain.num_steps
    meter = EnergyMeter(energy, max_invalid=1.0)
    target = Reference(evidence.target_samples, evidence.target_energy, evidence.target_weight.cpu())
    chain = Reference(evidence.samples, evidence.energy, even(len(evidence.samples)))

    def row(
        name: str, steps: int, samples: Float[Tensor, " n *data"], energies: Float[Tensor, " n"], compared: bool = True
    ) -> dict[str, Any]:
        finite = energies[energies.isfinite()]
        value, error = mean(finite) if len(finite) > 1 else (math.nan, math.nan)
        return {
            "sampler": name,
            "steps": steps,
            "energy": value,
            "energy_se": error,
            "violation_rate": 1 - len(finite) / len(energies),
            **chain.metrics("chain", samples, energies, compared),
            **target.metrics("target", samples, energies),
        }

    value, error = weighted_mean(evidence.target_energy, evidence.target_weight)
    first = {"sampler": "weighted prior", "steps": steps, "energy": value, "energy_se": error, "violation_rate": 0.0}
    rows = [
        first | {f"{side}_{figure}": None for side in ("chain", "target") for figure in Reference.METRICS},
        row("trained chain", steps, evidence.samples, evidence.energy, compared=False),
    ]
    for deployed in deployed_samplers(prior):
        data = prior.to_data(draw_deployed(policy, deployed, size, generator, on_progress))
        parts = data.split(rows_at_once(prior.shape, prior.device))
        energies = torch.cat([meter(part, **context_of(prior.condition(len(part)))) for part in parts])
        rows.append(row(deployed.name, deployed.steps, data, energies))
    return rows


class Reference:
    """Weighted samples with their energies, cut into cells and energy bins by one half and compared by the other."""

    METRICS = ("energy_tv", "energy_tv_null", "cell_tv", "cell_tv_null")

    def __init__(self, samples: Float[Tensor, " n *data"], energy: Float[Tensor, " n"], weight: Float[Tensor, " n"]) -> None:
        self.generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(weight), generator=self.generator)
        fit, held = order[: len(order) // 2], order[len(order) // 2 :]
        self.usable = min(int((weight[half] > 0).sum()) for half in (fit, held)) >= CELLS
        if not self.usable:
            return
        flat, energy, self.weight = _flat(samples), filled(energy), weight[held]
        self.centers = k_means(flat[fit], weight[fit], CELLS, self.generator)
        self.edges = weighted_quantiles(energy[fit], weight[fit], BINS)
        self.cells, self.energy = nearest(flat[held], self.centers)[0], energy[held]

    def metrics(
        self, side: str, samples: Float[Tensor, " n *data"], energy: Float[Tensor, " n"], compared: bool = True
    ) -> dict[str, float | None]:
        """Distances of an unweighted set, under names that begin with ``side``."""
        if not (self.usable and compared):
            return {f"{side}_{figure}": None for figure in self.METRICS}
        energies = binned_distance(filled(energy), self.energy, self.weight, self.edges, self.generator)
        cells = share_distance(nearest(_flat(samples), self.centers)[0], self.cells, self.weight, CELLS, self.generator)
        return {f"{side}_{figure}": value for figure, value in zip(self.METRICS, (*energies, *cells), strict=True)}


def _flat(samples: Float[Tensor, " n *data"]) -> Float[Tensor, " n dim"]:
    return samples.flatten(1).double().cpu()
