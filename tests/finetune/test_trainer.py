"""Short runs on the linear Gaussian task, where log Z and the tilted law are known (fixed seeds)."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.distributed.processes import Processes
from tiltune.finetune.energies.energy import Energy
from tiltune.finetune.energies.error import EnergyError
from tiltune.finetune.learning.batch import Batch
from tiltune.finetune.learning.behaviors import BEHAVIORS
from tiltune.finetune.learning.log_z import LogZ
from tiltune.finetune.learning.objective_table import OBJECTIVES
from tiltune.finetune.learning.temperature import Temperature
from tiltune.finetune.learning.trainer import Trainer, TrainResult
from tiltune.samplers.denoiser import Denoiser, ResidualDenoiser
from tiltune.samplers.log_ratio import step_log_ratio
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.prior import Prior
from tiltune.samplers.rollout import rollout
from tiltune.samplers.schedulers.brownian import brownian_chain
from toys.linear_gaussian import LinearGaussian

STEPS = 5


def make_task(alpha: float = 1.0, slope: float = 1.2) -> LinearGaussian:
    """N(.5, 1.5 I) in two dimensions on a pinned Brownian chain: log Z and the tilted mean are exact."""
    mean = torch.full((2,), 0.5, dtype=torch.float64)
    return LinearGaussian(brownian_chain(STEPS), mean, torch.tensor([slope, 0.0], dtype=torch.float64), 1.5, alpha)


def small_policy(prior: Prior, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    network = MLPDenoiser(dim=2, width=16, depth=1, fourier_features=2, bandwidth=0.2)
    for parameter in network.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return ResidualDenoiser(prior.denoiser, network)


def make_config(**changes: Any) -> TrainConfig:
    small: dict[str, Any] = {
        "updates": 60,
        "batch_size": 128,
        "learning_rate": 1e-2,
        "population_size": 2000,
        "warm_start": "none",
        "warm_start_updates": 20,
        "warm_start_rows": 256,
        "tempering_ess": None,
        "monitor_every": 10,
    }
    return TrainConfig(**{**small, **changes})


def train(task: LinearGaussian, config: TrainConfig, energy: Energy | None = None, **options: Any) -> TrainResult:
    prior = task.prior()
    policy = small_policy(prior)
    return Trainer(prior, energy or task.energy, config, policy=policy, progress=False, **options).train()


def residual_std(task: LinearGaussian, policy: Denoiser) -> float:
    """Spread of Λ + E/alpha on half policy, half prior trajectories."""
    prior, generator = task.prior(), torch.Generator().manual_seed(99)
    parts = [rollout(prior, network, 500, generator) for network in (policy, None)]
    ratios = [step_log_ratio(prior.chain, prior.denoiser, policy, part).sum(0) for part in parts]
    x = [ratio + task.energy(part.terminal) / task.alpha for ratio, part in zip(ratios, parts, strict=True)]
    return torch.cat(x).std().item()


def terminal_mean(task: LinearGaussian, policy: Denoiser) -> float:
    """Of the tilted coordinate, over 2000 rollouts: known to .03."""
    return rollout(task.prior(), policy, 2000, torch.Generator().manual_seed(5), keep=False).terminal[:, 0].mean().item()


def without_time(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history]


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if objective.targets_tilted_law])
def test_every_objective_reduces_the_residual(name: Any) -> None:
    task = make_task()
    before = residual_std(task, small_policy(task.prior()))
    result = train(task, make_config(objective=name, updates=100))
    assert residual_std(task, result.policy) < 0.35 * before
    means = [terminal_mean(task, policy) for policy in (task.prior().denoiser, result.policy, task.policy())]
    assert means[2] < means[0] - 2
    assert means[1] == pytest.approx(means[2], abs=0.35)


@pytest.mark.parametrize("name", BEHAVIORS)
def test_log_variance_learns_from_every_behavior(name: str) -> None:
    task = make_task()
    before = residual_std(task, small_policy(task.prior()))
    shares = {"replay": 0.5, "on_policy": 0.5} if name == "replay" else {name: 1.0}
    result = train(task, make_config(behavior=shares))
    assert residual_std(task, result.policy) < 0.5 * before


@pytest.mark.parametrize("name", ["rtb", "log_variance", "trust_pcl", "ppo_kl"])
def test_several_epochs_with_a_clip_reduce_the_residual_in_fewer_rollouts(name: Any) -> None:
    task = make_task()
    before = residual_std(task, small_policy(task.prior()))
    shared = make_config(objective=name, clip=0.2, updates=30, behavior={"on_policy": 1.0}, learning_rate=5e-3)
    once, often = (train(task, replace(shared, epochs=epochs)) for epochs in (1, 6))
    assert once.energy_calls == often.energy_calls
    assert residual_std(task, often.policy) < 0.5 * residual_std(task, once.policy) < before


@pytest.mark.parametrize("name", ["ddpo", "grpo", "ppo_kl"])
def test_comparators_leave_the_tilted_law_and_what_targets_it_stays(name: Any) -> None:
    """From its closed form: the reward alone has no optimum here, and std R is not alpha."""
    task = make_task()
    network = MLPDenoiser(dim=2, width=16, depth=1, fourier_features=2, bandwidth=0.2)
    network.zero_output_()
    policy = ResidualDenoiser(task.policy(), network)
    trainer = Trainer(task.prior(), task.energy, make_config(objective=name), policy=policy, progress=False)
    trainer.train()
    first, *_, last = (line["elbo"] for line in trainer.history)
    assert first == pytest.approx(task.log_z, abs=1e-3)
    lost = task.log_z - last
    assert lost < 1e-3 if name == "ppo_kl" else lost > 0.2


def test_the_warm_start_alone_comes_close() -> None:
    task = make_task()
    before = residual_std(task, small_policy(task.prior()))
    result = train(task, make_config(warm_start="tlm", warm_start_updates=150, updates=0))
    assert residual_std(task, result.policy) < 0.5 * before
    curve = [record["eubo"] for record in result.history if "eubo" in record]
    assert {record["phase"] for record in result.history} == {"warm_start"}
    assert curve[-1] < curve[0]


@pytest.mark.parametrize("name", ["rtb", "trust_pcl"])
def test_learned_log_z_approaches_the_truth(name: Any) -> None:
    """Started at 0, without a population."""
    task = make_task()
    config = make_config(objective=name, behavior={"on_policy": 1.0}, updates=150, log_z_learning_rate=0.05)
    result = train(task, config)
    assert task.log_z > 0.5
    assert result.log_z == pytest.approx(task.log_z, abs=0.06)
    assert result.history[-1]["log_z_learned"] == result.log_z


def test_a_batch_log_z_is_reported_where_none_is_learned() -> None:
    task = make_task()
    assert train(task, make_config()).log_z == pytest.approx(task.log_z, abs=0.15)


def test_nan_energies_are_masked_and_counted() -> None:
    task, bad = make_task(), []

    def flaky(x: Tensor) -> Tensor:
        energy = task.energy(x)
        broken = torch.arange(len(x)) % 50 == 7
        bad.append(int(broken.sum()))
        return energy.masked_fill(broken, torch.nan)

    before = residual_std(task, small_policy(task.prior()))
    result = train(task, make_config(behavior={"on_policy": 0.5, "tilted_prior": 0.5}), flaky)
    assert result.history[-1]["invalid_energies"] == sum(bad[:-1]) > 0  # the last call judges what was reached
    assert all(torch.isfinite(parameter).all() for parameter in result.policy.parameters())
    assert residual_std(task, result.policy) < 0.5 * before


def test_too_many_nan_energies_stop_the_run() -> None:
    task = make_task()
    calls = []

    def decaying(x: Tensor) -> Tensor:
        calls.append(len(x))
        return task.energy(x).masked_fill(torch.arange(len(x)) < (len(x) // 2 if len(calls) > 6 else 0), torch.nan)

    with pytest.raises(EnergyError, match="above the 5%"):
        train(task, make_config(behavior={"on_policy": 1.0}), decaying)
    assert len(calls) == 7  # four of the probe


def test_infinite_energies_are_avoided_and_break_nothing() -> None:
    """Half of the prior has zero density: the policy's share of it falls, and nothing becomes NaN."""
    task = make_task(slope=0.0)
    result = train(task, make_config(updates=80), lambda x: torch.where(x[:, 0] < 0.5, math.inf, 0.0))
    x = rollout(task.prior(), result.policy, 2000, torch.Generator().manual_seed(5), keep=False).terminal
    assert torch.isfinite(x).all()
    assert (x[:, 0] < 0.5).double().mean() < 0.2
    assert all(math.isfinite(record["loss"]) for record in result.history)


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (lambda x: x, "returned shape"),
        (lambda x: x.sum(1).long(), "returned torch.int64"),
        (lambda x: x @ torch.ones(9), "raised RuntimeError"),
        (lambda x: torch.full((len(x),), math.nan), "NaN or -inf"),
        (lambda x: torch.full((len(x),), math.inf), "finite|no mass"),
    ],
)
def test_an_unusable_energy_is_refused_before_any_update(energy: Energy, message: str) -> None:
    task = make_task()
    prior = task.prior()
    policy = small_policy(prior)
    before = [parameter.clone() for parameter in policy.parameters()]
    trainer = Trainer(prior, energy, make_config(warm_start="tlm"), policy=policy, progress=False)
    with pytest.raises(EnergyError, match=message):
        trainer.train()
    assert trainer.history == []
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_tempering_lowers_alpha_monotonically_to_the_one_configured() -> None:
    task = make_task(alpha=0.4)
    config = make_config(alpha=0.4, behavior={"on_policy": 1.0}, tempering_ess=0.3, updates=150)
    alphas = [record["alpha"] for record in train(task, config).history]
    assert alphas[0] > 2 * 0.4
    assert all(after <= before for before, after in pairwise(alphas))
    assert alphas[-1] == 0.4
    assert len(set(alphas)) > 4


def test_tempering_does_not_look_at_masked_energies() -> None:
    temperature = Temperature(make_config(tempering_ess=0.5), Processes(torch.device("cpu")), conditions=1)
    temperature.begin()
    energy = 100 + 0.1 * torch.arange(10.0)
    energy[4] = 0.0  # what a masked energy becomes: it would outweigh all others by exp(100)
    batch = Batch(torch.zeros(2, 10), energy, torch.arange(10) != 4)
    temperature.lower(batch, 10, 0.0, LogZ(1, 0.1, torch.device("cpu")), None)
    assert temperature.alpha == 1.0


def test_processes_agree_on_one_temperature() -> None:
    """As many processes, each with its own batch: the mean of their temperatures, and never below the configured one."""

    class Three(Processes):
        def gather(self, value: Tensor) -> Tensor:
            return torch.cat([value, value + 0.5, value + 1.0])

    processes = Three(torch.device("cpu"))
    processes.count = 3
    temperature = Temperature(make_config(tempering_ess=0.5), processes, conditions=1)
    temperature.begin()
    batch = Batch(torch.zeros(2, 10), torch.zeros(10), torch.ones(10, dtype=torch.bool))
    temperature.lower(batch, 10, 0.0, LogZ(1, 0.1, torch.device("cpu")), None)
    assert temperature.alpha == pytest.approx(1.5)


def test_the_same_seed_repeats_bit_for_bit_and_leaves_the_global_generator_alone() -> None:
    task = make_task()
    config = make_config(
        objective="rtb", warm_start="tlm", updates=12, tempering_ess=0.3, behavior=dict.fromkeys(BEHAVIORS, 1 / len(BEHAVIORS))
    )
    results = []
    for seed in (1, 2):
        prior = task.prior()
        policy = small_policy(prior)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        results.append(Trainer(prior, task.energy, config, policy=policy, progress=False).train())
        assert torch.equal(torch.get_rng_state(), state)
    first, second = results
    assert without_time(first.history) == without_time(second.history)
    for a, b in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    third = train(task, TrainConfig(**{**config.to_dict(), "seed": 1}))
    assert without_time(third.history) != without_time(first.history)


def test_metrics_are_one_json_object_a_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    result = train(make_task(), make_config(warm_start="tlm", updates=12), metrics=file)
    lines = file.read_text().splitlines()
    records = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in lines]
    assert records == result.history
    updates = [record for record in records if record["phase"] == "log_variance"]
    assert [record["update"] for record in updates] == list(range(12))
    assert {"loss", "alpha", "log_z", "residual_std", "elbo", "ess", "energy_calls"} <= set(updates[0])
    assert {"eubo"} <= set(updates[0]) & set(updates[10]) & set(updates[11])
    assert [record["energy_calls"] for record in records] == sorted(record["energy_calls"] for record in records)


def test_energy_calls_are_counted_once_a_sample() -> None:
    counted = []
    task = make_task()

    def counting(x: Tensor) -> Tensor:
        counted.append(len(x))
        return task.energy(x)

    config = make_config(updates=10, behavior={"on_policy": 0.25, "tilted_prior": 0.75})
    result = train(task, config, counting)
    assert result.energy_calls == sum(counted) == 12 + 2000 + 500 + 10 * 32 + 256  # 500 held out, 256 judged


def test_the_prior_stays_frozen_and_a_copy_is_trained() -> None:
    generator = torch.Generator().manual_seed(0)
    network = MLPDenoiser(dim=2, width=8, depth=1, fourier_features=2)
    for parameter in network.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    prior = Prior(network, brownian_chain(STEPS), (2,))
    before = [parameter.clone() for parameter in network.parameters()]
    result = Trainer(prior, lambda x: x[:, 0], make_config(updates=5), progress=False).train()
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, result.policy.parameters(), strict=True))
    assert not result.policy.training


@pytest.mark.parametrize("updates", [1, 2, 3, 4, 9, 10, 11])
def test_short_runs_finish(updates: int) -> None:
    """The one-cycle schedule divides by zero at some small numbers of updates unless it is built for them."""
    result = train(make_task(), make_config(updates=updates, behavior={"on_policy": 1.0}))
    assert len(result.history) == updates


def test_a_run_without_updates_returns_the_prior() -> None:
    task = make_task()
    result = train(task, make_config(updates=0, behavior={"on_policy": 1.0}))
    assert result.history == []
    assert math.isnan(result.log_z)
    assert result.energy_calls == 12


def test_an_interrupted_run_keeps_what_it_has_trained() -> None:
    task = make_task()
    calls = []

    def interrupted(x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) == 11:
            raise KeyboardInterrupt
        return task.energy(x)

    result = train(task, make_config(behavior={"on_policy": 1.0}), interrupted)
    assert [record["update"] for record in result.history] == list(range(6))
    assert not result.policy.training


class Bursts:
    """Multiplies the gradient of the given steps before it is used; notes weights, Adam's state and log Z around each step."""

    def __init__(self, trainer: Trainer, factors: dict[int, float]) -> None:
        self.state, self.factors, self.moved = trainer.state, factors, list[bool]()
        self.step = self.state.optimization.step
        self.state.optimization.step = self.multiplied  # pyright: ignore[reportAttributeAccessIssue]

    def multiplied(self, bound: float) -> float | None:
        for weight in self.state.wrapped.parameters():
            if weight.requires_grad:
                assert weight.grad is not None
                weight.grad *= self.factors.get(self.state.global_step, 1.0)
        before = self.noted()
        nats = self.step(bound)
        self.moved.append(nats is not None)
        if nats is None:
            for old, new in zip(before, self.noted(), strict=True):
                assert torch.equal(old, new)
        return nats

    def noted(self) -> list[Tensor]:
        optimization = self.state.optimization
        adam = [value for entry in optimization._optimizer.state.values() for value in entry.values()]
        return [value.detach().clone() for value in [*optimization.weights, *adam, self.state.log_z.parameter]]


def trainer_with(config: TrainConfig, factors: dict[int, float]) -> tuple[Trainer, Bursts]:
    task = make_task()
    trainer = Trainer(task.prior(), task.energy, config, policy=small_policy(task.prior()), progress=False)
    return trainer, Bursts(trainer, factors)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was(factor: float) -> None:
    trainer, bursts = trainer_with(make_config(objective="rtb", updates=6), {3: factor, 4: factor})
    result = trainer.train()
    assert bursts.moved == [True, True, True, False, False, True]
    assert [record.get("skipped", False) for record in result.history] == [not moved for moved in bursts.moved]


def test_too_many_steps_left_out_in_a_row_stop_the_run() -> None:
    trainer, bursts = trainer_with(make_config(updates=20, max_skipped=3), dict.fromkeys(range(2, 20), math.nan))
    with pytest.raises(FloatingPointError, match="4 steps in a row were left out"):
        trainer.train()
    assert bursts.moved == [True, True, False, False, False]


@pytest.mark.parametrize("spike_factor", [None, 5.0])
def test_a_spike_is_left_out_only_where_that_is_asked_for(spike_factor: float | None) -> None:
    trainer, bursts = trainer_with(make_config(updates=25, spike_factor=spike_factor), {22: 1e3})
    trainer.train()
    assert bursts.moved == [True] * 22 + [spike_factor is None] + [True] * 2
