"""Clipped objectives and comparators in float64: what they are at the first epoch, at later ones, and what they are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.learning.batch import Batch
from tiltune.finetune.learning.clipped import CLIPPED
from tiltune.finetune.learning.comparators import normalized_advantage
from tiltune.finetune.learning.objective_table import OBJECTIVES, objective_of

ALPHAS, CLIP = (0.1, 0.5, 2.0), 0.2


def make_batch(moved: float = 0.0, masked: int = 2, per_step: bool = False) -> Batch:
    """On-policy trajectories of an old policy, and the log-ratios of one that has ``moved`` since."""
    generator = torch.Generator().manual_seed(4)
    old = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    energy = 3 * torch.randn(16, generator=generator, dtype=torch.float64)
    change = moved * torch.randn(5, 16, generator=generator, dtype=torch.float64)
    value = torch.randn(5, 16, generator=generator, dtype=torch.float64) if per_step else None
    valid = torch.arange(16) < 16 - masked
    return Batch(old + change, energy, valid, old.sum(0), value, old_step_log_ratio=old if moved else None)


def gradients(loss: Any, batch: Batch, alpha: float, huber: float | None) -> tuple[Tensor, Tensor]:
    leaf, log_z = batch.step_log_ratio.clone().requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss(replace(batch, step_log_ratio=leaf), alpha, log_z, huber).backward()
    assert leaf.grad is not None
    return leaf.grad, torch.zeros(()) if log_z.grad is None else log_z.grad


@pytest.mark.parametrize("huber", [None, 1.0])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", CLIPPED)
def test_the_first_epoch_has_the_gradient_of_the_objective_itself(name: Any, alpha: float, huber: float | None) -> None:
    batch = make_batch()
    whole = OBJECTIVES["reinforce_kl" if name == "ppo_kl" else name].loss
    clipped = objective_of(TrainConfig(objective=name, clip=CLIP)).loss
    for found, expected in zip(gradients(clipped, batch, alpha, huber), gradients(whole, batch, alpha, huber), strict=True):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_with_a_soft_value_the_first_epoch_is_reinforce_kl_step_by_step() -> None:
    batch = make_batch(per_step=True)
    found, _ = gradients(objective_of(TrainConfig(objective="ppo_kl")).loss, batch, 0.5, None)
    expected, _ = gradients(OBJECTIVES["reinforce_kl"].loss, batch, 0.5, None)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)
    assert found.std(0)[batch.valid].min() > 0  # and no two steps have the same advantage


@pytest.mark.parametrize("alpha", ALPHAS)
def test_ppo_with_the_kl_in_its_reward_is_clipped_log_variance(alpha: float) -> None:
    batch = make_batch(moved=0.3)
    ppo, _ = gradients(objective_of(TrainConfig(objective="ppo_kl", clip=CLIP)).loss, batch, alpha, None)
    variance, _ = gradients(objective_of(TrainConfig(objective="log_variance", clip=CLIP)).loss, batch, alpha, None)
    assert torch.allclose(ppo, alpha * variance, rtol=1e-12, atol=1e-14)
    rtb, by_log_z = gradients(objective_of(TrainConfig(objective="rtb", clip=CLIP)).loss, batch, alpha, None)
    pcl, also = gradients(objective_of(TrainConfig(objective="trust_pcl", clip=CLIP)).loss, batch, alpha, None)
    assert torch.allclose(pcl, alpha**2 * rtb, rtol=1e-12, atol=1e-14)
    assert torch.allclose(also, alpha**2 * by_log_z, rtol=1e-12)


def test_it_is_the_definition_by_loops() -> None:
    """min(r A, clip(r) A) at each step, A with the old policy's log-ratios, its baseline without the trajectory itself."""
    batch, alpha = make_batch(moved=0.3), 0.5
    number = int(batch.valid.sum())
    value = [-batch.energy[b].item() - alpha * batch.old[:, b].sum().item() for b in range(number)]
    total, clipped = 0.0, 0
    expected = torch.zeros_like(batch.step_log_ratio)
    for b in range(number):
        advantage = value[b] - (sum(value) - value[b]) / (number - 1)
        for k in range(5):
            ratio = (batch.step_log_ratio[k, b] - batch.old[k, b]).exp().item()
            bounded = min(max(ratio, 1 - CLIP), 1 + CLIP)
            total -= (min(ratio * advantage, bounded * advantage) - advantage) / number
            if ratio * advantage <= bounded * advantage:
                expected[k, b] = -ratio * advantage / number
            else:
                clipped += 1
    assert 10 < clipped < 60  # both branches are there
    loss = objective_of(TrainConfig(objective="ppo_kl", clip=CLIP)).loss
    assert loss(batch, alpha, torch.zeros(()), None).item() == pytest.approx(total, rel=1e-12)
    assert torch.allclose(gradients(loss, batch, alpha, None)[0], expected, rtol=1e-12, atol=1e-14)


def test_a_step_that_became_far_too_likely_is_pushed_back() -> None:
    """Beyond what an exponential can hold, too: a tangent in its place."""
    old = torch.zeros(1, 3, dtype=torch.float64)
    for far in (15.0, 25.0, 800.0):
        batch = Batch(
            torch.full_like(old, far),
            torch.tensor([1.0, 5.0, 9.0]).double(),
            torch.ones(3, dtype=torch.bool),
            old_step_log_ratio=old,
        )
        found, _ = gradients(objective_of(TrainConfig(objective="log_variance", clip=CLIP)).loss, batch, 1.0, None)
        assert torch.isfinite(found).all() and found[0, 2] > 1e5 and found[0, 0] == 0
        grpo, _ = gradients(OBJECTIVES["grpo"].loss, replace(batch, step_log_ratio=-batch.step_log_ratio), 0.5, None)
        assert torch.isfinite(grpo).all() and (grpo < -1e4).all()  # the KL pulls it back to the prior


def test_comparators_forget_the_scale_of_the_reward_and_the_prior() -> None:
    batch = make_batch()
    advantage = normalized_advantage(batch)[batch.valid]
    assert advantage.std().item() == pytest.approx(1.0)
    assert advantage.mean().item() == pytest.approx(0.0, abs=1e-12)
    ddpo = OBJECTIVES["ddpo"].loss
    one, _ = gradients(ddpo, batch, 0.5, None)
    for other in (replace(batch, energy=10 * batch.energy), replace(batch, step_log_ratio=batch.step_log_ratio + 1.0)):
        assert torch.allclose(gradients(ddpo, other, 0.5, None)[0], one, rtol=1e-6)
    assert torch.allclose(gradients(ddpo, batch, 2.0, None)[0], one)  # there is no temperature
    # The control: an objective that targets the tilted law changes with each of them.
    ppo = OBJECTIVES["ppo_kl"].loss
    own, _ = gradients(ppo, batch, 0.5, None)
    assert not torch.allclose(gradients(ppo, replace(batch, energy=10 * batch.energy), 0.5, None)[0], own, rtol=0.1)
    # grpo adds alpha (1 - exp(-l)) at each step.
    grpo, _ = gradients(OBJECTIVES["grpo"].loss, batch, 0.5, None)
    kl = 0.5 * (1 - (-batch.step_log_ratio).exp()) * batch.weight / batch.weight.sum()
    assert torch.allclose(grpo, one + kl, rtol=1e-12, atol=1e-14)


def test_which_objectives_do_not_target_the_tilted_law() -> None:
    assert {name for name, objective in OBJECTIVES.items() if not objective.targets_tilted_law} == {"ddpo", "grpo"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "tlm", "clip": 0.1}, "tlm has none"),
        ({"objective": "rtb", "clip": 1.5}, "between 0 and 1"),
        ({"objective": "rtb", "clip": 0.1, "horizon": 2, "soft_value_updates": 5}, "for whole paths"),
        ({"epochs": 0}, "one gradient step at least"),
        ({"step_share": 0.0}, "above 0"),
        ({"objective": "ppo_kl", "behavior": {"prior": 1.0}}, "clips by the policy that drew"),
        ({"behavior": {"replay": 1.0}}, "no update would"),
        ({"objective": "ddpo"}, "from the prior on and at one alpha"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)
