"""What must not happen in silence: a warm start toward the wrong law, a lost policy, a moved trajectory."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from tiltune.finetune.certificate.path_metrics import path_metrics
from tiltune.finetune.certificate.verdict import judge_unknown
from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.energies.energy import EnergyMeter
from tiltune.finetune.energies.error import EnergyError
from tiltune.finetune.estimators import weighted_mean
from tiltune.finetune.learning.forward_kl import ForwardKL
from tiltune.finetune.learning.trainer import Trainer
from tiltune.finetune.populations.population import Population
from tiltune.samplers.bridge import bridge_of, forgets_given_next
from tiltune.samplers.denoiser import ResidualDenoiser
from tiltune.samplers.mlp import MLPDenoiser, precondition_for_
from tiltune.samplers.prior import Prior
from tiltune.samplers.rollout import rollout
from tiltune.samplers.schedulers.brownian import brownian_chain
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler
from tiltune.tasks.gaussian_mixture import GaussianMixture, MixtureDenoiser
from tiltune.tasks.metrics.known_truth import w2

VP = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}
CHAINS = {
    "ddpm": lambda: chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", **VP), 20),
    "ddim eta=1": lambda: chain_from_scheduler(DDIMScheduler(**VP), 20, eta=1.0),
    "ddim eta=.5": lambda: chain_from_scheduler(DDIMScheduler(**VP), 20, eta=0.5),
    "flow memoryless": lambda: chain_from_scheduler(FlowMatchEulerDiscreteScheduler(), 20),
    "flow_grpo": lambda: chain_from_scheduler(FlowMatchEulerDiscreteScheduler(), 20, noise="flow_grpo"),
    "brownian": lambda: brownian_chain(20),
}


def gaussian_prior(chain, variance=4.0):
    mixture = GaussianMixture(
        torch.ones(1, dtype=torch.float64),
        torch.zeros(1, 1, dtype=torch.float64),
        torch.full((1, 1, 1), variance, dtype=torch.float64),
    )
    return Prior(MixtureDenoiser(mixture, chain), chain, (1,))


def residual_policy(prior):
    return ResidualDenoiser(prior.denoiser, MLPDenoiser(dim=1, width=8, depth=1, fourier_features=4))


def test_which_chains_let_a_paths_own_end_stand_in_for_its_next_state():
    found = {name for name, build in CHAINS.items() if forgets_given_next(build())}
    assert found == {"ddpm", "ddim eta=1", "brownian"}


@pytest.mark.parametrize("name", CHAINS)
def test_the_warm_start_at_zero_energy_leaves_the_prior_unchanged(name):
    """The regression of z on the state has slope and mean zero within 5 standard errors at every step (p < 1e-4 in all)."""
    chain = CHAINS[name]()
    prior = gaussian_prior(chain)
    trainer = Trainer(prior, lambda x: torch.zeros(len(x)), TrainConfig(seed=3), policy=residual_policy(prior), progress=False)
    population = Population(rollout(prior, None, 20_000, trainer.state.noise.generator).with_(energy=torch.zeros(20_000)))
    forward = ForwardKL(prior, trainer.state.wrapped, population, None, trainer.state.config, trainer.state.noise.generator)
    worst = 0.0
    for k in range(chain.num_kernels):
        step = torch.full((20_000,), k)
        state, following, _ = forward.rows(step)
        output = prior.denoiser(state, chain.timestep(step, state), None)
        z = chain.kernel.standardize(following, state, step, output).double().flatten()
        s = state.double().flatten()
        for moment in (z, z * s):
            if moment.std() > 0:
                worst = max(worst, (moment.mean().abs() / (moment.std() / math.sqrt(len(moment)))).item())
    assert worst < 5, worst


def test_own_path_ends_on_a_chain_that_remembers_them_would_have_been_caught():
    """The control: the replacement forced onto DDIM with eta = .5 fails the check above by far."""
    chain = CHAINS["ddim eta=.5"]()
    prior = gaussian_prior(chain)
    drawn = rollout(prior, None, 20_000, torch.Generator().manual_seed(0))
    bridge = bridge_of(chain)
    c, d = bridge.c, bridge.d
    k = chain.num_kernels // 2
    step = torch.full((20_000,), k)
    state = drawn.states[k]
    following = c[k].item() * state + d[k].item() * drawn.states[-1]
    output = prior.denoiser(state, chain.timestep(step, state), None)
    moment = (chain.kernel.standardize(following, state, step, output) * state).double().flatten()
    assert moment.mean().abs() > 20 * moment.std() / math.sqrt(len(moment))


def test_an_update_whose_energies_are_all_invalid_stops_with_the_weights_intact():
    prior = gaussian_prior(brownian_chain(5))
    calls = []

    def energy(x):
        calls.append(len(x))
        return torch.full((len(x),), torch.nan if len(calls) > 4 else 0.0)

    config = TrainConfig(warm_start="none", behavior={"on_policy": 1.0}, batch_size=16, updates=2, max_invalid=1.0)
    policy = residual_policy(prior)
    before = [parameter.clone() for parameter in policy.parameters()]
    with pytest.raises(EnergyError, match=r"valid|invalid"):
        Trainer(prior, energy, config, policy=policy, progress=False).train()
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_an_energy_that_works_in_place_moves_nothing():
    x = torch.full((4, 2), 2.0)
    EnergyMeter(lambda sample: sample.clamp_(0, 1).sum(1))(x)
    assert (x == 2.0).all()


def test_one_nan_among_the_first_few_energies_does_not_stop_a_run():
    meter = EnergyMeter(lambda x: torch.tensor([0.0, 1.0, torch.nan, 2.0]))
    assert meter(torch.zeros(4, 1)).isnan().sum() == 1
    assert meter.invalid == 1


def test_nothing_finite_on_the_target_side_is_inconclusive_and_never_a_crash():
    from tiltune.finetune.certificate.evidence import gather_evidence

    prior = gaussian_prior(brownian_chain(4))
    evidence = gather_evidence(
        prior, prior.denoiser, lambda x: torch.full((len(x),), torch.inf), 1.0, torch.Generator().manual_seed(0), size=400
    )
    metrics = path_metrics(evidence)
    assert math.isnan(metrics["eubo"]) and metrics["violation_rate"] == 1.0
    assert judge_unknown(evidence, metrics)[0] == "inconclusive"
    assert all(math.isnan(value) for value in weighted_mean(torch.ones(3), torch.zeros(3)))


def test_w2_of_nan_samples_is_nan_not_zero():
    x = torch.zeros(10, 2)
    assert math.isnan(w2(torch.full_like(x, torch.nan), x))


def test_a_residual_policy_starts_at_the_prior_whatever_its_preconditioning():
    chain = brownian_chain(10)
    prior = gaussian_prior(chain)
    network = precondition_for_(MLPDenoiser(dim=1, width=8, depth=1, fourier_features=4), chain, 2.0)
    policy = ResidualDenoiser(prior.denoiser, network)
    state = torch.randn(7, 1, generator=torch.Generator().manual_seed(0))
    label = chain.timestep(3, state)
    assert torch.equal(policy(state, label), prior.denoiser(state, label))
