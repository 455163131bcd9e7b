"""A prior with an energy whose target is known in closed form, and how close a policy has come to it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ...finetune.config.prior import PriorConfig
from ...finetune.energies.energy import Energy
from ...finetune.estimators import ess, log_mean_exp
from ...finetune.populations.held_out import HeldOut
from ...finetune.populations.population import Population
from ...samplers.denoiser import Denoiser
from ...samplers.prior import Prior
from ...samplers.rollout import rollout
from ...samplers.streams import stream
from ...samplers.trajectory import Trajectories
from ...tasks import mixture_chains, mixture_target, tilted_mixture
from ...tasks.gaussian_mixture import GaussianMixture, MixtureDenoiser
from ...tasks.metrics.exact_target import share_tv
from ...tasks.tilts import linear


@dataclass(frozen=True, eq=False)
class Problem:
    """A prior, an energy, and the truth about their tilted law at the temperature alpha.

    exact: paths of the target's exact denoiser, weighted so that they stand for the target on this chain; they measure the EUBO
    of any policy. log_z: of the chain, nats, by these paths; log_z_ideal: in closed form, as of infinitely many steps.
    gap_prior, gap_exact: EUBO - ELBO of the prior and of the exact denoiser, nats: where every training begins, and what the
    size of the chain's steps leaves. ess_exact: effective share of the exact denoiser's paths. samples: rollouts of a policy
    that is measured.
    """

    prior: Prior
    energy: Energy
    target: GaussianMixture
    exact: HeldOut
    log_z: float
    log_z_ideal: float
    gap_prior: float
    gap_exact: float
    ess_exact: float
    samples: int
    seed: int
    alpha: float = 1.0


@lru_cache(maxsize=1)  # a process takes the runs of one problem in a row
@torch.no_grad()
def problem_of(dim: int, ess_prior: float, seed: int, steps: int, samples: int, alpha: float = 1.0) -> Problem:
    """The random mixture of this dimension and seed, on ``steps`` steps, with a linear energy that leaves the share ``ess_prior``
    of the prior effective at the temperature 1."""
    config, energy = PriorConfig(steps=steps, dim=dim, seed=seed), linear(ess_prior, seed)
    prior, reference = tilted_mixture.load_prior(config), tilted_mixture.reference(config, energy, alpha)
    assert reference is not None
    target, log_z = energy.at(dim).target(alpha)
    return _problem(prior, energy, target, float(log_z), reference, samples, seed, alpha)


@lru_cache(maxsize=1)
@torch.no_grad()
def plane_problem(chain: str, steps: int, seed: int, samples: int) -> Problem:
    """The task in the plane, 25 modes to nine, with its shipped prior on this chain, at the temperature 1."""
    table = mixture_chains.build_chain(chain, steps)
    target = mixture_target.target_mixture()
    reference = MixtureDenoiser(mixture_chains.in_states(target, chain), table)
    prior, log_z = mixture_chains.shipped_prior(chain, table), mixture_target.ideal_log_z()
    return _problem(prior, mixture_target.energy, target, log_z, reference, samples, seed, 1.0)


def _problem(
    prior: Prior,
    energy: Energy,
    target: GaussianMixture,
    log_z_ideal: float,
    reference: Denoiser,
    samples: int,
    seed: int,
    alpha: float,
) -> Problem:
    """reference: the exact denoiser of the target on the prior's chain."""
    generator = stream("reference", seed)
    paths, log_weight = _weighted(prior, reference, energy, samples, generator, alpha)
    exact = HeldOut(prior, paths, log_weight.double().softmax(0), alpha)
    eubo_exact = (exact.weight * log_weight.double()).sum().item()
    _, prior_log_weight = _weighted(prior, None, energy, samples, generator, alpha)
    return Problem(
        prior,
        energy,
        target,
        exact,
        log_mean_exp(log_weight)[0],
        log_z_ideal,
        exact.eubo - prior_log_weight.mean().item(),
        eubo_exact - log_weight.mean().item(),
        ess(log_weight),
        samples,
        seed,
        alpha,
    )


def rollouts(problem: Problem, policy: Denoiser) -> tuple[Trajectories, torch.Tensor]:
    """Paths of a policy that is measured, and their log-weights to the target; by the same noise for all of a problem."""
    generator = stream("certificate", problem.seed)
    return _weighted(problem.prior, policy, problem.energy, problem.samples, generator, problem.alpha)


@torch.no_grad()
def measure(problem: Problem, policy: Denoiser, drawn: tuple[Trajectories, torch.Tensor] | None = None) -> dict[str, float]:
    """How far a policy is from the target, by its `rollouts` and the exact denoiser's paths; no energy call of the training.

    drawn: the rollouts, where the caller has them.

    component_tv: between the target's component weights and the mean responsibilities of the policy's samples. gap: EUBO - ELBO,
    nats. log_z_error: |log Z of the policy's weights - log Z of the chain|, nats. ess_share: effective share of the policy's
    paths, over that of the exact denoiser's.
    """
    paths, log_weight = rollouts(problem, policy) if drawn is None else drawn
    shares = problem.target.responsibilities(problem.prior.to_data(paths.terminal).double())
    elbo, eubo = log_weight.double().mean().item(), problem.exact.look(policy).eubo
    return {
        "component_tv": share_tv(shares, problem.target.weights),
        "gap": eubo - elbo,
        "log_z_error": abs(log_mean_exp(log_weight)[0] - problem.log_z),
        "ess_share": ess(log_weight) / problem.ess_exact,
        "elbo": elbo,
        "eubo": eubo,
    }


def measure_weighted(problem: Problem, population: Population) -> dict[str, float | None]:
    """The same of weighted paths without a policy: samples have no gap, and the paths of a climb, which are copies of few, no
    effective share either."""
    shares = problem.target.responsibilities(problem.prior.to_data(population.trajectories.terminal).double())
    weight = population.weight(problem.alpha)
    return {
        "component_tv": share_tv(shares * (len(weight) * weight)[:, None], problem.target.weights),
        "gap": None,
        "log_z_error": abs(population.log_z(problem.alpha).item() - problem.log_z),
        "ess_share": population.ess(problem.alpha) / len(weight) / problem.ess_exact if population.tempering is None else None,
        "elbo": None,
        "eubo": None,
    }


W2_SAMPLES = 400


@torch.no_grad()
def w2_ratio(problem: Problem, policy: Denoiser) -> float:
    """W2 between samples of the policy and exact ones, over that between two sets of exact ones, `W2_SAMPLES` each."""
    from ...tasks.metrics.known_truth import w2

    generator = stream("certificate", problem.seed)
    paths = rollout(problem.prior, policy, W2_SAMPLES, generator, keep=False)
    exact, twin = (problem.target.sample(W2_SAMPLES, generator) for _ in range(2))
    return w2(problem.prior.to_data(paths.terminal), exact) / w2(twin, exact)


@torch.no_grad()
def _weighted(
    prior: Prior, policy: Denoiser | None, energy: Energy, count: int, generator: torch.Generator, alpha: float
) -> tuple[Trajectories, torch.Tensor]:
    """Paths of ``policy`` (of the prior where None) with their energies, and their log-weights to the target, nats."""
    paths = rollout(prior, policy, count, generator)
    paths = paths.with_(energy=energy(prior.to_data(paths.terminal)).float())
    assert paths.energy is not None
    ratio = 0.0 if paths.step_log_ratio is None else paths.step_log_ratio.sum(0)
    return paths, -paths.energy / alpha - ratio
