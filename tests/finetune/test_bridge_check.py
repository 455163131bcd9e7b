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


def closed_form(prior, fresh):
    """Σ_k ½ E|r_k|², r_k the regression of (c s + d s_K - mu)/sigma on s, for a share ``fresh`` of states noised anew from s_K.

    Everything is linear: E[s_K s_k] is Π g_j E[s_k²] of stored states, and a_k E[s_K²] of fresh ones.
    """
    chain, clean = prior.chain, prior.denoiser.clean
    gain = chain.c + chain.d * clean + chain.e * prior.denoiser.gain
    bridge = bridge_of(chain)
    c, d = bridge.c, bridge.d
    variance = [torch.tensor(chain.start_std**2, dtype=torch.float64)]
    for k in range(chain.num_steps):
        variance.append(gain[k] ** 2 * variance[k] + chain.sigma[k] ** 2)
    total = 0.0
    for k in range(chain.num_kernels):
        anew = chain.signal[k] ** 2 * variance[-1] + chain.noise[k] ** 2
        square = (1 - fresh) * variance[k] + fresh * anew
        with_end = (1 - fresh) * gain[k:].prod() * variance[k] + fresh * chain.signal[k] * variance[-1]
        slope = (c[k] - gain[k] + d[k] * (with_end / square).nan_to_num()) / chain.sigma[k]  # 0/0 where a chain starts at 0
        total += (0.5 * DIMENSION * slope**2 * square).item()
    return total


def bias(prior, count, fresh):
    return bridge_bias(prior, paths_of(prior, count), fresh, torch.Generator().manual_seed(1))


def paths_of(prior, count=4000):
    return rollout(prior, None, count, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CHAINS)
def test_an_exact_denoiser_has_no_bias(name):
    """Below the threshold with the 400 paths of a run; the closed form says how little a chain of ten steps leaves."""
    prior = prior_of(name, 0.0)
    assert closed_form(prior, 0.0) < 0.1
    assert abs(bias(prior, 400, 0.0)) < 0.1


@pytest.mark.parametrize("fresh", [0.0, 1.0])
@pytest.mark.parametrize(("name", "error"), [("ddpm", -0.3), ("ddim", -0.2), ("brownian", 2.0)])
def test_the_bias_of_another_denoiser_is_the_closed_form(name, error, fresh, monkeypatch):
    monkeypatch.setattr("tiltune.finetune.learning.bridge_check.PATHS", 4000)
    prior = prior_of(name, error)
    expected = closed_form(prior, fresh)
    assert expected > 0.2
    assert bias(prior, 4000, fresh) == pytest.approx(expected, rel=0.1)


def test_fresh_states_are_refused_where_a_coarse_chain_compounds_its_noise():
    """The exact denoiser of ten steps of DDIM: its own states pass, fresh ones do not."""
    prior = prior_of("ddim", 0.0)
    assert closed_form(prior, 0.0) < 0.1 < closed_form(prior, 1.0)
    population = Population(paths_of(prior).with_(energy=torch.zeros(4000)))
    forward = ForwardKL(prior, Linear(prior.chain, 0.0), population, None, TrainConfig(), torch.Generator().manual_seed(0))
    assert forward.check_bridge(lambda nats: nats) < 0.1
    assert forward.bridged and forward.fresh == 0.0


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
    assert preparation.forward_kl.fresh == float(bridged)
    said = [str(warning.message) for warning in raised if "not the exact denoiser" in str(warning.message)]
    assert len(said) == (0 if bridged else 1)
    step = torch.full((50,), 4)
    _, following, _ = preparation.forward_kl.rows(step)
    states = preparation.population.trajectories.states
    stored = (following[:, None] == states[5][None]).all(2).any(1)
    assert stored.all() if not bridged else not stored.any()
    kept = ForwardKL(prior, trainer.state.wrapped, preparation.population, None, config, torch.Generator())
    kept.load_state_dict(preparation.forward_kl.state_dict())
    assert (kept.bridged, kept.fresh) == (bridged, float(bridged))


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
