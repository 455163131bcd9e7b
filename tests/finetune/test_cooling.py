"""Where the islands of a climb come apart, the warm start cools from the prior's own paths as far as the policy follows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tiltune.finetune.certificate.climbed import hidden
from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.estimators import ess
from tiltune.finetune.learning.trainer import Trainer
from tiltune.finetune.populations.population import Population
from tiltune.finetune.populations.smc import IslandsApart, climb
from tiltune.samplers.make_policy import make_policy
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.rollout import rollout
from tiltune.samplers.trajectory import Trajectories
from tiltune.tasks import manywell
from tiltune.tasks.double_wells import energy

CONFIG = TrainConfig(population_size=600, warm_start_updates=60, warm_start_rows=256, updates=0, checkpoint_every=0)
PRIOR = manywell.load_prior(replace(manywell.recipe(4).prior, steps=8))


def of_prior(count: int) -> Trajectories:
    paths = rollout(PRIOR, None, count, torch.Generator().manual_seed(0))
    return paths.with_(energy=energy(PRIOR.to_data(paths.terminal)))


def test_a_climb_ends_where_its_islands_are_apart() -> None:
    def up(apart: float) -> Any:
        with hidden(None, "") as bar:
            evaluate = lambda some: some.with_(energy=energy(PRIOR.to_data(some.terminal)))  # noqa: E731
            return climb(PRIOR, of_prior(100), 1.0, torch.Generator().manual_seed(0), evaluate, bar=bar, apart=apart)

    assert up(10.0).betas[-1] == 1.0
    with pytest.raises(IslandsApart, match=r"at beta = 0\.\d+ its islands differ in log Z by \d"):
        up(0.01)


def test_the_temperature_within_reach_has_as_many_effective_paths_as_wanted() -> None:
    population = Population(of_prior(2000))
    found = population.within_reach(1.0, 500.0)
    assert found > 1.0 and 500 <= population.ess(found) < 510
    assert population.ess(found) == pytest.approx(2000 * ess(population.log_weight(found)))
    assert population.within_reach(1.0, 1.0) == 1.0
    assert math.isfinite(population.within_reach(1.0, 1999.999))


def test_a_gap_between_prior_and_policy_does_not_hold_the_temperature() -> None:
    """E = 20 x on N(0, 1), and a policy at N(-10, 1), the law at 2: at 6 neither reaches. From 2 on it cools nevertheless."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, generator=generator)
    x[2000:] -= 10.0
    proposal = torch.logaddexp(torch.zeros(4000), -10 * x - 50) - math.log(2)
    population = Population(Trajectories(x[None, :, None], energy=20 * x), proposal)
    assert population.ess(2.0) > 1900 and population.ess(30.0) > 1000 > 100 > population.ess(6.0)
    assert population.within_reach(1.0, 200.0) > 10
    assert 1.0 < population.within_reach(1.0, 200.0, 2.0) < 1.9
    assert population.within_reach(1.0, 3000.0, 2.0) == 2.0


def trained(monkeypatch: pytest.MonkeyPatch, apart: float, config: TrainConfig = CONFIG) -> tuple[Trainer, list[dict[str, Any]]]:
    monkeypatch.setattr("tiltune.finetune.populations.climbing.APART", apart)
    lines: list[dict[str, Any]] = []
    trainer = Trainer(
        PRIOR, energy, config, policy=make_policy(PRIOR), progress=False, on_record=lambda step, line: lines.append(line)
    )
    trainer.train()
    return trainer, lines


@pytest.mark.filterwarnings("ignore:too few prior samples")
def test_the_warm_start_cools_and_never_heats(monkeypatch: pytest.MonkeyPatch) -> None:
    """From prior paths alone, renewed at every twentieth of the warm start until the target's temperature is reached."""
    seen: list[float] = []
    from tiltune.finetune.learning.preparation import Preparation

    cool = Preparation._cool  # pyright: ignore[reportPrivateUsage]

    def noted(self: Preparation) -> None:
        cool(self)
        assert self.forward_kl is not None
        seen.append(self.forward_kl.alpha)

    monkeypatch.setattr(Preparation, "_cool", noted)
    trainer, lines = trained(monkeypatch, 0.0)
    preparation = trainer.state.preparation
    assert preparation.held_out is None and preparation.population is not None
    assert preparation.population.tempering is not None and preparation.population.tempering.prior_count == 600
    assert seen[0] > 2.0 and seen == sorted(seen, reverse=True) and seen[-1] < 0.7 * seen[0]
    assert lines[0]["phase"] == "warm_start" and lines[0]["alpha"] == seen[0]


@pytest.mark.filterwarnings("ignore:too few prior samples")
def test_the_updates_begin_no_hotter_than_the_warm_start_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would take back what it learned: at a high temperature the target is the prior."""
    trainer, lines = trained(monkeypatch, 0.0, replace(CONFIG, updates=4, batch_size=32, tempering_ess=0.99))
    forward = trainer.state.preparation.forward_kl
    first = next(line for line in lines if line["phase"] == "log_variance")
    assert forward is not None and first["alpha"] == forward.alpha == 1.0
    monkeypatch.setattr("tiltune.finetune.learning.preparation.Preparation.reached", math.inf)
    _, lines = trained(monkeypatch, 0.0, replace(CONFIG, updates=4, batch_size=32, tempering_ess=0.99))
    assert next(line for line in lines if line["phase"] == "log_variance")["alpha"] > 1.0


@pytest.mark.filterwarnings("ignore:too few prior samples")
def test_a_learned_log_z_begins_where_the_renewed_population_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prior's paths alone said something else before the warm start; one update cannot have moved it far."""
    config = replace(CONFIG, objective="rtb", updates=1, batch_size=32, log_z_learning_rate=1e-6)
    trainer, _ = trained(monkeypatch, 0.0, config)
    population, temperature = trainer.state.preparation.population, trainer.state.temperature
    assert population is not None
    by_prior = Population(population.prior_paths).log_z(1.0).item()
    assert trainer.state.log_z.parameter.item() == pytest.approx(population.log_z(temperature.alpha).item(), abs=1e-3)
    assert abs(trainer.state.log_z.parameter.item() - by_prior) > 0.01


def test_islands_that_agree_are_the_population_at_the_targets_own_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, lines = trained(monkeypatch, math.inf)
    preparation = trainer.state.preparation
    assert preparation.held_out is not None and preparation.forward_kl is not None
    assert preparation.forward_kl.alpha == 1.0 and "alpha" not in lines[0]


def test_a_residual_networks_own_waves_see_one_coordinate_each() -> None:
    network = MLPDenoiser(dim=3, width=4, depth=1, fourier_features=1, own_frequencies=2)
    assert network.own is not None
    with torch.no_grad():
        network.own.outward.weight.normal_(generator=torch.Generator().manual_seed(0))
    step = torch.tensor([10.0, 900.0])

    def own(state: torch.Tensor) -> torch.Tensor:
        return network(state, step)[0]  # the other part is zero at the start

    jacobian = torch.autograd.functional.jacobian(own, torch.randn(2, 3, generator=torch.Generator().manual_seed(1)))
    at = torch.arange(2)[:, None], torch.arange(3)[None]
    diagonal = jacobian[at[0], at[1], at[0], at[1]]  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert diagonal.abs().min() > 1e-3
    assert jacobian.abs().sum() == pytest.approx(diagonal.abs().sum().item())  # pyright: ignore[reportAttributeAccessIssue]
    network.zero_output_()
    assert own(torch.ones(2, 3)).abs().max() == 0
