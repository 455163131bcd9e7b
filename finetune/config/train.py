"""What a training run depends on, next to the prior and the energy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from .refusals import refuse

ObjectiveName = Literal["rtb", "log_variance", "trust_pcl", "reinforce_kl", "ppo_kl", "tlm", "ddpo", "grpo"]
BEHAVIOR_NAMES = ("on_policy", "prior", "inflated", "tilted_prior", "noised_back", "replay")
CLIP = 0.2  # of objectives that always have one
COMPARATOR_NAMES = ("ddpo", "grpo")  # which do not target the tilted law
ALWAYS_CLIPPED = ("ppo_kl", *COMPARATOR_NAMES)  # around the policy that drew
CLIPPED_NAMES = ("rtb", "log_variance", "trust_pcl", *ALWAYS_CLIPPED)


@dataclass(frozen=True)
class TrainConfig:
    """Everything a training run depends on, next to the prior and the energy.

    Errors: ValueError for a value no run can have, before any work is done.
    """

    objective: ObjectiveName = "log_variance"
    """What is minimised; all but ddpo and grpo share their optimum, the tilted law, which these two do NOT target."""
    alpha: float = 1.0
    """Temperature: the target is p_prior · exp(-E/alpha)."""
    behavior: dict[str, float] | None = None
    """Share of each behavior in a batch. None: half on_policy, half tilted_prior; reinforce_kl, ppo_kl, ddpo and grpo on_policy;
    tlm tilted_prior."""
    updates: int = 40
    """Batches of trajectories that the objective takes gradient steps on, after the warm start."""
    batch_size: int = 384
    """Trajectories an update, over all processes."""
    learning_rate: float = 2e-4
    """Peak of a one-cycle schedule."""
    epochs: int = 1
    """Gradient steps on each batch of trajectories. From the second one on the policy is no longer the one that drew them, which
    rtb, log_variance and trust_pcl allow, reinforce_kl weights as far as the weights carry, and a clip bounds. A signal waits
    for all of them."""
    clip: float | None = None
    """For rtb, log_variance, trust_pcl and ppo_kl: from the second epoch on, a step of a trajectory counts only while the
    policy's density there is within 1 ± clip of what it was at the first. None: no clip; .2 for ppo_kl, ddpo and grpo."""
    step_share: float = 1.0
    """Share of each trajectory's steps whose gradient an update computes. They are drawn anew each time and weighted by the
    inverse of their probability, so that the gradient is the same in the mean."""
    horizon: int | None = None
    """For rtb and trust_pcl: they ask for consistency over every so many steps. Between them stands a soft value, which starts
    as the population's (soft_value_updates) and learns with the policy. 1: detailed balance. None: over the whole path."""
    log_z_learning_rate: float = 0.02
    """For objectives that learn log Z."""
    step_nats: float = 1.0
    """A gradient step is shortened where it would move the policy by more than this, nats of KL(before || after); the schedule of
    the learning rate lowers the bound with its square."""
    warm_start: Literal["tlm", "value_drift", "none"] = "tlm"
    """Before the objective, on prior trajectories and nearly free. tlm: forward-KL fit to those weighted by exp(-E/alpha).
    value_drift: regression on the soft value's gradient, which has no sampling noise; for priors about which nothing is known."""
    warm_start_updates: int = 1400
    """Gradient steps of the warm start."""
    warm_start_rows: int = 4096
    """Transitions an update of the warm start."""
    warm_start_learning_rate: float = 3e-3
    """Peak of the warm start's own one-cycle schedule."""
    warm_start_step_nats: float = 1.0
    """step_nats of the warm start. value_drift moves by at most what its targets ask for, and by less once they gain no more."""
    soft_value_updates: int = 0
    """Updates of a learned soft value, log E_prior[exp(-E/alpha) | state]: it takes variance out of the warm start and is the
    baseline of reinforce_kl. Worth its time on images, where the population has few effective paths. 0: none."""
    population_size: int = 14_000
    """Prior trajectories drawn once, with their energies, for the warm start and the behaviors that need them."""
    population: Literal["auto", "importance", "smc"] = "auto"
    """What stands for the target before the policy does. importance: prior trajectories weighted by exp(-E/alpha). smc: prior
    trajectories that climb to the target by tempered sequential Monte Carlo. auto: smc where too few of them have weight."""
    forward_rows: int = 0
    """Transitions from which every update learns what the warm start followed, in the objective's own units, so that what it has
    covered stays covered: the forward KL on the population's tilted paths, or the targets of value_drift. Needs the soft value.
    0: none."""
    tempering_ess: float | None = 0.3
    """Raise alpha until this share of a batch is effective, and lower it as the policy follows. None: never."""
    huber: float | None = 20.0
    """Residuals beyond this many nats count linearly. None: never."""
    max_energy: float = 30.0
    """E/alpha is capped this many nats above the lowest tenth of what the policy draws in a batch, or four of that tenth's
    own widths where this is more; what +inf becomes in training."""
    noise_scale: float = 1.5
    """Initial noise inflation of the behavior 'inflated', annealed to 1."""
    max_grad_norm: float = 10.0
    """Norm to which gradients are clipped."""
    ema_decay: float = 0.0
    """Each phase ends at the running average of its weights, with at most this decay; the metrics are of the weights that move.
    0: at its last weights."""
    spike_factor: float | None = None
    """Leave out a step whose gradient norm is over this many times the median of the last 20; None clips and takes it."""
    max_skipped: int = 10
    """Steps left out in a row, for spikes or gradients that are not finite, above which the run stops."""
    memory_mb: float = 64.0
    """What autograd may keep for one chunk of the second pass."""
    max_kl: float | None = None
    """Budget of nats: the updates end once KL(policy || prior), of any prompt or label, is above it by 2.6 of its standard errors
    in an update's own rollouts. None: no budget."""
    max_invalid: float = 0.05
    """Share of NaN or -inf energies above which the run stops."""
    monitor_every: int = 20
    """Updates between two EUBO points, on the held-out paths; no energy calls."""
    checkpoint_every: int = 25
    """Steps of warm start and updates between two checkpoints of a run folder; 0 for none."""
    process_timeout: float = 600.0
    """Seconds that one process of several waits for another, which may be in its energy, before the run ends."""
    seed: int = 0
    """Of all noise in the training; the processes draw different noise from it."""

    def __post_init__(self) -> None:
        self._refuse_numbers()
        self._refuse_pairs()
        self._refuse_behaviors()

    def _refuse_numbers(self) -> None:
        names = get_args(ObjectiveName)
        refuse(self.objective not in names, f"unknown objective {self.objective!r}; choose one of {', '.join(names)}.")
        refuse(
            not (self.alpha > 0 and self.alpha < float("inf")),
            f"alpha is {self.alpha}; the target p_prior · exp(-E/alpha) needs a temperature alpha > 0.",
        )
        positive = (
            "batch_size learning_rate log_z_learning_rate warm_start_rows warm_start_learning_rate population_size max_energy"
        )
        for name in f"{positive} max_grad_norm memory_mb monitor_every process_timeout step_nats warm_start_step_nats".split():
            refuse(not getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be positive.")
        refuse(self.epochs < 1, f"epochs is {self.epochs}; a batch serves for one gradient step at least.")
        refuse(not 0 < self.step_share <= 1, f"step_share is {self.step_share}; it is a share, above 0 and at most 1.")
        refuse(self.clip is not None and not 0 < self.clip < 1, f"clip is {self.clip}; give a share between 0 and 1, or None.")
        kinds = ("auto", "importance", "smc")
        refuse(self.population not in kinds, f"population is {self.population!r}; choose one of {', '.join(kinds)}.")
        refuse(not 0 <= self.ema_decay < 1, f"ema_decay is {self.ema_decay}; it is a share, at least 0 and below 1.")
        refuse(not 0 <= self.max_invalid <= 1, f"max_invalid is {self.max_invalid}; it is a share, between 0 and 1.")
        for name in ("updates", "warm_start_updates", "soft_value_updates", "forward_rows", "checkpoint_every", "max_skipped"):
            refuse(getattr(self, name) < 0, f"{name} is {getattr(self, name)}; it must not be negative.")
        refuse(self.batch_size < 2, "batch_size must be at least 2: baselines and variances compare trajectories.")
        starts = ("tlm", "value_drift", "none")
        refuse(self.warm_start not in starts, f"warm_start is {self.warm_start!r}; choose one of {', '.join(starts)}.")
        refuse(self.noise_scale < 1, f"noise_scale is {self.noise_scale}; inflated noise is at least 1.")
        refuse(
            self.tempering_ess is not None and not 0 < self.tempering_ess < 1,
            f"tempering_ess is {self.tempering_ess}; it is a share of the batch, between 0 and 1, or None.",
        )
        spike = self.spike_factor
        refuse(
            spike is not None and not spike > 1, f"spike_factor is {spike}; a spike is over once the median: give more than 1."
        )
        refuse(self.max_kl is not None and not self.max_kl > 0, f"max_kl is {self.max_kl}; give positive nats, or None.")
        refuse(self.huber is not None and not self.huber > 0, f"huber is {self.huber}; give positive nats, or None.")

    def _refuse_pairs(self) -> None:
        """Settings that do not go together."""
        refuse(
            self.forward_rows > 0 and not self.soft_value_updates,
            "forward_rows needs soft_value_updates: without the control variate the population's few effective paths would be"
            " learned by heart, update after update.",
        )
        refuse(
            self.horizon is not None and self.objective not in ("rtb", "trust_pcl"),
            f"horizon is {self.horizon}, and {self.objective} is no function of parts of a path; rtb and trust_pcl are.",
        )
        refuse(self.horizon is not None and self.horizon < 1, f"horizon is {self.horizon}; it is a number of steps, 1 or more.")
        refuse(
            self.horizon is not None and not self.soft_value_updates,
            f"horizon {self.horizon} needs a value of the states between: give soft_value_updates, 1500 say.",
        )
        refuse(
            self.objective in COMPARATOR_NAMES
            and (self.warm_start != "none" or self.forward_rows > 0 or self.tempering_ess is not None),
            f"{self.objective} is there to compare with, from the prior on and at one alpha: give warm_start none,"
            " tempering_ess None, and no forward_rows.",
        )
        refuse(
            self.clip is not None and self.objective not in CLIPPED_NAMES,
            f"clip is {self.clip}, and {self.objective} has none; {', '.join(CLIPPED_NAMES)} have.",
        )
        refuse(
            self.clip is not None and self.horizon is not None,
            f"clip is {self.clip}, which is for whole paths; leave out horizon {self.horizon}, or the clip.",
        )
        refuse(
            self.warm_start == "value_drift" and not self.soft_value_updates,
            "warm_start value_drift needs a soft value to take the gradient of; give soft_value_updates, 400 say.",
        )
        refuse(
            self.soft_value_updates > 0 and self.population_size < 2,
            f"population_size is {self.population_size}; the soft value is learned on two halves of the population, so"
            " give at least 2.",
        )
        refuse(
            self.max_kl is not None and not (self.updates and "on_policy" in self.shares),
            f"max_kl is {self.max_kl}, and is watched on what the policy draws for updates; give updates, and on_policy a share.",
        )

    def _refuse_behaviors(self) -> None:
        for name, share in self.shares.items():
            refuse(name not in BEHAVIOR_NAMES, f"unknown behavior {name!r}; choose from {', '.join(BEHAVIOR_NAMES)}.")
            refuse(not share > 0, f"the share of behavior {name} is {share}; leave it out instead.")
        refuse(
            abs(sum(self.shares.values()) - 1) > 1e-6,
            f"the behavior shares {self.shares} sum to {sum(self.shares.values()):g}; they must sum to 1.",
        )
        refuse(
            self.objective == "reinforce_kl" and "noised_back" in self.shares,
            "reinforce_kl cannot use noised_back trajectories: off-policy it weights by policy/behavior, and the density of"
            " their terminal samples is unknown. Use on_policy, prior, inflated or tilted_prior, or the objective"
            " rtb, log_variance or trust_pcl, which need no density.",
        )
        refuse(
            self.objective in ALWAYS_CLIPPED and set(self.shares) != {"on_policy"},
            f"{self.objective} clips by the policy that drew, and {', '.join(set(self.shares) - {'on_policy'})} trajectories"
            " were drawn otherwise. Use behavior on_policy, or rtb, log_variance or trust_pcl with clip.",
        )
        refuse(
            "replay" in self.shares and "on_policy" not in self.shares,
            "replay hands out what earlier updates drew on-policy, and no update would; give behavior on_policy a share too.",
        )
        refuse(
            self.objective == "tlm" and not set(self.shares) <= {"tilted_prior", "noised_back"},
            "tlm maximizes the likelihood of trajectories of the tilted law; on others it fits the wrong law."
            " Use behavior tilted_prior or noised_back.",
        )

    @property
    def shares(self) -> dict[str, float]:
        """The behavior shares in force, on_policy first."""
        if self.behavior is not None:
            return dict(sorted(self.behavior.items(), key=lambda item: item[0] != "on_policy"))
        if self.objective == "tlm":
            return {"tilted_prior": 1.0}
        if self.objective in ("reinforce_kl", *ALWAYS_CLIPPED):
            return {"on_policy": 1.0}
        return {"on_policy": 0.5, "tilted_prior": 0.5}

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "behavior": self.shares}
