"""Trust-PCL and RTB over parts of a path: one loss, zero at the tilted law for every horizon, and a value that is learned."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.learning.batch import Batch
from tiltune.finetune.learning.gradients import objective_gradient
from tiltune.finetune.learning.objective_table import OBJECTIVES, objective_of
from tiltune.finetune.learning.path_consistency import path_consistency, sub_trajectory_rtb
from tiltune.finetune.learning.trainer import Trainer
from tiltune.samplers.denoiser import ResidualDenoiser
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.policy import Policy
from tiltune.samplers.prior import Prior
from tiltune.samplers.rollout import rollout
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler
from toys.linear_gaussian import LinearGaussian

VP = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}
ALPHAS, STEPS, COUNT = (0.1, 0.5, 2.0), 7, 12


def make_batch(masked: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ratio, value = torch.randn(2, STEPS, COUNT, generator=generator, dtype=torch.float64)
    energy = 3 * torch.randn(COUNT, generator=generator, dtype=torch.float64)
    return Batch(ratio, energy, torch.arange(COUNT) < COUNT - masked, ratio.sum(0), value)


def by_loops(batch: Batch, alpha: float, log_z: Tensor, horizon: int) -> Tensor:
    """½ (-V_k + V_{k+d} - alpha sum l)², one window at a time, of which every step is in d; the mean over valid trajectories."""
    assert batch.soft_value is not None
    losses: list[Tensor] = []
    for b in batch.valid.nonzero()[:, 0]:
        for first in range(1 - horizon, STEPS):
            k, end = max(first, 0), min(first + horizon, STEPS)
            value = alpha * (batch.soft_value[k, b] + log_z)
            after = -batch.energy[b] if end == STEPS else alpha * (batch.soft_value[end, b] + log_z)
            reward = -alpha * sum(batch.step_log_ratio[j, b] for j in range(k, end))
            losses.append(0.5 * (-value + reward + after) ** 2)
    return torch.stack(losses).sum() / horizon / batch.valid.sum()


def gradients(loss: Any, batch: Batch, alpha: float) -> tuple[Tensor, ...]:
    """(loss, its gradient by log-ratios, values, log Z)."""
    assert batch.soft_value is not None
    ratio, value = (leaf.clone().requires_grad_(True) for leaf in (batch.step_log_ratio, batch.soft_value))
    log_z = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    found = loss(replace(batch, step_log_ratio=ratio, soft_value=value), alpha, log_z)
    return found.detach(), *torch.autograd.grad(found, (ratio, value, log_z))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("horizon", [*range(1, STEPS + 1), 100])
def test_trust_pcl_is_alpha_squared_rtb_over_every_horizon(alpha: float, horizon: int) -> None:
    """Loss, and gradients by log-ratios, values and log Z, to 1e-12; and Trust-PCL is what a loop over its definition gives."""
    batch, log_z = make_batch(), torch.tensor(0.3, dtype=torch.float64)
    pcl = gradients(partial(path_consistency, horizon=horizon), batch, alpha)
    rtb = gradients(partial(sub_trajectory_rtb, horizon=horizon), batch, alpha)
    loops = gradients(partial(by_loops, horizon=horizon), batch, alpha)
    for ours, theirs, looped in zip(pcl, rtb, loops, strict=True):
        assert (ours - alpha**2 * theirs).norm() <= 1e-12 * ours.norm()
        assert (ours - looped).norm() <= 1e-12 * looped.norm()
    cut = [loss(batch, alpha, log_z, 0.7, horizon=horizon).item() for loss in (path_consistency, sub_trajectory_rtb)]
    assert cut[0] == pytest.approx(alpha**2 * cut[1], rel=1e-12) and cut[1] < rtb[0]


@pytest.mark.parametrize("horizon", [1, 2, 5, 7, 20])
def test_every_step_weighs_the_same(horizon: int) -> None:
    """Where all values are exact, one step that is off costs what it costs over the whole path, whatever the horizon."""
    batch, log_z = make_batch(masked=0), torch.tensor(0.3, dtype=torch.float64)
    ratio = torch.zeros_like(batch.step_log_ratio)
    exact = replace(batch, step_log_ratio=ratio, soft_value=(-batch.energy / 0.5 - log_z).repeat(STEPS, 1))
    off = 0.1  # of one step's log-ratio: every window with this step has the residual
    for step in range(STEPS):
        ratio[step] = off
        loss = sub_trajectory_rtb(exact, 0.5, log_z, horizon=horizon)
        assert loss.item() == pytest.approx(0.5 * off**2, rel=1e-9)
        ratio[step] = 0


@pytest.fixture(scope="module")
def task() -> LinearGaussian:
    chain = chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", **VP), 10)
    return LinearGaussian(chain, torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, -0.5], dtype=torch.float64), alpha=0.5)


def policy_of(prior: Prior) -> Policy:
    torch.manual_seed(0)
    return Policy(prior, ResidualDenoiser(prior.denoiser, MLPDenoiser(width=32, depth=2, fourier_features=8)))


def exact_value(task: LinearGaussian, states: Tensor) -> Tensor:
    """log h_k of the states that trained steps lead from."""
    slope, offset = task.soft_value
    return torch.stack([(states[k].double() * slope[k]).sum(1) + offset[k] - task.log_z for k in task.chain.trained])


@pytest.mark.parametrize("horizon", [1, 3, 10])
def test_the_optimal_policy_with_the_exact_value_has_no_residual(task: LinearGaussian, horizon: int) -> None:
    """On paths of the prior, in float64. With the energy as a reward beside the last value, it counts twice."""
    prior, generator = task.prior(), torch.Generator().manual_seed(0)
    start = task.chain.start_std * torch.randn(64, 2, generator=generator, dtype=torch.float64)
    drawn = rollout(prior, task.policy(), 64, generator, start=start, drawn_by="prior")
    assert drawn.step_log_ratio is not None
    energy = task.energy(drawn.terminal)
    batch = Batch(drawn.step_log_ratio, energy, torch.ones(64, dtype=torch.bool), soft_value=exact_value(task, drawn.states))
    log_z = torch.tensor(task.log_z, dtype=torch.float64)
    assert path_consistency(batch, task.alpha, log_z, horizon=horizon) < 1e-18
    assert path_consistency(replace(batch, energy=2 * energy), task.alpha, log_z, horizon=horizon) > 1e-2


def test_policy_and_value_learn_from_each_other(task: LinearGaussian) -> None:
    """From the prior, without a warm start: the gap closes, and the value comes closer to the closed form than what the
    population's few updates had taught it."""
    config = TrainConfig(
        objective="trust_pcl",
        horizon=2,
        alpha=task.alpha,
        behavior={"on_policy": 1.0},
        updates=100,
        batch_size=48,
        learning_rate=5e-3,
        warm_start="none",
        soft_value_updates=20,
        population_size=500,
        tempering_ess=None,
        checkpoint_every=0,
    )
    trainer = Trainer(task.prior(), task.energy, config, policy=policy_of(task.prior()), progress=False)
    states = rollout(task.prior(), None, 500, torch.Generator().manual_seed(5))
    truth = exact_value(task, states.states).float()

    def miss(value: Tensor) -> float:
        return ((value - truth).square().mean().sqrt() / truth.std()).item()

    trainer.train()
    state = trainer.state
    assert state.preparation.soft_value is not None
    step = torch.zeros(500, dtype=torch.long)
    before = torch.stack([state.preparation.soft_value(states.states[k], step + k) for k in task.chain.trained])
    assert miss(state.critic(states, task.alpha)) < 0.5 * miss(before)
    assert trainer.history[-1]["residual_std"] < 0.3 * trainer.history[0]["residual_std"]


def test_what_has_no_parts_is_refused() -> None:
    for given, says in (
        ({"objective": "log_variance", "horizon": 2, "soft_value_updates": 5}, "no function of parts"),
        ({"objective": "rtb", "horizon": 0, "soft_value_updates": 5}, "1 or more"),
        ({"objective": "rtb", "horizon": 2}, "needs a value"),
    ):
        with pytest.raises(ValueError, match=says):
            TrainConfig(**given)  # pyright: ignore[reportArgumentType]
    assert objective_of(TrainConfig(objective="rtb")) is OBJECTIVES["rtb"]


def test_the_values_gradient_is_one_of_the_first_pass() -> None:
    batch = make_batch()
    objective = objective_of(TrainConfig(objective="trust_pcl", horizon=3, soft_value_updates=5))
    _, found = objective_gradient(objective, batch, 0.5, torch.tensor([0.3], dtype=torch.float64))
    _, ratio, value, log_z = gradients(partial(path_consistency, horizon=3), batch, 0.5)
    for name, expected in (("step_log_ratio", ratio), ("soft_value", value), ("log_z", log_z.reshape(1))):
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=0)
