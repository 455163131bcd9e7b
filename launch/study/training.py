"""One training of a study: what a policy is after some of its updates, and what that took."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ...finetune.config.train import TrainConfig
from ...finetune.distributed.signals import Preempted
from ...finetune.energies.energy import Energy
from ...finetune.energies.error import EnergyError
from ...finetune.learning.objectives import CollapsedWeights
from ...finetune.learning.trainer import Trainer, TrainState
from ...samplers.denoiser import ResidualDenoiser
from ...samplers.make_policy import make_policy
from ...samplers.policy import Policy
from .problem import Problem, measure
from .table import Row

MOST = 1e4  # nats, as which a policy counts that is further away, or no longer gives numbers
WORST = {"component_tv": 1.0, "mode_tv": 1.0, "ess_share": 0.0, "elbo": -MOST}


def from_the_prior(seed: int, updates: int, batch_size: int, learning_rate: float, **changes: Any) -> TrainConfig:
    """On-policy from the prior on, at the target's temperature and without checkpoints, but for ``changes``."""
    shared: dict[str, Any] = {
        "behavior": {"on_policy": 1.0},
        "updates": updates,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "warm_start": "none",
        "tempering_ess": None,
        "monitor_every": updates,
        "checkpoint_every": 0,
        "seed": seed,
    }
    return TrainConfig(**(shared | changes))


def trained(
    problem: Problem,
    config: TrainConfig,
    at: Sequence[int] = (),
    look: Callable[[Problem, Policy], Row] | None = None,
    energy: Energy | None = None,
) -> tuple[list[Row], TrainState]:
    """Train from the prior on; a row after each of these updates (1 is the first), or one at the end where none are named.

    A row has calls, network_evaluations, diverged and what ``look`` measures, by default `measure`. After the last update that is
    the policy as it is: whether another one was closer is not asked. At the end it is what the training ends with. energy: what
    is trained with, in place of the problem's. A training that ends for gradients or samples that are not finite, or for weights
    that rest on a few trajectories, has diverged, and is measured as it stands.
    """
    policy = make_policy(problem.prior)
    meter = Evaluations(*_networks(policy, problem))
    rows: list[Row] = []

    def note(calls: int, *, diverged: bool = False) -> None:
        spent = meter.count
        found = {name: bounded(name, value) for name, value in (look or measure)(problem, policy).items()}
        meter.count = spent  # measuring is not training
        rows.append({"calls": calls, "network_evaluations": spent, "diverged": int(diverged), **found})

    def on_record(step: int, line: dict[str, Any]) -> None:
        if line["phase"] == config.objective and line["update"] + 1 in at:
            note(line["energy_calls"])

    trainer = Trainer(problem.prior, energy or problem.energy, config, policy=policy, progress=False, on_record=on_record)
    with meter:
        try:
            result = trainer.train()
        except (FloatingPointError, EnergyError, CollapsedWeights):
            while len(rows) < max(1, len(at)):
                note(trainer.state.energies.meter.calls, diverged=True)
            return rows, trainer.state
        if result.interrupted:  # the trainer keeps what is trained; half of a run is none
            raise Preempted if result.preempted else KeyboardInterrupt
        if not at:
            note(result.energy_calls)
    return rows, trainer.state


def _networks(policy: Policy, problem: Problem) -> list[nn.Module]:
    network = policy.denoiser
    assert isinstance(problem.prior.denoiser, nn.Module)
    return [network.residual if isinstance(network, ResidualDenoiser) else network, problem.prior.denoiser]


def bounded(name: str, value: Any) -> Any:
    """A number that can be averaged; where it is none, the worst that ``name`` can be."""
    if not isinstance(value, float):
        return value
    return WORST.get(name, MOST) if math.isnan(value) else max(-MOST, min(MOST, value))


class Evaluations:
    """Counts states that networks are called with, within its block; count: so far, of all of them."""

    def __init__(self, *networks: nn.Module) -> None:
        self._networks, self.count = networks, 0

    def _note(self, network: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.count += len(inputs[0])

    def __enter__(self) -> Evaluations:
        self._hooks = [network.register_forward_hook(self._note) for network in self._networks]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
