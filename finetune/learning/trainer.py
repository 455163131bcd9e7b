"""The trainer: behavior → trajectories → energies → log-ratios → objective → two-pass gradient → metrics."""

from __future__ import annotations

import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...samplers.log_ratio import step_log_ratio
from ...samplers.policy import Policy, trainable_copy
from ...samplers.prior import Prior
from ...samplers.rollout import in_parts, rollout
from ...samplers.trajectory import Trajectories, concatenate, rows_at_once
from ..config.sections import TrainConfig
from ..distributed.processes import Processes
from ..distributed.signals import NoAnswer, Preempted, ProcessError, uninterrupted
from ..energies.cache import CachedEnergy
from ..energies.energy import Energy, EnergyMeter, overlaps
from ..energies.error import EnergyError, energy_name
from ..energies.probe import probe_energy
from ..estimators import adequate_alpha, ess, log_mean_exp
from ..strict_json import strict_json
from .behaviors import Context, PriorBank, draw, needs_bank, temperature_within_reach
from .forward_kl import ForwardKL
from .gradients import backward_trajectories, chunk_rows, objective_gradient
from .held_out import ALIKE, HeldOut, Improvement, Kept
from .objectives import OBJECTIVES, Batch
from .soft_value import SoftValue, fit_soft_value
from .step_bound import FLOOR, StepBound
from .value_drift import RESCALED_AT, ValueDrift

MAX_OVERFLOWS = 20  # a scaler starts far too high and needs about that many to come down
SHARED = ("batch_size", "bank_size", "warm_start_rows", "forward_rows")  # the processes split these
COUNTED = {  # by the energy meter, as metrics call it
    "calls": "energy_calls",
    "cache_hits": "energy_cache_hits",
    "invalid": "invalid_energies",
    "forbidden": "forbidden_energies",
}
EVERYWHERE = (FloatingPointError, EnergyError, ProcessError)  # raised for what all processes see alike
FALLS = 2  # looks in a row at which a warm start has fallen behind its best, and ends
NORMS = 20  # gradients that a spike is compared with
HELD_OUT = 1000  # prior paths at most that nothing is learned from, and a quarter of the bank's number
WATCHES = 5  # looks at them in a warm start
JUDGED = 256  # rollouts that show what a phase has reached
JUDGING_SEED = 2**60  # of their noise: far from what the training draws


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What training leaves behind.

    policy: on the CPU where it was trained in shards (`Processes`), else where it was.
    log_z: the learned parameter; without one, the last on-policy batch's estimate, or the bank's.
    improvement: how much closer to the target than the prior; None where there are no held-out paths, or no time to measure it.
    """

    policy: Policy
    log_z: float
    energy_calls: int
    seconds: float
    interrupted: bool
    preempted: bool
    improvement: Improvement | None
    history: list[dict[str, Any]] = field(repr=False)


class Trainer:
    """Fine-tune a prior toward an energy: ``Trainer(prior, energy, TrainConfig(alpha=0.5)).train()``.

    policy: a trainable denoiser that starts at the prior; None makes a full copy (`trainable_copy`).
    metrics: a file that receives one JSON object a line, or None. progress: show a bar on stderr.
    on_record: is given each of these objects with the number of steps before it, in the process that writes.

    Errors: ValueError for a pair of objective and behavior that cannot be right; EnergyError for an unusable energy,
    found on four prior samples before any training.
    """

    def __init__(
        self,
        prior: Prior,
        energy: Energy,
        config: TrainConfig | None = None,
        *,
        policy: nn.Module | None = None,
        metrics: Path | None = None,
        progress: bool = True,
        on_checkpoint: Callable[[Trainer], None] | None = None,
        on_record: Callable[[int, dict[str, Any]], None] | None = None,
    ) -> None:
        self.config = config or TrainConfig()
        self.prior, self.metrics, self.progress = prior, metrics, progress
        self.meter = EnergyMeter(energy, self.config.max_invalid)
        self.objective = OBJECTIVES[self.config.objective]
        wrong = set(self.config.shares) - self.objective.behaviors
        assert not wrong, f"config admitted {wrong} for {self.config.objective}"
        if "noised_back" in self.config.shares:
            _ = prior.chain.bridge  # refuses a chain that cannot be noised back, before any work
        self.processes = Processes(prior.device, self.config.process_timeout)
        if policy is None:
            policy = trainable_copy(prior)
        self._policy = policy if isinstance(policy, Policy) else Policy(prior, policy, "full")
        self.policy = self.processes.wrap(self._policy)
        device = self.processes.device
        self._sizes = {name: self.processes.share(name, getattr(self.config, name)) for name in SHARED}
        # Each process draws its own noise; a shared seed would give every rank the same trajectories.
        self._seed = self.config.seed * 1_000_003 + self.processes.rank
        self.generator = torch.Generator(device=device).manual_seed(self._seed)
        self.log_z = torch.zeros((), device=device, requires_grad=True)
        self.alpha = self.config.alpha
        self.bank: PriorBank | None = None
        self.soft_value: SoftValue | None = None
        self.forward_kl: ForwardKL | None = None
        self.value_drift: ValueDrift | None = None
        self.held_out: HeldOut | None = None
        self.bound = StepBound(prior, self.policy, self._agreed)
        # Half precision rounds small gradients to zero; scaled ones survive.
        half = getattr(prior.denoiser, "autocast", None) == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self._overflows = self._skipped = 0
        self._norms: list[float] = []
        self.average: list[Tensor] | None = None
        self.history: list[dict[str, Any]] = []
        self.taken = 0
        self._optimizer, self._schedule = self._optimizer_for(self.config.learning_rate, 1)
        self._log_z_optimizer = torch.optim.Adam([self.log_z], self.config.log_z_learning_rate)
        self.watched, self.closest = Kept(self._trained()), Kept(self._trained())
        self.improvement: Improvement | None = None
        self._judged = -1  # steps taken when the policy was last judged
        self._ceiling: float | None = None
        self._alpha_start = self.config.alpha
        self._on_checkpoint, self._on_record = on_checkpoint, on_record
        self._boundary: dict[str, Any] = {}
        self._torn = False  # between an optimizer's step and the end of what belongs to it
        self.bank_ess: float | None = None
        self._restored: dict[str, Any] | None = None
        self._started = 0.0

    # --- the parts of an update, in the order in which data flows -------------------------------------------------

    def evaluate_energy(self, trajectories: Trajectories) -> Trajectories:
        """Trajectories with their energies, evaluated once on the decoded samples."""
        [(_, evaluated)] = self.evaluated([("", trajectories)])
        return evaluated

    def evaluated(self, drawn: Iterable[tuple[str, Trajectories]]) -> Iterator[tuple[str, Trajectories]]:
        """`evaluate_energy` of each; where the energy `overlaps`, the next is drawn while it works."""
        waiting: tuple[str, Callable[[], Trajectories]] | None = None
        for name, trajectories in drawn:
            if waiting is not None:
                yield waiting[0], waiting[1]()
            waiting = name, self._begin_energy(trajectories)
            if not overlaps(self.meter.energy):
                yield name, waiting[1]()
                waiting = None
        if waiting is not None:
            yield waiting[0], waiting[1]()

    def _begin_energy(self, trajectories: Trajectories) -> Callable[[], Trajectories]:
        """What will return them with their energies: one batch at a time. All processes call both halves."""
        if trajectories.energy is not None:
            return lambda: trajectories
        started: Callable[[], Tensor] | None = None
        with self.processes.together():
            samples = self.prior.to_data(trajectories.terminal)
            started = self.meter.start(samples, **self.prior.context(len(samples)))

        def finish() -> Trajectories:
            assert started is not None
            energy = torch.empty(0)
            with self.processes.together():
                energy = started()
            self.processes.poll()
            return trajectories.with_(energy=energy)

        return finish

    def capped(self, energy: Tensor) -> tuple[Tensor, Tensor]:
        """(finite energies, valid mask): +inf and what lies above the ceiling is set to it, NaN is masked."""
        valid = ~energy.isnan()
        if self._ceiling is None:
            lowest = self._gather(energy.where(energy.isfinite(), math.inf).min()[None]).min().item()
            if math.isinf(lowest):
                raise EnergyError(
                    "every energy of the first batch is +inf or invalid: the target has no mass where the prior samples."
                    " Soften the constraint, or raise alpha."
                )
            self._ceiling = lowest + self.config.max_energy * self.config.alpha
        return energy.nan_to_num(nan=0.0, posinf=math.inf).clamp(max=self._ceiling), valid

    def log_ratios(self, parts: dict[str, Trajectories]) -> Tensor:
        """[num_kernels, B]: known from the rollout where the policy drew them, evaluated elsewhere."""
        ratios = []
        for part in parts.values():
            known = part.step_log_ratio
            if known is None:
                known = step_log_ratio(self.prior.chain, self.prior.denoiser, self.policy, part)
            ratios.append(known)
        return torch.cat(ratios, 1)

    # --- phases --------------------------------------------------------------------------------------------------

    def train(self) -> TrainResult:
        """Run the warm start and the updates; returns the policy in evaluation mode. Ctrl-C keeps what is trained."""
        if self._started:
            raise ValueError("this trainer has trained; make a new one, on the trained policy to go on from it.")
        self._started = time.perf_counter()
        if self._restored is None:
            self._prepare()
        interrupted: KeyboardInterrupt | None = None
        try:
            if self.config.warm_start != "none":
                self._warm_start()
            self._updates()
            self._take_best()
        except KeyboardInterrupt as error:
            if not self.history:
                raise
            interrupted = error
        self.policy.eval()
        policy = self.collected()
        if self.objective.learns_log_z:
            log_z = self.log_z.item()
        else:
            fallback = math.nan if self.bank is None else self._agreed(self.bank.log_z(self.config.alpha))
            log_z = self.history[-1].get("log_z", fallback) if self.history else fallback
        seconds = time.perf_counter() - self._started
        return TrainResult(
            policy,
            log_z,
            self.meter.calls,
            seconds,
            interrupted is not None,
            isinstance(interrupted, Preempted),
            None if interrupted is not None else self.improvement,
            self.history,
        )

    def collected(self) -> Policy:
        """The policy itself, without what distributed training wraps around it; called by all processes.

        Shards are gathered for it, on the CPU.
        """
        self.processes.collect(self.policy, self._policy)
        return self._policy

    def _prepare(self) -> None:
        """What the updates start from: a bank if anything needs it, and the soft value that is learned on it."""
        config = self.config
        self.processes.refuse_same_noise(self.generator)
        self._check_energy()
        if needs_bank(config):
            self.bank = self.fill_bank(self._sizes["bank_size"])
            # The forward estimate is a better start for a learned log Z than 0, and costs nothing.
            with torch.no_grad():
                self.log_z.fill_(self._agreed(self.bank.log_z(config.alpha)))
            # One temperature for all processes, by all of their paths: that of the soft value and of the held-out paths.
            assert self.bank.trajectories.energy is not None
            times = temperature_within_reach(self._gather(self.bank.trajectories.energy), config.alpha) / config.alpha
            self.held_out = self._hold_out(times)
            self.bank_ess = ess(self._gather(self.bank.log_weight(config.alpha))) * config.bank_size
            if config.soft_value_updates:
                self.soft_value = self._fit_soft_value(self.bank, times)
            self.forward_kl = self._forward_kl_on(self.bank)
            if config.warm_start == "tlm" and self.soft_value is None and self.forward_kl.bridged:
                self._check_bridge(self.forward_kl)
            self.value_drift = self._value_drift_on(self.bank)
            if self.value_drift is not None:
                with self._bar(self.prior.chain.num_kernels, "worth of the soft value") as bar:
                    self.value_drift.measure(bar.update)
                with torch.no_grad():
                    factors = self._gather(self.value_drift.factor[None])
                self.value_drift.factor = factors.mean(0)

    def _forward_kl_on(self, bank: PriorBank) -> ForwardKL:
        return ForwardKL(self.prior, self.policy, bank, self.soft_value, self.config, self.generator, self._hold)

    def _check_bridge(self, forward: ForwardKL) -> None:
        nats = forward.check_bridge(self._agreed)
        if not forward.bridged and self.processes.main:
            warnings.warn(
                "the prior's network is not the exact denoiser of its own samples: next states computed from a path's end"
                f" would move the policy by {nats:.2f} nats or more without any energy. The warm start takes stored ones, which"
                " are noisier. --warm-start value_drift, with --soft-value-updates 1000, needs neither.",
                stacklevel=2,
            )

    def _value_drift_on(self, bank: PriorBank) -> ValueDrift | None:
        if self.config.warm_start != "value_drift":
            return None
        assert self.soft_value is not None
        drift = ValueDrift(self.prior, bank, self.soft_value, self.config.alpha, self.generator, self._hold)
        few = bank.trajectories.select(torch.arange(6, device=self.prior.device) % len(bank.trajectories))
        rows = self._sizes["warm_start_rows"]
        with self._hold():
            drift.chunk = chunk_rows(self.policy, self.prior.chain, few, self.config.memory_mb, rows, total=rows)
        return drift

    def _hold_out(self, times: float) -> HeldOut | None:
        """Prior paths for watching what is learned from the bank's, at ``times`` the target's temperature; None where their
        energies say nothing."""
        size = min(HELD_OUT // self.processes.count, self._sizes["bank_size"] // 4)
        if size < 2:
            return None
        paths = self._prior_paths(size, "held-out samples")
        assert paths.energy is not None
        kept = PriorBank(paths)
        usable = torch.isfinite(kept.log_weight(self.config.alpha)).any()
        if not self._gather(usable[None]).all():  # all have some, or none of them
            return None
        return HeldOut.draw(self.prior, kept, self.config.alpha, times, self.generator)

    def _check_energy(self) -> None:
        probe = rollout(self.prior, None, 4, self.generator, keep=False, on_step=self.processes.poll)
        energy = self.evaluate_energy(probe).energy
        with self.processes.together():
            assert energy is not None
            if energy.isnan().all():
                raise EnergyError(
                    f"energy {energy_name(self.meter.energy)} is NaN or -inf on all of four prior samples. Look at what it"
                    " divides by and takes logarithms of, and return +inf for what must not occur."
                )
            samples = self.prior.to_data(probe.terminal)
            probe_energy(self.meter, samples, energy, self.prior.context(len(samples)), self.config.alpha)

    def fill_bank(self, size: int) -> PriorBank:
        """``size`` prior trajectories with their energies.

        Errors: ValueError where their states would fill more than half of the memory that is free.
        """
        bank = PriorBank(self._prior_paths(size, "prior samples"))
        with self.processes.together():
            if not torch.isfinite(bank.log_weight(self.config.alpha)).any():
                raise EnergyError(
                    f"none of {size} prior samples has a finite energy: the tilted law is out of the prior's reach here."
                )
        return bank

    def _prior_paths(self, size: int, name: str) -> Trajectories:
        shape = (self.prior.chain.num_steps + 1, size, *self.prior.shape)
        with self.processes.together():
            self._refuse_oversized(4 * math.prod(shape))
        states = torch.empty(shape, device=self.prior.device)
        energy = torch.empty(size, device=self.prior.device)
        chunk = rows_at_once(self.prior.shape, self.prior.device)
        counts = [min(chunk, size - first) for first in range(0, size, chunk)]
        with self._bar(size, name) as bar:
            drawn = (
                ("", rollout(self.prior, None, count, self.generator, on_step=self._moving(bar, count // 2))) for count in counts
            )
            first = 0
            for _, part in self.evaluated(drawn):
                assert part.energy is not None
                rows = slice(first, first + len(part))
                states[:, rows], energy[rows] = part.states, part.energy
                first = rows.stop
                bar.update(len(part) - len(part) // 2)  # the other half moved with the rollout
            paths = Trajectories(states, energy=energy)
            # What says whether alpha is within reach.
            bar.set_postfix(effective=f"{PriorBank(paths).ess(self.config.alpha):,.0f}")
        return paths

    def _moving(self, bar: Any, count: int) -> Callable[[], None]:
        """What to call at every step of a rollout: it listens to the other processes, and moves the bar by ``count`` in all."""
        move = in_parts(count, self.prior.chain.num_kernels, bar.update)

        def step() -> None:
            self.processes.poll()
            move()

        return step

    def _refuse_oversized(self, wanted: int) -> None:
        import psutil

        device = self.prior.device
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that want as much of the same memory
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available / here
        if wanted > free / 2:
            raise ValueError(
                f"the bank of {self.config.bank_size:,} prior trajectories of {self.prior.chain.num_steps + 1} states takes"
                f" {wanted / 2**30:,.1f} GB, and {device} has {free / 2**30:,.1f} free; lower bank_size, or do without:"
                " warm_start none, soft_value_updates 0, forward_rows 0, behavior on_policy 1."
            )

    def _fit_soft_value(self, bank: PriorBank, times: float) -> SoftValue:
        config = self.config
        updates = config.soft_value_updates
        with self._bar(2 * updates, "soft value, two networks") as bar:
            return fit_soft_value(
                bank, self.prior.chain, config.alpha, updates, self.generator, lambda: bar.update(1), times=times
            )

    @contextmanager
    def _phase(self, first: int, count: int, learning_rate: float) -> Iterator[range]:
        """The steps of a phase that are still to be taken, out of ``count`` from the run's step ``first`` on; with an optimizer,
        a schedule and a running average of their own. At its end (Ctrl-C included) the policy takes the average.

        What breaks a phase off leaves a checkpoint of the last whole step, for a run that keeps them.
        """
        if first + count < self.taken:  # a restored run is past it
            yield range(0)
            return
        self._optimizer, self._schedule = self._optimizer_for(learning_rate, count)
        self.average = [weight.clone() for weight in self._trained()] if self.config.ema_decay else None
        if self._restored is not None:
            self._restore_phase(self._restored)
            self._restored = None
        self._boundary = self._between_steps()
        if self.bank is not None and self.taken == first:
            self._look_at(self.bank.trajectories.states)
        self.bound.begin()
        try:
            yield range(self.taken - first, count)
        except BaseException as error:
            here = self._leave_checkpoint(error)
            if here or not self.processes.sharded:  # a pass that was broken off leaves some shards gathered
                self._end_phase()
            raise
        self._end_phase()

    def _look_at(self, states: Tensor) -> None:
        """States that steps are measured on, by noise of their own: a phase that is begun again must not draw twice."""
        self.bound.look_at(states, torch.Generator(self.processes.device).manual_seed(self._seed))

    def _end_phase(self) -> None:
        if self.average is not None:
            self._take(self.average)
            self.average = None

    def _leave_checkpoint(self, error: BaseException) -> bool:
        """Of the last whole step, for a run that keeps them; returns `all_here`."""
        here = self.all_here(error)
        if self._on_checkpoint is not None and self.taken and here and not self._torn:
            self._on_checkpoint(self)
        return here

    def all_here(self, error: BaseException) -> bool:
        """Whether all processes left for this: what one alone has run into, outside of `together`, is left to torchrun."""
        if isinstance(error, NoAnswer):
            return False
        return self.processes.count == 1 or error is self.processes.left_for or isinstance(error, EVERYWHERE)

    def _warm_start(self) -> None:
        """The config's warm start on the bank: the forward KL (`ForwardKL`), or the soft value's drift (`ValueDrift`).

        The forward KL goes in two halves where the shift of the first can teach the second. It ends at the weights that came
        closest to the held-out paths, and early where they fall behind.
        """
        config, forward, drift = self.config, self.forward_kl, self.value_drift
        assert forward is not None
        total, rows = config.warm_start_updates, self._sizes["warm_start_rows"]
        split = drift is None and forward.bridged_and_controlled
        halves = [(0, total // 2), (total // 2, total)] if split else [(0, total)]
        every = max(1, total // WATCHES)
        with self._bar(total, f"warm start ({config.warm_start})") as bar:
            for first, last in halves:
                with self._phase(first, last - first, config.warm_start_learning_rate) as steps:
                    for update in steps:
                        update += first
                        if self.watched.falls >= FALLS:
                            break
                        if update == first > 0:
                            forward.measure_slope()
                        if drift is not None:
                            if update == round(RESCALED_AT * total) and self.held_out is not None:
                                drift.rescale(self.policy, self.held_out, self._gather)
                            loss = drift.backward(self.policy, rows, self.scaler.scale, update / total)
                        else:
                            loss = forward.backward(rows, self.scaler.scale)
                        loss_scale = self.scaler.get_scale()
                        with uninterrupted():
                            trust = 1.0 if drift is None else self._agreed(drift.trust)
                            nats = self._step(trust * config.warm_start_step_nats, config.warm_start_learning_rate)
                            record: dict[str, Any] = {"loss": self._agreed(loss.item() / loss_scale), "step_nats": nats}
                            if nats is None:
                                record["skipped"] = True
                            if update == 0 or (update + 1) % every == 0 or update == total - 1:
                                record |= self._watch()
                                self._record(bar, "warm_start", update, record)
                            self._step_taken(bar)
        if self.taken <= total:
            self.taken = total
            if self.held_out is not None and self._judged != total:
                self._take(self.watched.weights)
                self._judge("the warm start")

    @torch.no_grad()
    def _watch(self) -> dict[str, float]:
        """The EUBO of the policy as it would be if the phase ended here, which is kept if it is the best."""
        with self.averaged():
            found = self._monitor()
            if self.held_out is not None:
                self.watched.offer(found["gain"], self._trained(), slack=found["eubo_se"])
        return found

    def _judge(self, phase: str) -> None:
        """How much closer than the prior the policy is by held-out paths and fresh rollouts; kept if nothing was clearly closer.

        All policies of a run are judged by the same noise, so that of two that hardly differ neither has the luckier rollouts.
        What is the closest already, the prior itself at first, is not judged again.
        """
        held_out, bank, alpha = self.held_out, self.bank, self.config.alpha
        assert held_out is not None and bank is not None and bank.trajectories.energy is not None
        own = -self._of_all(*self.capped(bank.trajectories.energy)).double() / alpha
        # A tilt that is steeper by the reach has a gap that is larger by its square, if log h is linear.
        reach = held_out.times
        gap_prior = reach**2 * (self._agreed(held_out.eubo) - own.mean().item() / reach)
        pairs = zip(self._trained(), self.closest.weights, strict=True)
        if self._agreed(float(all(torch.equal(weight, kept) for weight, kept in pairs))) == 1.0:
            self.improvement = self.improvement or Improvement(0.0, 0.0, gap_prior, "prior", reach)
            self._judged = self.taken
            return
        count = max(2, JUDGED // self.processes.count)
        noise = torch.Generator(self.processes.device).manual_seed(self._seed + JUDGING_SEED)
        try:
            drawn = rollout(self.prior, self.policy, count, noise, keep=False, on_step=self.processes.poll)
            drawn = self.evaluate_energy(drawn)
        except BaseException as error:
            self._leave_checkpoint(error)
            raise
        assert drawn.energy is not None and drawn.step_log_ratio is not None
        energy, valid = self.capped(drawn.energy)
        log_weight = self._of_all(-energy / alpha - drawn.step_log_ratio.sum(0), valid).double()
        _, gain, error = (self._agreed(value) for value in held_out.look(self.policy))
        nats = gain + (log_weight.mean() - own.mean()).item()
        nats = nats if math.isfinite(nats) else -math.inf
        sides = [side.std().item() / math.sqrt(len(side)) for side in (log_weight, own)]
        se = math.hypot(error / math.sqrt(self.processes.count), *sides)
        if self.closest.offer(nats, self._trained(), alike=ALIKE):
            self.improvement = Improvement(nats, se, gap_prior, phase, reach)
        elif self.improvement is None or self.improvement.nats < nats < 0:
            self.improvement = Improvement(nats, se, gap_prior, "prior", reach)
        self._judged = self.taken

    def _take_best(self) -> None:
        """End at what came closest: the updates, the warm start before them, or where it all began."""
        if self.held_out is not None:
            if self._judged != self.taken:
                self._judge("the updates")
            self._take(self.closest.weights)

    def _updates(self) -> None:
        config, chain = self.config, self.prior.chain
        first = config.warm_start_updates if config.warm_start != "none" else 0
        if self.taken == first:
            self.alpha = math.inf if config.tempering_ess else config.alpha
        chunk = 0
        bar = self._bar(config.updates, config.objective)
        with bar, self._phase(first, config.updates, config.learning_rate) as steps:
            for update in steps:
                progress = update / max(1, config.updates - 1)
                context = Context(
                    self.prior, self.policy, self.bank, config.alpha, progress, config.noise_scale, self.processes.poll
                )
                parts: dict[str, Trajectories] = {}
                terms: dict[str, float] = {}
                for name, part in self.evaluated(draw(config.shares, context, self._sizes["batch_size"], self.generator)):
                    parts[name] = part
                    if name == "on_policy":
                        terms = self.meter.term_means
                trajectories = concatenate(list(parts.values()))
                assert trajectories.energy is not None
                energy, valid = self.capped(trajectories.energy)
                usable = int(self._gather(valid).sum())
                if usable < 2:
                    raise EnergyError(
                        f"only {usable} of this update's energies are valid; the policy moved to where the energy is NaN or -inf."
                    )
                value = self._soft_values(trajectories) if self.objective.takes_soft_value else None
                batch = Batch(self.log_ratios(parts), energy, valid, trajectories.log_behavior, value)
                on_policy = len(parts["on_policy"]) if "on_policy" in parts else 0
                self._temper(batch, on_policy, progress)
                loss, g = objective_gradient(
                    self.objective,
                    batch,
                    self.alpha,
                    self.log_z,
                    config.huber,
                    gather=self._gather,
                    rank=self.processes.rank,
                    world_size=self.processes.count,
                )
                if self.bound.state is None:  # without a bank
                    self._look_at(trajectories.states)
                    self.bound.begin()
                if not chunk:
                    with self._hold():
                        chunk = chunk_rows(self.policy, chain, trajectories, config.memory_mb)
                # The last backward pass of an update is the one that the processes average.
                last = self._hold if config.forward_rows else nullcontext
                backward_trajectories(self.policy, chain, trajectories, self.scaler.scale(g), chunk, held=self._hold, last=last)
                if config.forward_rows:
                    assert self.forward_kl is not None
                    factor = self.alpha**self.objective.alpha_power
                    self.forward_kl.backward(self._sizes["forward_rows"], self.scaler.scale, factor)
                with uninterrupted():
                    nats = self._step(config.step_nats, config.learning_rate)
                    if self.objective.learns_log_z:
                        if nats is not None:
                            self._log_z_optimizer.step()
                        self._log_z_optimizer.zero_grad()
                    record: dict[str, Any] = {"loss": loss.item(), **self._batch_metrics(batch, on_policy), "step_nats": nats}
                    if nats is None:
                        record["skipped"] = True
                    if len(terms) > 1:
                        record["terms"] = {name: self._agreed(mean) for name, mean in terms.items()}
                    if update % config.monitor_every == 0 or update == config.updates - 1:
                        record |= self._monitor()
                    self._record(bar, config.objective, update, record)
                    self._step_taken(bar)

    # --- going on from where a run stopped ---------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The policy as it would be if the training ended here: with the running average of its weights, where there is one."""
        if self.average is None:
            yield
            return
        weights = [weight.clone() for weight in self._trained()]
        self._take(self.average)
        try:
            yield
        finally:
            self._take(weights)

    def _take(self, weights: list[Tensor]) -> None:
        for own, weight in zip(self._trained(), weights, strict=True):
            own.copy_(weight)

    def state(self) -> dict[str, Any]:
        """What the rest of the run depends on and every process knows, as of the last whole step, for `write_state`.

        Called by all processes. Shards are gathered for the one that writes; the others have nothing of them.
        """
        return {
            "processes": self.processes.count,
            "sharded": self.processes.sharded,
            "taken": self.taken,
            "history": self.history,
            "weights": {name: self._kept(weight) for name, weight in self._named().items()},
            "average": None if self.average is None else [self._kept(average) for average in self.average],
            "optimizer": self._kept_moments(),
            "schedule": self._schedule.state_dict(),
            "log_z_optimizer": self._log_z_optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "overflows": self._overflows,
            "skipped": self._boundary["skipped"],
            "norms": self._norms,
            "bank_ess": self.bank_ess,
            "watched": self._kept_best(self.watched),
            "closest": self._kept_best(self.closest),
            "improvement": None if self.improvement is None else asdict(self.improvement),
            "judged": self._judged,
            "counters": self._total(self._boundary["meter"]),
            **{name: self._boundary[name] for name in ("log_z", "alpha", "alpha_start", "ceiling")},
        }

    def own_state(self) -> dict[str, Any]:
        """What only this process knows of the same moment: its generator, its part of the bank and what it learned from it."""
        bank, forward, value, energy = self.bank, self.forward_kl, self.soft_value, self.meter.energy
        return {
            "bank": None if bank is None else {"states": bank.trajectories.states, "energy": bank.trajectories.energy},
            "held_out": None if self.held_out is None else self.held_out.state_dict(),
            "bound": self.bound.state_dict(),
            "soft_value": None if value is None else value.state(),
            "forward_kl": None if forward is None else forward.state(),
            "energy_cache": energy.state() if isinstance(energy, CachedEnergy) else None,
            **{name: self._boundary[name] for name in ("generator", "meter", "value_drift")},
        }

    def _between_steps(self) -> dict[str, Any]:
        """What a step that is broken off has changed already: kept as it was before."""
        meter = self.meter
        if isinstance(meter.energy, CachedEnergy):
            meter.energy.settle()
        return {
            "generator": self.generator.get_state(),
            "log_z": self.log_z.detach().clone(),
            "alpha": self.alpha,
            "alpha_start": self._alpha_start,
            "ceiling": self._ceiling,
            "meter": {name: getattr(meter, name) for name in COUNTED},
            "skipped": self._skipped,
            "value_drift": None if self.value_drift is None else self.value_drift.state_dict(),
        }

    def restore(self, state: dict[str, Any], own: dict[str, Any]) -> None:
        """Go on, in `train`, from what `state` and `own_state` returned in a run of the same config.

        On as many processes and the same kind of device it is bit for bit the same run. On another number of processes,
        each takes the part of one that there was, with noise of its own from there on: a warning says so.

        Errors: ValueError for the state of a policy that trains other weights.
        """
        weights = self._named()
        if weights.keys() != state["weights"].keys():
            raise ValueError("the checkpoint is of another policy: it trains other weights. Resume with the config of the run.")
        device = self.processes.device
        with torch.no_grad():
            for name, weight in state["weights"].items():
                weights[name].copy_(self.processes.part(weight, weights[name]))
            self.log_z.copy_(state["log_z"])
        self.taken, self.history = state["taken"], state["history"]
        self._log_z_optimizer.load_state_dict(state["log_z_optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self._overflows, self._skipped, self._norms = state["overflows"], state["skipped"], state["norms"]
        self._ceiling = state["ceiling"]
        self.alpha, self._alpha_start = state["alpha"], state["alpha_start"]
        before, now = state["processes"], self.processes.count
        if before == now:
            self.generator.set_state(own["generator"])
            if state["sharded"] != self.processes.sharded and self.processes.main:
                warnings.warn(
                    "the policy was in shards before and is not now, or the other way round: sums over the processes are rounded"
                    " otherwise from here on. Everything else is what it was.",
                    stacklevel=2,
                )
        else:
            self.generator.manual_seed(self._seed + self.taken * 1009)
            if self.processes.main:
                warnings.warn(
                    f"the run was on {before} processes and goes on with {now}: the noise is another one from here on, and"
                    f" {'some parts of the bank are left out' if now < before else 'parts of the bank are used twice'}."
                    " Everything else is what it was.",
                    stacklevel=2,
                )
        # On another number the first process carries what all had spent.
        spent = own["meter"] if before == now else state["counters"] if self.processes.main else dict.fromkeys(COUNTED, 0)
        for name in COUNTED:
            setattr(self.meter, name, spent[name])
        self.bank_ess = state["bank_ess"]
        for kept, saved in ((self.watched, state["watched"]), (self.closest, state["closest"])):
            trained = self._trained()
            weights = [self.processes.part(weight, like) for weight, like in zip(saved["weights"], trained, strict=True)]
            kept.load_state_dict({**saved, "weights": weights})
        self.improvement = None if state["improvement"] is None else Improvement(**state["improvement"])
        self._judged = state["judged"]
        self.bound.load_state_dict(own["bound"])
        if own["energy_cache"] is not None and isinstance(self.meter.energy, CachedEnergy):
            self.meter.energy.restore(own["energy_cache"])
        if own["bank"] is not None:
            kept = {name: tensor.to(device) for name, tensor in own["bank"].items()}
            self.bank = PriorBank(Trajectories(kept["states"], energy=kept["energy"]))
            if own["held_out"] is not None:
                self.held_out = HeldOut.from_state(self.prior, own["held_out"])
            if own["soft_value"] is not None:
                shape, steps = self.prior.shape, self.prior.chain.num_kernels
                self.soft_value = SoftValue.from_state(own["soft_value"], shape, steps, device)
            self.forward_kl = self._forward_kl_on(self.bank)
            self.forward_kl.restore(own["forward_kl"])
            self.value_drift = self._value_drift_on(self.bank)
            if self.value_drift is not None:
                self.value_drift.load_state_dict(own["value_drift"])
        self._restored = state

    def _restore_phase(self, state: dict[str, Any]) -> None:
        part, trained = self.processes.part, self._trained()
        moments = {
            index: {name: value if name == "step" else part(value, trained[index]) for name, value in own.items()}
            for index, own in state["optimizer"]["state"].items()
        }
        self._optimizer.load_state_dict({**state["optimizer"], "state": moments})
        self._schedule.load_state_dict(state["schedule"])
        if self.average is not None and state["average"] is not None:  # None where the phase had ended, at its average
            self.average = [part(average, weight) for average, weight in zip(state["average"], self.average, strict=True)]

    def _kept(self, tensor: Tensor) -> Tensor:
        """What a checkpoint holds of it."""
        if not self.processes.sharded:
            return tensor
        whole = self.processes.whole(tensor.detach())
        return whole.cpu() if self.processes.main else torch.empty(0)

    def _kept_best(self, kept: Kept) -> dict[str, Any]:
        state = kept.state_dict()
        return {**state, "weights": [self._kept(weight) for weight in state["weights"]]}

    def _kept_moments(self) -> dict[str, Any]:
        state = self._optimizer.state_dict()
        moments = {index: {name: self._kept(value) for name, value in own.items()} for index, own in state["state"].items()}
        return {**state, "state": moments}

    def _named(self) -> dict[str, Tensor]:
        """{name: weight} of what is trained, as it is held here."""
        pairs = zip(self._policy.named_parameters(), self.policy.parameters(), strict=True)
        return {name: weight for (name, _), weight in pairs if weight.requires_grad}

    # --- small parts ---------------------------------------------------------------------------------------------

    def _soft_values(self, trajectories: Trajectories) -> Tensor | None:
        """[num_kernels, B] log h_k(s_k) of stored states, None without a soft value."""
        if self.soft_value is None:
            return None
        kernels = self.prior.chain.num_kernels
        step = torch.zeros(len(trajectories), dtype=torch.long, device=self.prior.device)
        return torch.stack([self.soft_value(trajectories.states[k], step + k) for k in range(kernels)])

    def _temper(self, batch: Batch, on_policy: int, progress: float = 0.0) -> None:
        """Lower the temperature as far as the policy's own weights keep ``tempering_ess`` of the batch effective.

        It also falls at least geometrically from its first value to the configured one, which it reaches at half of the
        run: a target that no policy can meet at this number of steps would otherwise hold the temperature for good.
        """
        if self.alpha <= self.config.alpha:
            return
        before = self.alpha
        wanted = self._agreed(self._adequate_alpha(batch, on_policy))
        if math.isinf(before):
            self._alpha_start = wanted
        else:
            bound = math.log(self.config.alpha)
            if progress < 0.5:
                bound += (1 - 2 * progress) * (math.log(self._alpha_start) - bound)
            wanted = min(wanted, before, math.exp(bound))
        self.alpha = max(self.config.alpha, wanted)
        if self.bank is not None and self.alpha != before:
            # log Z belongs to a temperature: move the learned one along with the prior's own estimate.
            old = self.config.alpha if math.isinf(before) else before
            with torch.no_grad():
                self.log_z += self._agreed(self.bank.log_z(self.alpha) - self.bank.log_z(old))

    def _adequate_alpha(self, batch: Batch, on_policy: int) -> float:
        """The smallest temperature, from the configured one up, that keeps ``tempering_ess`` of the batch effective."""
        alpha, target = self.config.alpha, self.config.tempering_ess
        own = batch.valid[:on_policy]  # a masked energy is a placeholder, which could outweigh every real one
        ratio, energy = batch.log_ratio[:on_policy][own].detach(), batch.energy[:on_policy][own]
        return alpha if target is None or not on_policy else adequate_alpha(energy, alpha, target, ratio)

    def _gather(self, value: Tensor) -> Tensor:
        return self.processes.gather(value)

    def _agreed(self, value: float) -> float:
        """An objective of the global batch needs one temperature and one log Z."""
        return self.processes.mean(value)

    def _hold(self) -> Any:
        return self.processes.hold(self.policy)

    def _batch_metrics(self, batch: Batch, on_policy: int) -> dict[str, float]:
        """The residual of the whole batch; ELBO, ESS and log Z of its on-policy part, at the final temperature."""
        x = self._of_all(batch.log_ratio + batch.energy / self.alpha, batch.valid)
        metrics = {"alpha": self.alpha, "residual_std": x.std().item()}
        if on_policy:
            log_weight = -batch.log_ratio[:on_policy] - batch.energy[:on_policy] / self.config.alpha
            log_weight = self._of_all(log_weight, batch.valid[:on_policy])
            metrics |= {"elbo": log_weight.mean().item(), "ess": ess(log_weight), "log_z": log_mean_exp(log_weight)[0]}
        if self.objective.learns_log_z:
            metrics["log_z_learned"] = self.log_z.item()
        return metrics

    def _total(self, counts: dict[str, int]) -> dict[str, int]:
        """Over the processes."""
        mine = torch.tensor([list(counts.values())], device=self.processes.device)
        return dict(zip(counts, self._gather(mine).sum(0).tolist(), strict=True))

    def _of_all(self, value: Tensor, valid: Tensor) -> Tensor:
        """[n] of every process, without what is invalid."""
        gathered = self._gather(value.masked_fill(~valid, math.nan))
        return gathered[~gathered.isnan()]

    @torch.no_grad()
    def _monitor(self) -> dict[str, float]:
        """Of the held-out paths (`Look`): EUBO and gain, with the standard error of the gain; no energy calls."""
        self.processes.refuse_other_weights(self._trained())
        if self.held_out is None:
            return {}
        eubo, gain, error = (self._agreed(value) for value in self.held_out.look(self.policy))
        return {"eubo": eubo, "gain": gain, "eubo_se": error / math.sqrt(self.processes.count)}

    def _optimizer_for(self, learning_rate: float, updates: int) -> tuple[Any, Any]:
        parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(parameters, learning_rate)
        # OneCycleLR divides by zero where its rise has a single step (10 updates at 10%).
        total = max(4, updates)
        rise = max(0.1, 2 / total)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=total, pct_start=rise)
        return optimizer, schedule

    def _step(self, most: float, peak: float) -> float | None:
        """Move the policy by the gradient that is there, by at most ``most`` nats at the schedule's peak; returns the nats.

        None where the step is left out, and only the gradient is changed.
        """
        optimizer, schedule = self._optimizer, self._schedule
        self.scaler.unscale_(optimizer)
        norm = self.processes.whole(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)).item()
        # An enabled scaler leaves out a step that overflowed by itself, and lowers its scale.
        if not self.scaler.is_enabled() and not self._usable(norm):
            optimizer.zero_grad()
            self._log_z_optimizer.zero_grad()
            self._skipped += 1
            if self._skipped > self.config.max_skipped:
                raise FloatingPointError(
                    f"{self._skipped} steps in a row were left out, the last for a gradient of norm {norm:.3g}; the policy is as"
                    " it was before them. Lower the learning rate, or raise max_skipped."
                )
            return None
        self._skipped = 0
        self._norms = [*self._norms, norm][-NORMS:]
        scale = self.scaler.get_scale()
        self._torn = True
        before = [weight.clone() for weight in self._trained()]
        limit = most * max(FLOOR, (schedule.get_last_lr()[0] / peak) ** 2)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()
        if self.scaler.get_scale() < scale:  # the gradient overflowed, and the step was left out
            self._overflows += 1
            if self._overflows > MAX_OVERFLOWS:
                raise FloatingPointError(
                    f"the float16 gradient overflowed {self._overflows} times in a row; use bf16 or float32, or lower the"
                    " learning rate."
                )
            return None
        self._overflows = 0
        nats = self.bound.shorten(before, self._trained(), limit)
        schedule.step()
        if self.average is not None:
            # Slow averages of a short run would hold its start: the decay grows with the steps taken.
            taken = schedule.last_epoch
            decay = min(self.config.ema_decay, taken / (taken + 9))
            torch._foreach_lerp_(self.average, self._trained(), 1 - decay)
        return nats

    def _usable(self, norm: float) -> bool:
        """Whether a gradient of this norm is finite, and no spike where those are left out."""
        spike = self.config.spike_factor
        if spike is not None and len(self._norms) == NORMS and norm > spike * statistics.median(self._norms):
            return False
        return math.isfinite(norm)

    def _trained(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.policy.parameters() if parameter.requires_grad]

    def _step_taken(self, bar: Any) -> None:
        """The run is whole again: nothing of the last step is left over."""
        self.taken += 1
        bar.update(1)
        self._boundary = self._between_steps()
        self._torn = False
        every = self.config.checkpoint_every
        if self._on_checkpoint is not None and every and self.taken % every == 0:
            self._on_checkpoint(self)

    def _bar(self, total: int, name: str) -> Any:
        from tqdm import tqdm

        quiet = not self.progress or not self.processes.main
        return tqdm(total=total, desc=name, disable=quiet, dynamic_ncols=True, mininterval=0.5)

    def _record(self, bar: Any, phase: str, update: int, values: dict[str, Any]) -> None:
        meter = self.meter
        counts = self._total({name: getattr(meter, name) for name in COUNTED})
        counts = {COUNTED[name]: count for name, count in counts.items()}
        record = {"phase": phase, "update": update, **values, **counts}
        self.history.append(record)  # no clock in it: the same config gives the same lines, to the last bit
        shown = {key: f"{record[key]:.3g}" for key in ("elbo", "eubo", "ess", "log_z", "alpha") if key in record}
        bar.set_postfix(**shown, energy_calls=record["energy_calls"], refresh=False)
        if self.metrics is not None and self.processes.main:
            with self.metrics.open("a") as file:
                file.write(strict_json(record) + "\n")
        if self._on_record is not None and self.processes.main:
            self._on_record(self.taken, record)
