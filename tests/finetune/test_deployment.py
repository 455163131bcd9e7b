"""What deployed samplers give, against the trained chain and the weighted prior: equal laws are found equal, others not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor

from tiltune.finetune.certificate.deployment import (
    Deployed,
    Reference,
    deployed_samplers,
    deployment_metrics,
    draw_deployed,
    has_even_steps,
)
from tiltune.finetune.certificate.evidence import Evidence, gather_evidence
from tiltune.finetune.estimators import weighted_mean
from tiltune.samplers.loading.pretrained import load_prior
from tiltune.samplers.make_policy import make_policy
from tiltune.samplers.mlp import MLPDenoiser, precondition_for_
from tiltune.samplers.policy import Policy
from tiltune.samplers.prior import Prior
from tiltune.samplers.schedulers.brownian import brownian_chain
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler

STEPS = 8
# Its last step draws noise, so that the trained chain is what diffusers runs, to the last step.
NOISY_END: dict[str, Any] = {"variance_type": "fixed_large", "steps_offset": 1, "clip_sample": False}


@pytest.fixture(autouse=True)
def _seeded_weights() -> Iterator[None]:
    """Networks are built from torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def energy(x: Tensor) -> Tensor:
    return 0.5 * x.sum(1)


def saved(folder: Path, scheduler: Any, data_std: float = 1.0) -> Path:
    """A linear denoiser, exact for N(0, data_std²): EDM's preconditioning around a network that is zero."""
    network = MLPDenoiser(dim=2, width=8, depth=1, fourier_features=4)
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        fine = chain_from_scheduler(DDPMScheduler(clip_sample=False), 1000)
        precondition_for_(network, fine, data_std)
    network.save_pretrained(folder)
    scheduler.save_pretrained(folder)
    return folder


def trained(prior: Prior) -> Policy:
    """A policy that leans toward low energies, roughly as the tilt asks."""
    policy: Any = make_policy(prior)
    with torch.no_grad():
        policy.denoiser.model.outward.bias -= 0.2
    return policy


def evidence_of(policy: Policy, size: int, alpha: float = 1.0) -> Evidence:
    return gather_evidence(policy.prior, policy, energy, alpha, seeded(1), size=size, starts=8, rollouts=4)


def test_the_same_sampler_is_found_equal_and_others_are_not(tmp_path: Path) -> None:
    policy = trained(load_prior(saved(tmp_path, DDPMScheduler(**NOISY_END)), STEPS))
    evidence = evidence_of(policy, 12_000)
    done: list[int] = []
    rows = deployment_metrics(policy, energy, evidence, seeded(2), size=6000, on_progress=done.append)
    assert sum(done) == 6000 * (len(rows) - 2)
    by_name = {(row["sampler"], row["steps"]): row for row in rows}
    weighted, chain, same, *_ = rows
    assert [row["sampler"] for row in rows[:2]] == ["weighted prior", "trained chain"]
    assert (weighted["energy"], weighted["energy_se"]) == weighted_mean(evidence.prior_energy, evidence.target_weight)
    assert chain["energy"] == pytest.approx(evidence.energy.double().mean().item())
    assert chain["chain_cell_tv"] is None
    assert (same["sampler"], same["steps"]) == ("DDPM", STEPS)
    assert abs(same["energy"] - chain["energy"]) < 4 * math.hypot(same["energy_se"], chain["energy_se"])
    assert same["chain_energy_tv"] < same["chain_energy_tv_null"]
    assert same["chain_cell_tv"] < same["chain_cell_tv_null"]
    # DDIM at the same steps is another law: its variance is the small one, or none.
    for other in (by_name["DDIM eta=0", STEPS], by_name["DDIM eta=1", STEPS]):
        assert other["chain_cell_tv"] > 2 * other["chain_cell_tv_null"]
        assert other["chain_energy_tv"] > 2 * other["chain_energy_tv_null"]
        assert other["chain_cell_tv"] > 2 * same["chain_cell_tv"]
    for row in rows[1:]:
        assert 0 <= row["target_cell_tv"] <= 1
        assert row["target_cell_tv_null"] > 0
        assert row["violation_rate"] == 0
    assert set(weighted) == set(chain) == set(same)


def test_the_trained_chain_whose_last_step_is_trained_is_the_plain_loop(tmp_path: Path) -> None:
    prior = load_prior(saved(tmp_path, DDPMScheduler(**NOISY_END)), STEPS)
    policy = trained(prior)
    done: list[int] = []
    looped = draw_deployed(policy, deployed_samplers(prior)[0], 2100, seeded(3), done.append)
    steps = len(done) // 2  # of each of two batches, those of `rows_at_once` here and there
    assert (sum(done[:steps]), sum(done[steps:])) == (2048, 52)
    torch.testing.assert_close(looped, policy.sample(2100, seed=3), rtol=0, atol=1e-5)


class Silent(torch.nn.Module):
    def forward(self, state: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        return 0 * state


def test_large_states_come_in_small_batches() -> None:
    scheduler, done = DDPMScheduler(**NOISY_END), []
    prior = Prior(Silent(), chain_from_scheduler(scheduler, 2), (1, 128, 256), scheduler=scheduler)
    draw_deployed(Policy(prior, Silent()), Deployed("", scheduler, 2, {}), 3, seeded(), done.append)
    assert done == [1, 1, 0, 1]  # two samples, then one, over two steps each


SAMPLERS: dict[str, tuple[Any, dict[str, Any], list[tuple[str, int]]]] = {
    "ddpm": (DDPMScheduler(), {}, [("DDPM", 8), ("DDPM", 16), ("DDPM", 4), ("DDIM eta=0", 8), ("DDIM eta=1", 8)]),
    "ddim": (
        DDIMScheduler(),
        {"eta": 0.5},
        [("DDIM eta=0.5", 8), ("DDIM eta=0.5", 16), ("DDIM eta=0.5", 4), ("DDIM eta=0", 8), ("DDIM eta=1", 8)],
    ),
    "ddim, eta 1 only once": (DDIMScheduler(), {}, [("DDIM eta=1", 8), ("DDIM eta=1", 16), ("DDIM eta=1", 4), ("DDIM eta=0", 8)]),
    "few training steps": (
        DDPMScheduler(num_train_timesteps=10),
        {},
        [("DDPM", 8), ("DDPM", 4), ("DDIM eta=0", 8), ("DDIM eta=1", 8)],
    ),
    "euler": (
        EulerAncestralDiscreteScheduler(),
        {},
        [
            ("EulerAncestralDiscrete", 8),
            ("EulerAncestralDiscrete", 16),
            ("EulerAncestralDiscrete", 4),
            ("DDIM eta=0", 8),
            ("DDIM eta=1", 8),
        ],
    ),
    "flow": (
        FlowMatchEulerDiscreteScheduler(),
        {},
        [("FlowMatchEulerDiscrete", 8), ("FlowMatchEulerDiscrete", 16), ("FlowMatchEulerDiscrete", 4)],
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_scheduler_has_its_deployed_samplers_and_all_of_them_run(name: str, tmp_path: Path) -> None:
    scheduler, options, expected = SAMPLERS[name]
    prior = load_prior(saved(tmp_path, scheduler), STEPS, **options)
    samplers = deployed_samplers(prior)
    assert [(deployed.name, deployed.steps) for deployed in samplers] == expected
    policy = make_policy(prior)
    for deployed in samplers:
        drawn = draw_deployed(policy, deployed, 3, seeded())
        assert drawn.shape == (3, 2)
        assert drawn.isfinite().all()
    if name != "flow":  # starts at the prior, so that the last step is the same network's too
        first = draw_deployed(policy, samplers[0], 3, seeded(5))
        torch.testing.assert_close(first, policy.sample(3, seed=5), rtol=1e-5, atol=1e-4)
    if name == "euler":  # never clipped, so neither is its DDIM
        assert not samplers[-1].scheduler.config.clip_sample


def test_timesteps_that_were_placed_come_first(tmp_path: Path) -> None:
    loaded = load_prior(saved(tmp_path, DDPMScheduler(**NOISY_END)), STEPS)
    assert has_even_steps(loaded)
    chain = chain_from_scheduler(loaded.scheduler, timesteps=[950, 700, 300, 100, 40, 20, 10, 1])
    prior = Prior(loaded.denoiser, chain, (2,), scheduler=loaded.scheduler)
    assert not has_even_steps(prior)
    first, second, *_ = deployed_samplers(prior)
    assert (first.name, first.timesteps) == ("DDPM, trained timesteps", (950, 700, 300, 100, 40, 20, 10, 1))
    assert (second.name, second.timesteps) == ("DDPM", None)
    policy = trained(prior)
    torch.testing.assert_close(draw_deployed(policy, first, 4, seeded(3)), policy.sample(4, seed=3), rtol=0, atol=1e-5)
    assert (draw_deployed(policy, second, 4, seeded(3)) - policy.sample(4, seed=3)).abs().max() > 1e-3


def test_a_chain_that_diffusers_does_not_have_is_not_deployed() -> None:
    policy = make_policy(Prior(MLPDenoiser(dim=2, width=8, fourier_features=4), brownian_chain(4), (2,)))
    rows = deployment_metrics(policy, energy, evidence_of(policy, 200), seeded())
    assert [row["sampler"] for row in rows] == ["weighted prior", "trained chain"]


def test_a_flow_that_draws_noise_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    prior = load_prior(saved(tmp_path, FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)), STEPS)
    policy, deployed = make_policy(prior), deployed_samplers(prior)[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        first = draw_deployed(policy, deployed, 3, seeded(5))
        assert torch.equal(torch.rand(3), expected)
        assert torch.equal(draw_deployed(policy, deployed, 3, seeded(5)), first)
        assert not torch.equal(draw_deployed(policy, deployed, 3, seeded(6)), first)


def test_energies_that_are_none_are_counted_and_labels_are_passed(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        network = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(4, 4),
            norm_num_groups=2,
            attention_head_dim=4,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            num_class_embeds=5,
        )
    network.save_pretrained(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path)
    policy = make_policy(load_prior(tmp_path, 2, labels=[3]))
    seen: list[Tensor] = []

    def half(x: Tensor, class_labels: Tensor) -> Tensor:
        seen.append(class_labels)
        bad = torch.tensor([math.inf, math.nan, 1.0, 3.0])
        return bad.repeat(len(x))[: len(x)]

    samples = torch.randn(8, 1, 8, 8, generator=seeded())
    blank = torch.zeros(8)
    evidence = Evidence(1.0, samples, blank, blank, samples, blank, blank, torch.zeros(1), None, 0)
    rows = deployment_metrics(policy, half, evidence, seeded(), size=8)
    assert all((labels == 3).all() for labels in seen)
    assert len(seen) == len(rows) - 2
    for row in rows[2:]:
        assert row["violation_rate"] == 0.5
        assert row["energy"] == 2.0
        # Eight samples fill no 25 cells.
        assert row["chain_cell_tv"] is None
        assert row["target_energy_tv"] is None


def test_a_reference_sees_a_missing_part_and_forgives_sampling() -> None:
    samples = torch.randn(4000, 2, generator=seeded(1))
    value = energy(samples)
    weight = (-value).double().softmax(0)
    reference = Reference(samples, value, weight)
    # N(0, I) tilted by exp(-½ (x + y)) is N(-½, I) exactly.
    exact = torch.randn(3000, 2, generator=seeded(2)) - 0.5
    for figure, null in (("x_energy_tv", "x_energy_tv_null"), ("x_cell_tv", "x_cell_tv_null")):
        same = reference.metrics("x", exact, energy(exact))
        assert same[figure] < same[null]  # pyright: ignore[reportOperatorIssue]
        half = exact[exact[:, 0] > -0.5]
        other = reference.metrics("x", half, energy(half))
        assert other[figure] > 2 * other[null]  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]
    assert Reference(samples[:40], value[:40], weight[:40]).metrics("x", exact, energy(exact))["x_cell_tv"] is None


def test_a_deployed_sampler_is_run_as_it_says(tmp_path: Path) -> None:
    prior = load_prior(saved(tmp_path, DDIMScheduler(clip_sample=False)), STEPS, eta=1.0)
    policy = trained(prior)
    still, noisy = (Deployed("", prior.scheduler, STEPS, {"eta": eta}) for eta in (0.0, 1.0))
    start = torch.randn((512, 2), generator=seeded(4))
    drawn = draw_deployed(policy, still, 512, seeded(4))
    # Without noise a linear network is a linear map of the start.
    fit = torch.linalg.lstsq(torch.cat([start, torch.ones(512, 1)], 1).double(), drawn.double())
    assert (torch.cat([start, torch.ones(512, 1)], 1).double() @ fit.solution - drawn).abs().max() < 1e-4
    assert (draw_deployed(policy, noisy, 512, seeded(4)) - drawn).abs().max() > 0.1
