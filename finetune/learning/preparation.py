"""What the warm start and the updates learn from: the population, and what is learned on it before them."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ...samplers.condition import members
from ...samplers.prior import Prior
from ...samplers.rollout import rollout
from ..config.train import TrainConfig
from ..distributed.processes import Processes
from ..energies.energy import energy_name
from ..energies.error import EnergyError
from ..energies.evaluation import EnergyEvaluation
from ..energies.probe import probe_energy
from ..estimators import effective_number
from ..populations.climbing import climbed, renewed, temperature_for_all
from ..populations.held_out import HeldOut
from ..populations.importance import Bar, importance_population, prior_paths
from ..populations.population import Population, temperature_within_reach, too_few
from ..populations.smc import ClimbError
from .behaviors import needs_population
from .calibration import Calibration, calibrate
from .forward_kl import ForwardKL
from .gradients import chunk_rows
from .log_z import LogZ
from .noise import Noise
from .path_data import PathData
from .soft_value import WAVES, SoftValue, fit_soft_value
from .value_drift import ValueDrift

FOLLOWED = 0.1  # of as many as the population has of the prior: the effective paths whose law a policy may follow
HELD_OUT, EACH = 1000, 100  # prior paths that nothing is learned from: of all conditions, of each; a quarter of the population


def held_out_size(prior: Prior, population_size: int, processes: int) -> int:
    """Prior paths that a process holds out beside such a population of its own."""
    return min(max(HELD_OUT, EACH * prior.num_conditions) // processes, population_size // 4)


class Preparation:
    """Each part is None where the config has no use for it.

    population: prior paths with energies; effective: how many of them are, of all processes. held_out: other paths, for
    watching. soft_value: log h, learned on the population. forward_kl, value_drift: what a warm start follows, and updates with
    forward_rows.
    """

    def __init__(
        self,
        prior: Prior,
        policy: nn.Module,
        config: TrainConfig,
        size: dict[str, int],
        energies: EnergyEvaluation,
        noise: Noise,
        processes: Processes,
        bar: Bar,
    ) -> None:
        self.prior, self.policy, self.config, self.size = prior, policy, config, size
        self.energies, self.noise, self.processes, self.bar = energies, noise, processes, bar
        self.population: Population | None = None
        self.effective: float | None = None
        self.held_out: HeldOut | None = None
        self.soft_value: SoftValue | None = None
        self.forward_kl: ForwardKL | None = None
        self.value_drift: ValueDrift | None = None
        self._settled: dict[str, Any] = {"population": None, "forward_kl": None, "value_drift": None}

    def run(self, log_z: LogZ) -> None:
        """Probe the energy, then make what the config needs. ``log_z`` starts at the population's estimate.

        Errors: EnergyError for an unusable energy.
        """
        config, alpha = self.config, self.config.alpha
        self.processes.refuse_same_noise(self.noise.generator)
        self._probe()
        if not needs_population(config):
            return
        population, times = self._populate()
        self.population = population
        # The forward estimate is a better start for a learned log Z than 0, and costs nothing.
        log_z.set(self.processes.mean_of(population.log_z(alpha).double()))
        weights, count = self.processes.gather(population.log_weight(alpha)), self.prior.num_conditions
        group = self.processes.gather(population.trajectories.group)
        self.effective = effective_number(weights, members(group, count))
        self._make_teachers(self._learn_value(population, times) if config.soft_value_updates else None)
        if population.tempering is not None:
            assert self.forward_kl is not None
            self.forward_kl.alpha = math.inf
            self._cool()
        self._check_bridge()

    def _learn_value(self, population: Population, times: float) -> Calibration | None:
        """Set ``soft_value``; returns its calibration where the warm start follows it."""
        config, generator = self.config, self.noise.generator
        paths, kernels = population.trajectories, self.prior.chain.num_kernels
        updates, follows = config.soft_value_updates, config.warm_start == "value_drift"
        steps = 2 * updates + kernels * (paths.prior_outputs is None) + (kernels + 1) * follows
        with self.bar(steps, "soft value, two networks") as bar:
            data = PathData(self.prior, paths, bar.update)
            waves = 0 if follows else WAVES
            value = fit_soft_value(population, data, config.alpha, updates, generator, bar.update, times, waves=waves)
            own = calibrate(value, data, population, times * config.alpha, bar.update) if follows else None
        self.soft_value = value
        # What the prior said along the paths has served.
        self.population = replace(population, trajectories=population.trajectories.with_(prior_outputs=None))
        return None if own is None else Calibration(*(self.processes.gather(part[None]).mean(0) for part in own))

    def _populate(self) -> tuple[Population, float]:
        """The population, and the temperature at which it can stand for a tilted law, over the target's; sets ``held_out``."""
        alpha, generator, wanted = self.config.alpha, self.noise.generator, self.config.population
        size, keep = self.size["population_size"], self.config.soft_value_updates > 0
        population = importance_population(self.energies, size, alpha, generator, self.bar, keep_outputs=keep)
        # One temperature for all processes, by all of their paths: that of the soft value and of the held-out paths.
        energy, group = (self.processes.gather(each) for each in (population.energy, population.trajectories.group))
        if wanted == "smc" or (wanted == "auto" and too_few(energy, alpha, group)):
            cools = self.config.warm_start == "tlm" and not self.config.soft_value_updates
            try:
                climb, self.held_out = climbed(self.energies, population, alpha, generator, self.bar, cools=cools)
                return climb, 1.0
            except ClimbError as error:
                if wanted == "smc" or self.processes.count > 1:  # one of several cannot fall back alone
                    raise
                warnings.warn(f"too few prior samples have weight, and none climbed to the target: {error}", stacklevel=2)
        times = temperature_within_reach(energy, alpha, group) / alpha
        self.held_out = self._hold_out(times)
        return population, times

    @property
    def reached(self) -> float:
        """The temperature to which a plain warm start has followed a population that climbed or cools; infinite elsewhere."""
        plain = self.renewable and self.soft_value is None
        return self.forward_kl.alpha if plain and self.forward_kl is not None else math.inf

    @property
    def renewable(self) -> bool:
        """Whether the population has climbed, so that the policy's paths may join it; the prior's own paths stay as they are."""
        return self.population is not None and self.population.tempering is not None

    def renew(self, policy: nn.Module) -> None:
        """Give a population that has climbed new paths of ``policy``."""
        population, forward = self.population, self.forward_kl
        assert population is not None and forward is not None
        count, generator = self.size["population_size"], self.noise.generator
        self.population = forward.population = renewed(
            self.energies, population, policy, count, self.config.alpha, generator, self.bar
        )
        if self.value_drift is not None:
            self.value_drift.learn_from(self.population)
        self._cool()

    def _cool(self) -> None:
        """Lower the temperature of the forward KL as far as enough paths are effective. It never rises: where the policy of a
        milder law left something out, a few of the prior's paths carry most of the weight."""
        population, forward = self.population, self.forward_kl
        assert population is not None and forward is not None
        wanted = FOLLOWED * self.size["population_size"]
        forward.alpha = temperature_for_all(population, self.config.alpha, wanted, forward.alpha, self.processes)

    def _probe(self) -> None:
        """Four prior samples show whether the energy can be used."""
        drawn = rollout(self.prior, None, 4, self.noise.generator, keep=False, on_step=self.processes.poll)
        energy = self.energies.evaluate(drawn).energy
        meter = self.energies.meter
        with self.processes.together():
            assert energy is not None
            if energy.isnan().all():
                raise EnergyError(
                    f"energy {energy_name(meter.energy)} is NaN or -inf on all of four prior samples. Look at what it"
                    " divides by and takes logarithms of, and return +inf for what must not occur."
                )
            samples = self.prior.to_data(drawn.terminal)
            probe_energy(meter, samples, energy, drawn.context, self.config.alpha)

    def _hold_out(self, times: float) -> HeldOut | None:
        """Prior paths for watching what is learned, at ``times`` the target's temperature; None where their energies say
        nothing."""
        size = held_out_size(self.prior, self.size["population_size"], self.processes.count)
        if size < 2:
            return None
        alpha, generator = self.config.alpha, self.noise.generator
        paths = Population(prior_paths(self.energies, size, "held-out samples", alpha, generator, self.bar))
        finite = torch.isfinite(paths.log_weight(alpha))
        usable = torch.stack([finite[index].any() for index in paths.trajectories.groups])
        everyone = self.processes.gather(usable[None]).all(0)
        if not everyone.all():  # all processes have some of every condition, or none does
            table = self.prior.condition_table
            if table is not None and self.processes.main:
                without = [name for name, found in zip(table.names, everyone, strict=True) if not found]
                warnings.warn(
                    f"no held-out path of {', '.join(without)} has a finite energy, so nothing is held out: the run cannot say by"
                    " how much it came closer, and ends at its last weights. A larger population_size holds out more.",
                    stacklevel=2,
                )
            return None
        return HeldOut.draw(self.prior, paths, alpha, times, generator, self.processes.most)

    def _make_teachers(self, calibration: Calibration | None) -> None:
        """`ForwardKL` and, where there is a calibration to follow the soft value by, `ValueDrift`."""
        config, generator, population = self.config, self.noise.generator, self.population
        assert population is not None
        no_sync = partial(self.processes.no_sync, self.policy)
        self.forward_kl = ForwardKL(self.prior, self.policy, population, self.soft_value, config, generator, no_sync)
        if calibration is None:
            return
        assert self.soft_value is not None
        drift = ValueDrift(self.prior, population, self.soft_value, calibration, config.alpha, generator, no_sync)
        rows = self.size["warm_start_rows"]
        with no_sync():
            drift.chunk = chunk_rows(self.policy, self.prior.chain, population.trajectories, config.memory_mb, rows, total=rows)
        self.value_drift = drift

    def _check_bridge(self) -> None:
        """What the bridge may be used for."""
        forward = self.forward_kl
        assert forward is not None
        if self.config.warm_start == "tlm" and self.soft_value is None and forward.bridged:
            nats = forward.check_bridge(self.processes.mean)
            if not forward.bridged and self.processes.main:
                warnings.warn(
                    "the prior's network is not the exact denoiser of its own samples: next states computed from a path's end"
                    f" would move the policy by {nats:.2f} nats or more without any energy. The warm start takes stored ones,"
                    " which are noisier. --warm-start value_drift, with --soft-value-updates 1000, needs neither.",
                    stacklevel=2,
                )

    # --- its state ---------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """A step is complete: `state_dict` is of now."""
        teachers = {"forward_kl": self.forward_kl, "value_drift": self.value_drift}
        now = {name: None if teacher is None else teacher.state_dict() for name, teacher in teachers.items()}
        self._settled = {"population": self.population, **now}

    def state_dict(self) -> dict[str, Any]:
        """Of this process: its paths, and what it learned on them."""
        parts = {"population": self._settled["population"], "held_out": self.held_out, "soft_value": self.soft_value}
        return {
            "effective": self.effective,
            **{name: None if part is None else part.state_dict() for name, part in parts.items()},
            "forward_kl": self._settled["forward_kl"],
            "value_drift": self._settled["value_drift"],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.effective = state_dict["effective"]
        if state_dict["population"] is None:
            return
        prior, device = self.prior, self.processes.device
        self.population = Population.from_state_dict(state_dict["population"], prior)
        if state_dict["held_out"] is not None:
            self.held_out = HeldOut.from_state_dict(prior, state_dict["held_out"])
        if state_dict["soft_value"] is not None:
            steps = prior.chain.last_trained + 1
            self.soft_value = SoftValue.from_state_dict(state_dict["soft_value"], prior.shape, steps, device)
        drift = state_dict["value_drift"]
        known = None if drift is None else {name: part.to(device) for name, part in drift["calibration"].items()}
        self._make_teachers(None if known is None else Calibration(**known))
        assert self.forward_kl is not None
        self.forward_kl.load_state_dict(state_dict["forward_kl"])
        if self.value_drift is not None and drift is not None:
            self.value_drift.load_state_dict(drift)
        self.settle()
