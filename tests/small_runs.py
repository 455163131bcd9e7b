"""Small runs of all that is checked, for ``pytest --check-shapes`` (`test_shapes`): they pass where every shape is as stated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from jaxtyping import TypeCheckError
from torch import Tensor, nn

from tiltune.finetune.certificate.deployment import deployment_metrics
from tiltune.finetune.certificate.evidence import gather_evidence
from tiltune.finetune.certificate.path_metrics import expectation, path_metrics
from tiltune.finetune.certificate.verdict import judge_unknown
from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.estimators import ess
from tiltune.finetune.learning.batch import Batch
from tiltune.finetune.learning.behaviors import BEHAVIORS
from tiltune.finetune.learning.objective_table import OBJECTIVES
from tiltune.finetune.learning.trainer import Trainer
from tiltune.samplers.bridge import bridge_of, noise_back
from tiltune.samplers.chain import Chain
from tiltune.samplers.denoiser import ResidualDenoiser
from tiltune.samplers.inflated import inflated_rollout
from tiltune.samplers.loading.pretrained import load_prior
from tiltune.samplers.log_ratio import step_log_ratio
from tiltune.samplers.make_policy import make_policy
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.prior import Prior
from tiltune.samplers.resampling import importance_resample
from tiltune.samplers.rollout import rollout
from tiltune.samplers.schedulers.brownian import brownian_chain
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler
from tiltune.samplers.trained_steps import with_trained_steps
from toys.conditional import Conditional, ConditionalShift
from toys.linear_gaussian import LinearGaussian
from toys.moved_policy import moved_policy

STEPS = 5
CHAINS: dict[str, Any] = {
    "brownian": lambda: brownian_chain(STEPS),
    "ddpm": lambda: chain_from_scheduler(DDPMScheduler(variance_type="fixed_large"), STEPS),
    "ddpm, window": lambda: with_trained_steps(chain_from_scheduler(DDPMScheduler(clip_sample=False), STEPS), 1, 2),
    "ddim": lambda: chain_from_scheduler(DDIMScheduler(), STEPS),
    "euler ancestral": lambda: chain_from_scheduler(EulerAncestralDiscreteScheduler(), STEPS),
    "flow": lambda: chain_from_scheduler(FlowMatchEulerDiscreteScheduler(), STEPS),
    "flow stochastic": lambda: chain_from_scheduler(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), STEPS),
}
RECIPES: dict[str, dict[str, Any]] = {
    "rtb": {"warm_start": "tlm", "epochs": 2, "clip": 0.1, "step_share": 0.5},
    "log_variance": {"warm_start": "value_drift", "soft_value_updates": 4, "forward_rows": 16, "ema_decay": 0.9},
    "trust_pcl": {"warm_start": "tlm", "soft_value_updates": 4},
    "reinforce_kl": {"warm_start": "none", "soft_value_updates": 4},
    "ppo_kl": {"warm_start": "none", "soft_value_updates": 4, "epochs": 2},
    "tlm": {"warm_start": "tlm"},
    "ddpo": {"warm_start": "none", "tempering_ess": None},
    "grpo": {"warm_start": "none", "tempering_ess": None},
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- what is checked --------------------------------------------------------------------------------------------------------


def test_a_wrong_shape_is_refused() -> None:
    kernel, state = brownian_chain(STEPS).kernel, torch.zeros(3, 2)
    kernel.mean(state, 0, state)
    with pytest.raises(TypeCheckError, match="'output'"):
        kernel.mean(state, 0, state[:1])  # one output for three states, which torch would broadcast
    with pytest.raises(TypeCheckError, match="'energy'"):
        Batch(torch.zeros(STEPS, 3), torch.zeros(3, 1), torch.ones(3, dtype=torch.bool))


def test_a_wrong_dtype_is_refused() -> None:
    assert ess(torch.zeros(3)) == 1.0
    with pytest.raises(TypeCheckError, match="'log_weight'"):
        ess(torch.zeros(3, dtype=torch.long))
    with pytest.raises(TypeCheckError, match="'valid'"):
        Batch(torch.zeros(STEPS, 3), torch.zeros(3), torch.ones(3))


def test_a_wrong_result_is_refused() -> None:
    prior = Prior(lambda state, timestep, condition: state[:1], brownian_chain(STEPS), (2,))
    with pytest.raises(TypeCheckError, match="return value"):
        rollout(prior, None, 3, seeded())


# --- chains -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", [make() for make in CHAINS.values()], ids=CHAINS)
def test_every_chain(chain: Chain) -> None:
    prior, policy = moved_policy(chain, seeded())
    drawn = rollout(prior, policy, 7, seeded())
    assert drawn.select(torch.tensor([1, 2])).step_log_ratio is not None
    step_log_ratio(chain, prior.denoiser, policy, drawn, chunk=4)
    rollout(prior, policy, 7, seeded(), drawn_by="prior", keep=False)
    inflated_rollout(prior, policy, 7, seeded(), 1.5)
    step = torch.full((7,), chain.trained[0])
    state, output = drawn.states[chain.trained[0]], torch.ones_like(drawn.terminal)
    following = drawn.states[chain.trained[0] + 1]
    for at in (step, chain.trained[0]):
        shift = chain.kernel.shift(state, at, output, -output, straight=True)
        chain.kernel.reachable(state, at, output, shift)
        chain.kernel.log_density(following, state, at, output)
        chain.kernel.clean(state, at, output)
    try:
        bridge = bridge_of(chain)
    except ValueError:  # a chain that cannot be noised back
        return
    bridge.mean(state, drawn.terminal, step)
    noise_back(prior, drawn.terminal, seeded())


# --- training ---------------------------------------------------------------------------------------------------------------


def recipe(objective: str) -> TrainConfig:
    """A few steps of everything that goes with an objective, on all behaviors that it can learn from."""
    behaviors = [name for name in BEHAVIORS if name in OBJECTIVES[objective].behaviors]
    small: dict[str, Any] = {"updates": 3, "batch_size": 10 * len(behaviors), "population_size": 400, "warm_start_updates": 4}
    shares = {name: 1 / len(behaviors) for name in behaviors}
    rows = {"warm_start_rows": 32, "monitor_every": 1, "noise_scale": 1.2}
    return TrainConfig(objective=objective, behavior=shares, **small, **rows, **RECIPES[objective])  # pyright: ignore


def residual(prior: Prior) -> nn.Module:
    return ResidualDenoiser(prior.denoiser, MLPDenoiser(dim=2, width=8, depth=1, fourier_features=2))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_on_one_law(objective: str) -> None:
    mean, slope = torch.zeros(2, dtype=torch.float64), torch.tensor([0.6, 0.3], dtype=torch.float64)
    task = LinearGaussian(brownian_chain(STEPS), mean, slope, 1.5)
    prior = task.prior()
    trainer = Trainer(prior, task.energy, recipe(objective), policy=residual(prior), progress=False)
    result = trainer.train()
    again = Trainer(prior, task.energy, recipe(objective), policy=residual(prior), progress=False)
    again.load_state_dict(trainer.state_dict(), trainer.own_state_dict())
    result.policy.sample(7, batch=4)
    if objective != "rtb":  # what follows asks for no objective
        return
    importance_resample(result.policy, lambda x: -task.energy(x), 4, seeded(), proposals=16)
    evidence = gather_evidence(prior, result.policy, task.energy, task.alpha, seeded(), size=2500, starts=4, rollouts=4)
    judge_unknown(evidence, path_metrics(evidence))
    expectation(evidence, lambda x: x[:, 0])


@pytest.mark.parametrize("objective", ["rtb", "ppo_kl", "tlm"])
def test_objectives_on_several_conditions(objective: str) -> None:
    chain = chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", clip_sample=False), STEPS)
    problem = Conditional(chain, torch.tensor([[1.0, -0.5], [-1.2, 0.4]], dtype=torch.float64))
    prior = problem.prior()
    trainer = Trainer(prior, problem.energy, recipe(objective), policy=ConditionalShift(problem), progress=False)
    result = trainer.train()
    again = Trainer(prior, problem.energy, recipe(objective), policy=ConditionalShift(problem), progress=False)
    again.load_state_dict(trainer.state_dict(), trainer.own_state_dict())
    gather_evidence(prior.only(1), result.policy.only(1), problem.energy, 1.0, seeded(), size=40, starts=4, rollouts=4)


@pytest.mark.parametrize("kind", ["full", "lora", "residual"])
def test_every_kind_of_policy_on_images(prior: Path, kind: Any) -> None:
    """A pipeline of diffusers, trained with a soft value, judged, and drawn by deployed samplers."""

    def energy(x: Tensor) -> Tensor:
        return x.mean((1, 2, 3))

    loaded = load_prior(prior, 3)
    config = TrainConfig(
        updates=1, batch_size=8, population_size=64, warm_start="value_drift", warm_start_updates=1, soft_value_updates=1
    )
    policy = make_policy(loaded, kind, rank=2)
    trained = Trainer(loaded, energy, config, policy=policy, progress=False).train().policy
    evidence = gather_evidence(loaded, trained, energy, 1.0, seeded(), size=128, starts=2, rollouts=2)
    deployment_metrics(trained, energy, evidence, seeded(), 64)
