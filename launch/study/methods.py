"""The methods of the study of dimensions, each with a config that spends a given number of energy calls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ...finetune.config.train import ObjectiveName, TrainConfig
from ...finetune.learning.monitor import JUDGED
from ...finetune.learning.preparation import HELD_OUT
from ...finetune.learning.trainer import Trainer, TrainState
from ...samplers.make_policy import make_policy
from ...tasks import tilted_mixture
from .problem import Problem
from .training import from_the_prior

PROBE = 12  # calls with which every training examines its energy
SMALLEST = 10  # prior paths from which a population may climb: two on each island
LEARNING_RATE, LOG_Z_LEARNING_RATE = 3e-3, 0.3
WARM_START_UPDATES, WARM_START_ROWS = 4, 1024  # updates of the warm start for each one that an on-policy training has
TRIALS = 8  # of the size of a population that climbs
SOFT_VALUE_UPDATES = 400
UNSPENT = 0.01  # share of the calls that a climb may leave without another trial of its size


@dataclass(frozen=True)
class Method:
    """label: in tables and figures. behavior: where its trajectories come from; None for the default recipe. epochs: gradient
    steps on each batch. half_path: consistency over half of the path at a time, with a soft value learned on a population first.
    """

    label: str
    objective: ObjectiveName
    behavior: str | None
    population: Literal["importance", "smc"] = "importance"
    epochs: int = 1
    half_path: bool = False


ON_POLICY = {
    "reinforce_kl": Method("REINFORCE-KL, on-policy", "reinforce_kl", "on_policy"),
    "rtb": Method("RTB, on-policy", "rtb", "on_policy"),
}
OFF_POLICY = {
    "rtb_prior": Method("RTB, prior", "rtb", "prior"),
    "rtb_inflated": Method("RTB, inflated noise", "rtb", "inflated"),
    "rtb_tilted_prior": Method("RTB, tilted prior", "rtb", "tilted_prior"),
    "rtb_noised_back": Method("RTB, noised back", "rtb", "noised_back"),
    "rtb_climbed": Method("RTB, climbed population", "rtb", "tilted_prior", "smc"),
}
FURTHER = {
    "ppo_kl": Method("PPO with the KL, on-policy", "ppo_kl", "on_policy", epochs=2),
    "trust_pcl": Method("Trust-PCL over half paths, on-policy", "trust_pcl", "on_policy", half_path=True),
}
COMPARATORS = {"ddpo": Method("DDPO: another target", "ddpo", "on_policy")}
RECIPE = {"recipe": Method("default recipe", "log_variance", None)}
METHODS = ON_POLICY | OFF_POLICY | FURTHER | COMPARATORS | RECIPE
WEIGHTED = {  # no training: a population by its weights alone, and the method that trains on such a one
    "snis": ("prior paths by weight (SNIS)", OFF_POLICY["rtb_tilted_prior"]),
    "smc": ("climbed population by weight (SMC)", OFF_POLICY["rtb_climbed"]),
}
LABELS = {name: method.label for name, method in METHODS.items()} | {name: label for name, (label, _) in WEIGHTED.items()}
PRIOR = "prior"  # what all of them begin at


def train_config(method: Method, problem: Problem, updates: int, batch_size: int) -> TrainConfig:
    """A training that makes `PROBE` + ``updates`` · ``batch_size`` energy calls, as many as an on-policy one of these updates.

    A population takes all of them, together with its held-out paths, and has as many updates. One that climbs takes at most so
    many: how many temperatures it needs is not known before. A soft value takes half of the calls for its population.
    """
    if method.behavior is None:
        return _recipe(problem, updates, batch_size)
    calls = updates * batch_size
    config = from_the_prior(
        problem.seed,
        updates,
        batch_size,
        LEARNING_RATE,
        objective=method.objective,
        behavior={method.behavior: 1.0},
        log_z_learning_rate=LOG_Z_LEARNING_RATE,
        population=method.population,
        epochs=method.epochs,
    )
    if method.half_path:
        drawn = updates // 2
        return replace(
            config,
            updates=drawn,
            monitor_every=drawn,
            horizon=max(1, problem.prior.chain.num_steps // 2),
            soft_value_updates=SOFT_VALUE_UPDATES,
            population_size=importance_size(calls - drawn * batch_size),
        )
    if method.population == "smc":
        return replace(config, population_size=_climbing_size(problem, config, calls))
    return replace(config, population_size=importance_size(calls))


def _recipe(problem: Problem, updates: int, batch_size: int) -> TrainConfig:
    """The task's recipe at this size: a quarter of the calls for on-policy halves of batches, the others for the population, and
    for judging the warm start and the updates."""
    config = tilted_mixture.recipe(problem.prior.shape[0], problem.seed).train
    calls, half = updates * batch_size, batch_size // 2
    on_policy = updates // 2 * half
    return replace(
        config,
        updates=updates // 2,
        batch_size=2 * half,
        warm_start_updates=WARM_START_UPDATES * updates,
        warm_start_rows=WARM_START_ROWS,
        population="importance",
        population_size=importance_size(calls - on_policy - 2 * JUDGED),
        checkpoint_every=0,
        monitor_every=updates,
        seed=problem.seed,
    )


def importance_size(calls: int) -> int:
    """The population that takes so many calls, the held-out paths beside it included.

    Errors: ValueError where there is none.
    """
    size = calls - min(HELD_OUT, calls // 5)
    if size < 2 or size + min(HELD_OUT, size // 4) != calls:
        raise ValueError(f"no population and a quarter of it held out take {calls} energy calls; take one call more.")
    return size


def _climbing_size(problem: Problem, config: TrainConfig, calls: int) -> int:
    """The population whose climb takes the most calls up to this number, of `TRIALS`, which are not counted themselves.

    Errors: ValueError where all of them take more.
    """
    needed: dict[int, int] = {}
    size = SMALLEST
    for _ in range(TRIALS):
        needed[size] = _climbing_calls(problem, replace(config, population_size=size))
        if 0 <= calls - needed[size] <= UNSPENT * calls:
            break
        # In proportion; one temperature more or less, and the next one is beside it.
        size = max(SMALLEST, size * calls // needed[size])
        while size in needed and size > SMALLEST:
            size -= 1
        if size in needed:
            break
    fitting = [size for size in needed if needed[size] <= calls]
    if not fitting:
        raise ValueError(f"a population that climbs takes {min(needed.values()):,} energy calls, and the budget is {calls:,}.")
    return max(fitting, key=lambda size: needed[size])


def _climbing_calls(problem: Problem, config: TrainConfig) -> int:
    """Energy calls of the preparation, the probe excluded."""
    return prepared(problem, config).energies.meter.calls - PROBE


def prepared(problem: Problem, config: TrainConfig) -> TrainState:
    """A training that has its population, and nothing more."""
    trainer = Trainer(problem.prior, problem.energy, config, policy=make_policy(problem.prior), progress=False)
    trainer.state.preparation.run(trainer.state.log_z)
    return trainer.state
