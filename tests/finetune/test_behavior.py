"""One contract for every behavior, and the laws they draw from (fixed seeds, stated p-values)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor
from torch.distributions import Normal

from tiltune.finetune.estimators import weighted_mean
from tiltune.finetune.learning.behaviors import BEHAVIORS, NEEDS_POPULATION, Context, draw
from tiltune.finetune.learning.replay import UPDATES, Replay
from tiltune.finetune.populations.population import Population, temperature_within_reach
from tiltune.samplers.chain import Chain
from tiltune.samplers.denoiser import Denoiser, evaluate
from tiltune.samplers.log_ratio import step_log_ratio
from tiltune.samplers.make_policy import trainable_copy
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.prior import Prior
from tiltune.samplers.rollout import rollout
from tiltune.samplers.schedulers.brownian import brownian_chain
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler
from tiltune.samplers.trajectory import Trajectories

ALPHA, BANK = 0.8, 400


def ddim_ending_in_noise() -> Chain:
    """set_alpha_to_one=False: the sample keeps the first training step's noise, and the last step carries a ratio."""
    scheduler = DDIMScheduler(
        prediction_type="sample", clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading", steps_offset=1
    )
    return chain_from_scheduler(scheduler, 4)


CHAINS: dict[str, Callable[[], Chain]] = {
    "brownian": lambda: brownian_chain(4),
    "prior last": lambda: chain_from_scheduler(DDPMScheduler(prediction_type="sample", clip_sample=False), 4),
    "explicit last sigma": lambda: chain_from_scheduler(
        DDPMScheduler(prediction_type="sample", clip_sample=False), 4, last_step=0.05
    ),
    "ends in noise": ddim_ending_in_noise,
}


def energy(x: Tensor) -> Tensor:
    """Of the decoded samples, which are twice the states."""
    return 0.3 * (x - 1.0).square().sum(1)


def make_context(chain: Chain, noise_scale: float = 1.0, progress: float = 0.0, size: int = BANK) -> Context:
    generator = torch.Generator().manual_seed(0)
    network = MLPDenoiser(dim=2, width=8, depth=1, fourier_features=4)
    for parameter in network.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    prior = Prior(network, chain, (2,), to_data=lambda state: 2 * state)
    policy = trainable_copy(prior)
    for parameter in policy.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    drawn = rollout(prior, None, size, generator)
    population = Population(drawn.with_(energy=energy(prior.to_data(drawn.terminal)), log_behavior=None))
    kept = Replay(prior)
    own = rollout(prior, policy, size, generator)
    kept.add(own.with_(energy=energy(prior.to_data(own.terminal))))
    return Context(prior, policy, population, ALPHA, progress, noise_scale, replay=kept)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("name", BEHAVIORS)
def test_contract(name: str, chain: str) -> None:
    context = make_context(CHAINS[chain](), noise_scale=1.5)
    if name not in NEEDS_POPULATION:
        context = replace(context, population=None)
    table = context.prior.chain
    state = torch.get_rng_state()
    drawn = BEHAVIORS[name](context, 12, torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn.states.shape == (table.num_steps + 1, 12, 2)
    assert drawn.states.dtype == torch.float32
    assert torch.isfinite(drawn.states).all()
    assert not drawn.states.requires_grad
    if drawn.step_log_ratio is not None:
        assert drawn.step_log_ratio.shape == (table.num_kernels, 12)
        known = step_log_ratio(table, context.prior.denoiser, context.policy, drawn)
        assert torch.allclose(drawn.step_log_ratio, known, atol=1e-4)
    if drawn.log_behavior is not None:
        assert drawn.log_behavior.shape == (12,)
    assert (drawn.log_behavior is None) == (name == "noised_back")
    if drawn.energy is not None:
        # On what the trajectory really ends in, decoded; a wrong one would teach a wrong target.
        assert torch.allclose(drawn.energy, energy(context.prior.to_data(drawn.terminal)), atol=1e-4)
    again = BEHAVIORS[name](context, 12, torch.Generator().manual_seed(5))
    assert torch.equal(again.states, drawn.states)
    other = BEHAVIORS[name](context, 12, torch.Generator().manual_seed(6))
    assert not torch.equal(other.states, drawn.states)


def path_log_density(chain: Chain, network: Denoiser, drawn: Trajectories, scale: float = 1.0) -> Tensor:
    """[B]: sum over kernels of log N(s_{k+1}; mu_k, (scale · sigma_k)²), float64, written out."""
    total = torch.zeros(len(drawn), dtype=torch.float64)
    for step in range(chain.num_kernels):
        state, following = drawn.states[step], drawn.states[step + 1]
        with torch.no_grad():
            mean = chain.kernel.mean(state, step, evaluate(network, chain, state, step, None))
        kernel = Normal(mean.double(), scale * chain.sigma[step].item())
        total += kernel.log_prob(following.double()).sum(1)
    return total


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("chain", ["brownian", "prior last"])
@pytest.mark.parametrize("name", ["on_policy", "prior", "inflated"])
def test_log_behavior_is_the_density_it_says(name: str, chain: str, progress: float) -> None:
    context = make_context(CHAINS[chain](), noise_scale=2.0, progress=progress)
    drawn = BEHAVIORS[name](context, 30, torch.Generator().manual_seed(1))
    table, denoiser = context.prior.chain, context.prior.denoiser
    scale = 2.0 - progress if name == "inflated" else 1.0
    network = denoiser if name == "prior" else context.policy
    expected = path_log_density(table, network, drawn, scale) - path_log_density(table, denoiser, drawn)
    assert drawn.log_behavior is not None
    assert torch.allclose(drawn.log_behavior.double(), expected, atol=2e-4)


def test_log_behavior_of_the_tilted_law() -> None:
    context = make_context(brownian_chain(4))
    drawn = BEHAVIORS["tilted_prior"](context, 30, torch.Generator().manual_seed(1))
    assert context.population is not None
    assert drawn.energy is not None
    assert drawn.log_behavior is not None
    population_energy = context.population.trajectories.energy
    assert population_energy is not None
    log_z = (-population_energy.double() / ALPHA).exp().mean().log().item()
    assert context.population.log_z(ALPHA).item() == pytest.approx(log_z, abs=1e-5)
    assert torch.allclose(drawn.log_behavior, -drawn.energy / ALPHA - log_z, atol=1e-4)


def make_population(size: int = 50) -> Population:
    generator = torch.Generator().manual_seed(0)
    values = 2 * torch.rand(size, generator=generator)
    values[3], values[7] = math.inf, math.nan
    return Population(Trajectories(states=torch.randn(2, size, 1, generator=generator), energy=values))


def test_systematic_resampling_is_unbiased() -> None:
    """Every count is the floor or the ceiling of its expectation; 5000 draws, every mean within 4.5 SE (p = 3e-4 in all)."""
    population, count, rounds = make_population(), 20, 5000
    weight = population.log_weight(ALPHA).double().softmax(0)
    generator = torch.Generator().manual_seed(1)
    counts = torch.stack(
        [torch.bincount(population.draw(count, ALPHA, generator), minlength=len(weight)) for _ in range(rounds)]
    ).double()
    expected = count * weight
    assert (counts - expected).abs().max() < 1
    fraction = expected - expected.floor()
    error = (fraction * (1 - fraction) / rounds).sqrt().clamp(min=1e-12)
    assert ((counts.mean(0) - expected).abs() / error)[weight > 0].max() < 4.5


@pytest.mark.parametrize("others", [math.inf, 1e6])
def test_a_constraint_that_few_meet_keeps_its_temperature(others: float) -> None:
    """1% of 1000 samples: no temperature makes more of them effective but one at which the constraint is none."""
    energy = torch.linspace(0, 1, 1000)
    energy[10:] = others
    assert temperature_within_reach(energy, ALPHA) == ALPHA
    # The control: energies that spread evenly, 2 alpha/L of which are effective, and one that is invalid.
    spread = torch.cat([torch.linspace(0, 160, 1000) * ALPHA, torch.tensor([math.nan])])
    assert temperature_within_reach(spread, ALPHA) == pytest.approx(160 * 0.025 / 2 * ALPHA, rel=0.02)
    assert temperature_within_reach(4 * spread, ALPHA) == ALPHA  # too far to be continued from


def test_a_share_of_few_samples_is_not_enough() -> None:
    """25 of 100 or of 50, where the share alone would ask for one or two; of 20 samples there are no 25 at any temperature."""
    for count in (100, 50):
        spread = torch.linspace(0, 10 * ALPHA, count)  # 2 alpha/L effective of energies that spread evenly over L: 20, 10
        found = temperature_within_reach(spread, ALPHA)
        assert found == pytest.approx(_alpha_for(spread, 25), rel=1e-3) and found > 1.1 * ALPHA
    assert temperature_within_reach(torch.linspace(0, 40 * ALPHA, 20), ALPHA) == ALPHA


def _alpha_for(energy: torch.Tensor, effective: float) -> float:
    """By a fine search of its own, from alpha up."""
    for alpha in (ALPHA * 1.0005**i for i in range(4000)):
        weight = (-energy.double() / alpha).softmax(0)
        if 1 / weight.square().sum() >= effective:
            return alpha
    raise AssertionError


def test_invalid_and_forbidden_samples_are_never_drawn() -> None:
    population = make_population()
    drawn = population.draw(2000, ALPHA, torch.Generator().manual_seed(0))
    assert not set(drawn.tolist()) & {3, 7}
    assert population.trajectories.energy is not None
    # NaN leaves the mean; +inf is a sample of zero density and stays in it.
    values = population.trajectories.energy[~population.trajectories.energy.isnan()].double()
    assert population.log_z(ALPHA).item() == pytest.approx((-values / ALPHA).exp().mean().log().item(), abs=1e-6)
    weight = population.log_weight(ALPHA).double().softmax(0)
    assert population.ess(ALPHA) == pytest.approx(1 / weight.square().sum().item(), rel=1e-5)


def test_draws_come_in_random_order() -> None:
    """Halves of a systematic draw must be alike: their mean index differs by less than 4.5 SE (p = 7e-6)."""
    drawn = make_population().draw(4000, ALPHA, torch.Generator().manual_seed(0)).double()
    first, second = drawn[:2000], drawn[2000:]
    assert (first.mean() - second.mean()).abs() < 4.5 * drawn.std() * math.sqrt(2 / 2000)


@pytest.mark.parametrize("name", ["tilted_prior", "noised_back"])
def test_population_behaviors_reproduce_the_weighted_mean(name: str) -> None:
    """Systematic draws of as many as the population holds: within a tenth of the standard error of independent draws."""
    context = make_context(brownian_chain(4), size=4000)
    assert context.population is not None
    x = context.population.trajectories.terminal[:, 0]
    truth, _ = weighted_mean(x, context.population.log_weight(ALPHA).double().softmax(0))
    drawn = BEHAVIORS[name](context, 4000, torch.Generator().manual_seed(2))
    error = (x.std() / math.sqrt(4000)).item()
    assert drawn.terminal[:, 0].double().mean().item() == pytest.approx(truth, abs=0.5 * error)
    assert abs(truth - x.mean().item()) > 5 * error  # the tilt moved it


@pytest.mark.parametrize(
    ("shares", "count", "sizes"),
    [
        ({"on_policy": 1.0}, 7, {"on_policy": 7}),
        ({"on_policy": 0.5, "prior": 0.5}, 10, {"on_policy": 5, "prior": 5}),
        ({"on_policy": 0.5, "prior": 0.25, "noised_back": 0.25}, 9, {"on_policy": 4, "prior": 2, "noised_back": 3}),
        ({"on_policy": 0.01, "prior": 0.99}, 10, {"prior": 10}),
    ],
)
def test_draw_splits_the_batch(shares: dict[str, float], count: int, sizes: dict[str, int]) -> None:
    parts = dict(draw(shares, make_context(brownian_chain(3)), count, torch.Generator().manual_seed(0)))
    assert {name: len(part) for name, part in parts.items()} == sizes


def test_nothing_is_replayed_before_anything_was_drawn() -> None:
    context = replace(make_context(CHAINS["brownian"]()), replay=Replay(make_context(CHAINS["brownian"]()).prior))
    parts = dict(draw({"on_policy": 0.5, "replay": 0.5}, context, 10, torch.Generator().manual_seed(0)))
    assert {name: len(part) for name, part in parts.items()} == {"on_policy": 5}


def test_what_is_replayed_keeps_the_density_that_drew_it_and_the_oldest_is_given_up() -> None:
    context = make_context(CHAINS["explicit last sigma"](), size=40)
    prior, generator = context.prior, torch.Generator().manual_seed(1)
    kept = Replay(prior)
    assert kept.empty
    policies = [trainable_copy(prior) for _ in range(UPDATES + 1)]
    for number, policy in enumerate(policies):
        for parameter in policy.parameters():
            parameter.data.add_(0.05 * number * torch.randn(parameter.shape, generator=generator))
        drawn = rollout(prior, policy, 40, generator)
        kept.add(drawn.with_(energy=torch.full((40,), float(number))))
    replayed = kept.draw(2000, generator)
    assert replayed.energy is not None
    assert replayed.log_behavior is not None
    assert set(replayed.energy.long().tolist()) == set(range(1, UPDATES + 1))
    for number in (1, UPDATES):
        own = replayed.select((replayed.energy == number).nonzero()[:, 0])
        known = step_log_ratio(prior.chain, prior.denoiser, policies[number], own).sum(0)
        assert own.log_behavior is not None
        assert torch.allclose(own.log_behavior, known, atol=1e-4)
        if number == UPDATES:  # the control: of another policy it is another one
            other = step_log_ratio(prior.chain, prior.denoiser, policies[1], own).sum(0)
            assert (other - known).abs().mean() > 0.1
