"""Copies that a resampling made become different samples, and the law stays the target's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from tiltune.samplers.denoiser import ResidualDenoiser
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.moves import PARTS
from tiltune.samplers.policy import Policy
from tiltune.samplers.resample_move import move
from tiltune.samplers.resampling import importance_resample
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler
from toys.linear_gaussian import LinearGaussian

VP = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}


@pytest.fixture(scope="module")
def task() -> LinearGaussian:
    """N(0, I) tilted so far that one path in 400 is effective: the samples' law is N(-slope, I) of the chain."""
    chain = chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", **VP), 10)
    return LinearGaussian(chain, torch.zeros(2, dtype=torch.float64), torch.tensor([2.4, -2.0], dtype=torch.float64))


def crooked_policy(task: LinearGaussian) -> Policy:
    """Somewhere between prior and target, and at neither."""
    prior = task.prior()
    torch.manual_seed(0)
    network = MLPDenoiser(width=16, depth=1, fourier_features=4)
    denoiser = ResidualDenoiser(prior.denoiser, network)
    torch.nn.init.normal_(network.outward.weight, std=0.02)
    return Policy(prior, denoiser)


def test_copies_become_different_samples_of_the_target(task: LinearGaussian) -> None:
    """500 samples of 2000 proposals, over 12 seeds: resampled they are some dozen different ones, after the moves all differ. The
    mean along the slope is right within 4 standard errors over the seeds, before and after (p < 1e-3), and its error falls."""
    policy, unit = crooked_policy(task), (task.slope / task.slope.norm()).float()
    truth = -2 * task.log_z / task.slope.norm().item()  # log Z = ½ v |b|², the mean is -v b
    asked: list[int] = []
    before, after = list[float](), list[float]()
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        drawn = importance_resample(policy, lambda x: -task.energy(x), 500, generator, proposals=2000, batch=700)
        assert drawn.unique < 250
        asked.clear()
        samples, moved = move(policy, lambda x: -task.energy(x), drawn, generator, 8, asked.append)
        assert sum(asked) == 500 * 8 * PARTS
        assert len(samples.unique(dim=0)) == 500 and moved.all()
        before.append((drawn.samples @ unit).mean().item())
        after.append((samples @ unit).mean().item())
    for means in (before, after):
        found = torch.tensor(means)
        assert abs(found.mean() - truth) < 4 * found.std() / math.sqrt(12) + 0.02, (found.mean(), truth)
    assert torch.tensor(after).std() < 0.6 * torch.tensor(before).std()


def test_the_chosen_proposals_are_found_again(task: LinearGaussian) -> None:
    """Without a sweep the samples are those of the resampling, out of whichever batch they come."""
    policy = crooked_policy(task)
    for batch in (64, 1000):
        generator = torch.Generator().manual_seed(1)
        drawn = importance_resample(policy, lambda x: -task.energy(x), 50, generator, proposals=300, batch=batch)
        samples, moved = move(policy, lambda x: -task.energy(x), drawn, generator, 0)
        torch.testing.assert_close(samples, drawn.samples, rtol=0, atol=1e-5)
        assert not moved.any()


def test_a_forbidden_place_is_never_moved_to(task: LinearGaussian) -> None:
    def half(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x[:, 0] < 0, -task.energy(x), torch.full_like(x[:, 0], math.nan))

    generator: Any = torch.Generator().manual_seed(2)
    policy = crooked_policy(task)
    drawn = importance_resample(policy, half, 200, generator, proposals=1000)
    samples, _ = move(policy, half, drawn, generator, 2)
    assert (samples[:, 0] < 0).all()
