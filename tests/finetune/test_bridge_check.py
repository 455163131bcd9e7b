"""Bridged next states are used only where the prior's own paths show that they may be."""

import warnings

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.learning.bridge_check import bridge_bias
from tiltune.finetune.learning.forward_kl import ForwardKL
from tiltune.finetune.learning.trainer import Trainer
from tiltune.finetune.populations.population import Population
from tiltune.samplers.bridge import bridge_of
from tiltune.samplers.prior import Prior
from tiltune.samplers.rollout import rollout
from tiltune.samplers.schedulers.brownian import brownian_chain
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler

VP = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}
CHAINS = {
    "ddpm": lambda: chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", **VP), 10),
    "ddim": lambda: chain_from_scheduler(DDIMScheduler(**VP), 10, eta=1.0),
    "brownian": lambda: brownian_chain(10),
}
DIMENSION, VARIANCE = 4, 0.5


class Linear(torch.nn.Module):
    """x_hat = (1 + error) E[x | s] for Gaussian data of variance `VARIANCE`: exact where ``error`` is 0."""

    def __init__(self, chain, error):
        super().__init__()
        signal, noise = chain.signal[: chain.num_steps], chain.noise[: chain.num_steps]
        exact = (signal * VARIANCE / (signal**2 * VARIANCE + noise**2)).nan_to_num()  # 0/0 where a Brownian chain starts
        self.labels, self.clean = chain.timesteps, (1 + error) * exact
        self.gain = (self.clean - chain.p) / chain.q
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, state, timestep, condition=None):
        step = (timestep.reshape(-1, 1).double() - self.labels).abs().argmin(1)
        return self.gain[step].float()[:, None] * state + self.weight


def prior_of(name, error):
    chain = CHAINS[name]()
    return Prior(Linear(chain, error), chain, (DIMENSION,))


def closed_form(prior):
    """Σ_k ½ E|r_k|² with r_k = (c s + d E[s_K | s] - mu)/sigma, by recursion: everything is linear, E[s_K | s_k] = Π g_j s_k."""
    chain, clean = prior.chain, prior.denoiser.clean
    gain = chain.c + chain.d * clean + chain.e * prior.denoiser.gain
    bridge = bridge_of(chain)
    c, d = bridge.c, bridge.d
    variance, total = torch.tensor(chain.start_std**2, dtype=torch.float64), 0.0
    for k in range(chain.num_kernels):
        slope = (c[k] + d[k] * gain[k:].prod() - gain[k]) / chain.sigma[k]
        total += (0.5 * DIMENSION * slope**2 * variance).item()
        variance = gain[k] ** 2 * variance + chain.sigma[k] ** 2
    return total


def paths_of(prior, count=4000):
    return rollout(prior, None, count, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CHAINS)
def test_an_exact_denoiser_has_no_bias(name):
    """Below the threshold with the 400 paths of a run; the closed form says how little a chain of ten steps leaves."""
    prior = prior_of(name, 0.0)
    assert closed_form(prior) < 0.1
    assert abs(bridge_bias(prior, paths_of(prior, 400))) < 0.1


@pytest.mark.parametrize(("name", "error"), [("ddpm", -0.2), ("ddim", -0.2), ("brownian", 2.0)])
def test_the_bias_of_another_denoiser_is_the_closed_form(name, error, monkeypatch):
    monkeypatch.setattr("tiltune.finetune.learning.bridge_check.PATHS", 4000)
    prior = prior_of(name, error)
    expected = closed_form(prior)
    assert expected > 0.2
    assert bridge_bias(prior, paths_of(prior)) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("error", "bridged"), [(0.0, True), (-0.3, False)])
def test_plain_rows_take_stored_next_states_where_the_bridge_is_biased(error, bridged):
    """With a warning that says by how much."""
    prior = prior_of("ddpm", error)
    config = TrainConfig(population_size=1000, warm_start_updates=2, warm_start_rows=16, updates=0)
    trainer = Trainer(prior, lambda x: x.square().sum(1), config, policy=Linear(prior.chain, error), progress=False)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        trainer.train()
    preparation = trainer.state.preparation
    assert preparation.forward_kl.bridged is bridged
    said = [str(warning.message) for warning in raised if "not the exact denoiser" in str(warning.message)]
    assert len(said) == (0 if bridged else 1)
    step = torch.full((50,), 4)
    _, following, _ = preparation.forward_kl.rows(step)
    states = preparation.population.trajectories.states
    stored = (following[:, None] == states[5][None]).all(2).any(1)
    assert stored.all() if not bridged else not stored.any()
    kept = ForwardKL(prior, trainer.state.wrapped, preparation.population, None, config, torch.Generator())
    kept.load_state_dict(preparation.forward_kl.state_dict())
    assert kept.bridged is bridged


def test_controlled_rows_are_not_asked():
    """At E = 0 their factor w - h is 0, whatever the bridge says."""
    prior = prior_of("ddpm", -0.3)
    population = Population(paths_of(prior, 100).with_(energy=torch.zeros(100)))
    forward = ForwardKL(prior, Linear(prior.chain, -0.3), population, object(), TrainConfig(), torch.Generator())
    assert forward.bridged_and_controlled
    config = TrainConfig(
        population_size=200, warm_start_updates=2, warm_start_rows=16, updates=0, soft_value_updates=2, objective="reinforce_kl"
    )
    trainer = Trainer(prior, lambda x: x.square().sum(1), config, policy=Linear(prior.chain, -0.3), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train()
    assert trainer.state.preparation.forward_kl.bridged
