"""The many wells, the funnel and the four particles: published figures, quadrature, automatic differentiation, verdicts.

Every statistical bound is 4.5 standard errors, a false alarm in 150,000.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tiltune.finetune.certificate.evidence import gather_evidence
from tiltune.finetune.certificate.path_metrics import path_metrics
from tiltune.finetune.certificate.reference import reference_paths
from tiltune.finetune.estimators import log_mean_exp
from tiltune.samplers.denoiser import Denoiser
from tiltune.tasks import double_wells, four_particles, funnel_target
from tiltune.tasks.double_wells import DoubleWells
from tiltune.tasks.dw4 import TASK as DW4
from tiltune.tasks.exact_denoiser import ExactDenoiser
from tiltune.tasks.fitted_prior import log_gaussian
from tiltune.tasks.funnel import TASK as FUNNEL
from tiltune.tasks.manywell import TASK as MANYWELL
from tiltune.tasks.task import Task


@pytest.mark.parametrize(("dim", "published"), [(32, 164.6957), (64, 329.391), (128, 658.783)])
def test_log_z_of_the_many_wells_is_the_published_one(dim: int, published: float) -> None:
    assert DoubleWells(dim // 2).log_z == pytest.approx(published, abs=1e-3)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_the_many_wells_at_any_alpha_by_quadrature_in_the_plane(alpha: float) -> None:
    """log Z and the deeper well's share, from the energy itself."""
    line = torch.linspace(-7, 7, 1401, dtype=torch.float64)
    x = torch.cartesian_prod(line, line)
    scale = double_wells.prior_scale(2)
    log_tilted = log_gaussian(x, scale) - double_wells.energy(x) / alpha
    truth = DoubleWells(1, alpha)
    assert truth.log_z == pytest.approx((log_tilted.logsumexp(0) + 2 * math.log(0.01)).item(), abs=1e-6)
    share = log_tilted.softmax(0)[x[:, 0] > 0].sum().item()
    assert truth.right == pytest.approx(share, abs=1e-3)
    samples = truth.sample(20_000, torch.Generator().manual_seed(0))
    right = (samples[:, 0] > 0).double().mean().item()
    assert abs(right - truth.right) < 4.5 * math.sqrt(truth.right * (1 - truth.right) / 20_000)


def tweedie(log_density: Any, state: Tensor, signal: float, noise: float) -> Tensor:
    """E[x | state] by the gradient of the noised density, which is integrated over a grid in float64."""
    state = state.double().requires_grad_()
    [gradient] = torch.autograd.grad(log_density(state, signal, noise).sum(), state)
    return (state.detach() + noise**2 * gradient) / signal


def noised_wells(state: Tensor, signal: float, noise: float) -> Tensor:
    x = torch.linspace(-4.5, 4.5, 3001, dtype=torch.float64)
    log_rho = double_wells.log_density(torch.stack([x, 0 * x], 1))
    inside = log_rho - 0.5 * ((state[:, :1] - signal * x / 1.8) / noise) ** 2
    return inside.logsumexp(1) - 0.5 * state[:, 1] ** 2 / (signal**2 + noise**2)


def noised_funnel(state: Tensor, signal: float, noise: float) -> Tensor:
    x0 = torch.linspace(-7, 7, 1001, dtype=torch.float64)
    inner = signal**2 * x0.exp() / 4 + noise**2
    log_share = -0.5 * x0**2 - 0.5 * ((state[:, :1] - signal * x0) / noise) ** 2
    radial = -0.5 * (state[:, 1:, None] ** 2 / inner).sum(1) - 4.5 * inner.log()
    return (log_share + radial).logsumexp(1)


@pytest.mark.parametrize(("signal", "noise"), [(0.95, math.sqrt(1 - 0.95**2)), (0.4, math.sqrt(0.84)), (0.01, 1.0)])
def test_exact_denoisers_are_the_gradients_of_log_densities(signal: float, noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    cases = (
        (DoubleWells(1), noised_wells, DoubleWells(1).sample(60, generator) / double_wells.prior_scale(2), 2e-3),
        (funnel_target.Funnel(), noised_funnel, funnel_target.sample(60, generator) / funnel_target.SCALE, 1e-6),
    )
    levels = torch.tensor([signal, noise], dtype=torch.float64)
    for law, log_density, x, tolerance in cases:
        state = signal * x + noise * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        expected = tweedie(log_density, state, signal, noise)
        torch.testing.assert_close(law.denoise(state, *levels), expected, rtol=0, atol=tolerance)


def test_the_funnel_is_normalized_and_its_parts_are_equal() -> None:
    x = funnel_target.sample(20_000, torch.Generator().manual_seed(0))
    normal = torch.distributions.Normal
    own = normal(0.0, 1.0).log_prob(x[:, 0]) + normal(0.0, (0.5 * x[:, :1]).exp()).log_prob(x[:, 1:]).sum(1)
    torch.testing.assert_close(funnel_target.log_density(x), own, rtol=1e-12, atol=1e-9)
    for share in (funnel_target.depth(x), funnel_target.radius(x)):
        counts = torch.histc(share, 10, 0, 1)
        assert ((counts - 2000).abs() < 4.5 * math.sqrt(20_000 * 0.1 * 0.9)).all()


STEPS = 40
CASES: dict[str, tuple[Task, Any, Any, Any]] = {
    # task, config, the law of a policy that is right, that of one that is not
    "manywell": (
        MANYWELL,
        replace(MANYWELL.recipe().prior, dim=4, steps=STEPS),
        lambda: DoubleWells(2),
        lambda: DoubleWells(2, 1.4),
    ),
    "funnel": (FUNNEL, replace(FUNNEL.recipe().prior, steps=STEPS), funnel_target.Funnel, lambda: NarrowFunnel()),
}


class NarrowFunnel(funnel_target.Funnel):
    """A funnel that is denoised as if there were less noise than there is: too narrow."""

    def denoise(self, state: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        return 0.93 * super().denoise(state, signal, noise)


def verdict(name: str, policy: Denoiser) -> tuple[str, list[str], dict[str, Any]]:
    task, config, _, _ = CASES[name]
    module = {"manywell": double_wells, "funnel": funnel_target}[name]
    prior, generator = task.load_prior(config), torch.Generator().manual_seed(0)
    assert task.reference is not None
    exact = task.reference(config, module.energy, 1.0)
    assert exact is not None
    paths = reference_paths(prior, exact, policy, module.energy, 1.0, torch.Generator().manual_seed(1), size=600)
    evidence = gather_evidence(prior, policy, module.energy, 1.0, generator, size=2500, starts=0, population="importance")
    evidence = replace(evidence, reference=paths)
    metrics = path_metrics(evidence)
    metrics |= task.metrics(config, evidence, module.energy, generator)
    return *task.judge(metrics), metrics


@pytest.mark.parametrize("name", CASES)
def test_exact_denoisers_pass_and_planted_failures_fail(name: str) -> None:
    task, config, right, wrong = CASES[name]
    chain = task.load_prior(config).chain
    found, reasons, metrics = verdict(name, ExactDenoiser(right(), chain))
    assert found == "pass", reasons
    assert abs(metrics["log_z_chain"] - metrics["log_z_ideal"]) < 0.05 + 4.5 * metrics["log_z_chain_se"]
    found, reasons, _ = verdict(name, ExactDenoiser(wrong(), chain))
    assert found == "fail", reasons


@pytest.mark.parametrize("task", [MANYWELL, FUNNEL, DW4])
def test_another_energy_is_refused(task: Task) -> None:
    config = task.recipe().prior
    prior = task.load_prior(config)
    policy = prior.denoiser
    evidence = gather_evidence(
        prior, policy, lambda x: x[:, 0], 1.0, torch.Generator(), size=20, starts=0, population="importance"
    )
    with pytest.raises(ValueError, match="own energy alone, and this is another one"):
        task.metrics(config, evidence, lambda x: x[:, 0], torch.Generator())


def test_recipes_of_the_many_wells_and_wrong_dimensions() -> None:
    assert MANYWELL.recipe().prior.dim == 32
    assert MANYWELL.recipe_in is not None and MANYWELL.recipe_in(64, 0).prior.dim == 64
    with pytest.raises(ValueError, match="an even number from 2 on, not 5"):
        MANYWELL.load_prior(MANYWELL.recipe_in(5, 0).prior)
    with pytest.raises(ValueError, match="fixes seed; choose dim and steps alone"):
        MANYWELL.load_prior(MANYWELL.recipe_in(4, 2).prior)


def test_four_particles_are_six_orthonormal_coordinates() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    where = four_particles.positions(x)
    torch.testing.assert_close(where.mean(1), torch.zeros(50, 2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(where.flatten(1).norm(dim=1), x.norm(dim=1))
    turned = (where @ torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)) + 3.0
    back = torch.einsum("pc,npd->ncd", four_particles.BASIS, turned).flatten(1)
    torch.testing.assert_close(four_particles.log_density(back), four_particles.log_density(x))


def test_the_measured_log_z_of_four_particles_by_another_proposal() -> None:
    scale = torch.full((6,), 2.4, dtype=torch.float64)
    x = torch.randn(400_000, 6, generator=torch.Generator().manual_seed(5)) * 2.4
    found, error = log_mean_exp(four_particles.log_density(x) - log_gaussian(x, scale))
    truth = four_particles.measured()
    assert truth["log_z_se"] < 0.01 and truth["largest_share"] < 0.001
    assert abs(found - truth["log_z"]) < 4.5 * math.hypot(error, truth["log_z_se"]) < 0.5


def test_the_prior_is_no_sampler_of_four_particles() -> None:
    config = DW4.recipe().prior
    prior, generator = DW4.load_prior(config), torch.Generator().manual_seed(0)
    evidence = gather_evidence(
        prior, prior.denoiser, four_particles.energy, 1.0, generator, size=1000, starts=0, population="importance"
    )
    metrics = path_metrics(evidence)
    found, reasons = DW4.judge(metrics | DW4.metrics(config, evidence, four_particles.energy, generator))
    assert found == "fail" and any("energy TV" in reason for reason in reasons)
