"""The mixture task in any dimension: exact samplers pass however thin the prior side is, planted failures fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiltune.finetune.certificate.evidence import Evidence, gather_evidence
from tiltune.finetune.certificate.path_metrics import path_metrics
from tiltune.finetune.certificate.reference import reference_paths
from tiltune.finetune.config.energy import EnergyConfig
from tiltune.finetune.config.prior import PriorConfig
from tiltune.finetune.config.run import RunConfig
from tiltune.finetune.energies.weighted_sum import WeightedSum
from tiltune.samplers.loading.policy import load_policy
from tiltune.samplers.make_policy import make_policy
from tiltune.tasks import tilted_mixture
from tiltune.tasks.exact_denoiser import ExactDenoiser
from tiltune.tasks.gaussian_mixture import GaussianMixture
from tiltune.tasks.mixture import TASK
from tiltune.tasks.random_mixture import random_mixture
from tiltune.tasks.tilts import TiltEnergy, linear, quadratic

DIM = 5
CONFIG = PriorConfig(steps=60, dim=DIM)


def certificate(energy: TiltEnergy, law: GaussianMixture, size: int = 2000) -> tuple[Evidence, dict[str, Any]]:
    """Both sides' rollouts of the exact denoiser of ``law`` as policy, and all metrics."""
    prior, generator = TASK.load_prior(CONFIG), torch.Generator().manual_seed(0)
    policy = ExactDenoiser(law, prior.chain)
    exact = tilted_mixture.reference(CONFIG, energy, 1.0)
    assert exact is not None
    paths = reference_paths(prior, exact, policy, energy, 1.0, torch.Generator().manual_seed(1), size=1000)
    drawn = gather_evidence(prior, policy, energy, 1.0, generator, size=size, starts=0, population="importance")
    evidence = replace(drawn, reference=paths)
    metrics = path_metrics(evidence)
    return evidence, metrics | TASK.metrics(CONFIG, evidence, energy, generator)


def test_an_exact_sampler_passes_where_a_millionth_of_the_prior_counts() -> None:
    energy = linear(1e-6)
    _, metrics = certificate(energy, energy.at(DIM).target(1.0)[0])
    assert metrics["target_ess"] < 20  # of the prior's paths
    assert metrics["gap"] == pytest.approx(metrics["gap_reference"], abs=0.05)
    assert metrics["ess"] == pytest.approx(metrics["ess_reference"], abs=0.05)
    verdict, reasons = TASK.judge(metrics)
    assert verdict == "pass", reasons


def planted(energy: TiltEnergy) -> dict[str, GaussianMixture]:
    own = energy.at(DIM)
    truth = own.target(1.0)[0]
    weights = truth.weights.clone()
    weights[weights.argsort()[-2]] = 1e-9
    return {
        "another alpha": own.target(1.3)[0],
        "a component lost": GaussianMixture(weights / weights.sum(), truth.means, truth.covariances),
        "too wide": GaussianMixture(truth.weights, truth.means, 1.5 * truth.covariances),
    }


@pytest.mark.parametrize("name", ["another alpha", "a component lost", "too wide"])
def test_planted_failures_fail(name: str) -> None:
    energy = linear(0.003)
    _, metrics = certificate(energy, planted(energy)[name])
    verdict, reasons = TASK.judge(metrics)
    assert verdict == "fail", reasons


def test_the_residual_of_the_exact_denoiser_vanishes_as_steps_grow() -> None:
    energy, spreads = quadratic(0.05), []
    for steps in (25, 200):
        config = replace(CONFIG, steps=steps)
        prior, exact = TASK.load_prior(config), tilted_mixture.reference(config, energy, 1.0)
        assert exact is not None
        paths = reference_paths(prior, exact, exact, energy, 1.0, torch.Generator().manual_seed(0), size=400)
        spreads.append(paths.log_weight.std().item())
        # The reference as policy: its log-ratio on its own stored paths is the one it was drawn with.
        own = paths.target_log_weight - paths.log_weight
        torch.testing.assert_close(paths.policy_log_ratio, own, rtol=1e-3, atol=1e-2)
    assert spreads[1] < 0.3 and spreads[0] > 2 * spreads[1]


def test_eubo_by_the_exact_denoisers_paths_is_eubo_by_weighted_prior_paths() -> None:
    """Where both are to be had. The policy is off, so that the two sides of the sandwich differ."""
    energy = linear(0.3)
    evidence, metrics = certificate(energy, energy.at(DIM).target(1.5)[0], size=4000)
    by_prior = path_metrics(replace(evidence, reference=None))
    for one, other in ((metrics, by_prior), (metrics["prior"], by_prior["prior"])):
        error = (one["eubo_se"] ** 2 + other["eubo_se"] ** 2) ** 0.5
        assert abs(one["eubo"] - other["eubo"]) < 4.5 * error
        assert one["eubo"] - one["elbo"] > 4.5 * error
    assert metrics["log_z_chain"] == pytest.approx(by_prior["log_z_forward"], abs=4.5 * by_prior["log_z_forward_se"])


def test_few_samples_are_a_doubt_unless_they_show_a_failure() -> None:
    energy = linear(0.3)
    metrics = certificate(energy, energy.at(DIM).target(1.0)[0], size=400)[1] | {"component_tv_exact": 0.04}
    verdict, reasons = TASK.judge(metrics | {"component_tv": 0.06})
    assert verdict == "inconclusive" and "so few exact samples" in reasons[0]
    metrics |= {"component_tv": 0.3}
    assert TASK.judge(metrics)[0] == "fail"


def test_few_paths_of_the_exact_denoiser_are_a_doubt() -> None:
    energy = linear(0.3)
    _, metrics = certificate(energy, energy.at(DIM).target(1.0)[0], size=400)
    verdict, reasons = TASK.judge(metrics | {"reference_effective": 12.0})
    assert verdict == "inconclusive" and any("12 effective paths on this chain" in reason for reason in reasons)


def test_energies_without_a_closed_form_are_refused() -> None:
    other, scaled = WeightedSum({"a": (1.0, linear(0.1)), "b": (1.0, quadratic(0.1))}), WeightedSum({"a": (2.0, linear(0.1))})
    with pytest.raises(ValueError, match="known for one energy of linear, quadratic, mixture"):
        tilted_mixture.tilt_of(CONFIG, other)
    with pytest.raises(ValueError, match="with the prior's seed"):
        tilted_mixture.tilt_of(CONFIG, linear(0.1, seed=1))
    with pytest.raises(ValueError, match="without a scale; choose its ess, or alpha"):
        tilted_mixture.tilt_of(CONFIG, scaled)


@pytest.mark.parametrize(
    ("prior", "term", "message"),
    [
        (PriorConfig(), "linear(ess=0.1)", "choose one with --dim"),
        (PriorConfig(dim=2), "energy", "is the plane's"),
        (PriorConfig(dim=2, seed=1), "linear(0.1)", "give --prior-seed 0"),
        (PriorConfig(dim=2), "linear(0.1, 4)", "give --prior-seed 4"),
    ],
)
def test_an_energy_of_another_problem_is_refused_at_once(prior: PriorConfig, term: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tilted_mixture.refuse(RunConfig("mixture", prior, EnergyConfig((term,))))


def test_recipes_fit_together_and_fixed_settings_are_refused() -> None:
    for dim, seed in ((1, 0), (2, 7), (100, 0)):
        config = tilted_mixture.recipe(dim, seed)
        tilted_mixture.refuse(config)
        assert config.prior == PriorConfig(steps=100, dim=dim, seed=seed)
    with pytest.raises(ValueError, match="fixes eta; choose dim and seed and steps alone"):
        TASK.load_prior(replace(CONFIG, eta=0.5))


def test_the_policy_of_a_prior_without_parameters_is_a_residual_network(tmp_path: Path) -> None:
    """It starts exactly at the prior, is saved and loaded, and fits no prior of another dimension."""
    prior = TASK.load_prior(CONFIG)
    policy = make_policy(prior)
    state, label = torch.randn(6, DIM), prior.chain.timesteps[20].float()
    assert policy.kind == "residual"
    assert torch.equal(policy(state, label), prior.denoiser(state, label))
    with torch.no_grad():
        for weight in policy.denoiser.parameters():
            weight.add_(0.1)
    policy.save(tmp_path)
    assert torch.equal(load_policy(prior, tmp_path)(state, label), policy(state, label))
    with pytest.raises(ValueError, match="is not of this prior's network"):
        load_policy(TASK.load_prior(replace(CONFIG, dim=3)), tmp_path)


@pytest.mark.parametrize("label", [0, 20, -1])
def test_the_residual_network_sees_the_priors_estimate_of_the_data(label: int) -> None:
    """x_hat is the posterior mean of the mixture in closed form, but for its soft bound at ten standard deviations."""
    prior = TASK.load_prior(CONFIG)
    policy, mixture, chain = make_policy(prior), random_mixture(DIM, 0), prior.chain
    step = label % chain.num_steps
    state = torch.randn(6, DIM, generator=torch.Generator().manual_seed(0))
    seen = list[torch.Tensor]()
    network: Any = policy.denoiser.residual.model  # pyright: ignore[reportAttributeAccessIssue]
    network.inward.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, -DIM:]))
    policy(state, chain.timesteps[step].float())
    exact = mixture.denoise(state.double(), chain.signal[step], chain.noise[step])
    torch.testing.assert_close(seen[0].double(), exact / (1 + (exact / 10).square()).sqrt(), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="takes prior_output where it was built with sees_prior, and only there"):
        network(state, chain.timesteps[step].float())
