"""Several conditions in one training: each has a law of its own, so log Z, baselines, weights and verdicts are its own."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from tiltune.finetune.certificate.evidence import gather_evidence
from tiltune.finetune.certificate.path_metrics import path_metrics
from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.distributed.processes import Processes
from tiltune.finetune.energies.error import EnergyError
from tiltune.finetune.learning.batch import Batch
from tiltune.finetune.learning.gradients import objective_gradient
from tiltune.finetune.learning.improvement import Improvement
from tiltune.finetune.learning.log_z import LogZ
from tiltune.finetune.learning.objective_table import OBJECTIVES
from tiltune.finetune.learning.path_data import PathData
from tiltune.finetune.learning.replay import Replay
from tiltune.finetune.learning.soft_value import fit_soft_value, standardized
from tiltune.finetune.learning.temperature import Temperature
from tiltune.finetune.learning.trainer import Trainer
from tiltune.finetune.populations.population import Population, temperature_within_reach
from tiltune.finetune.runs.state_file import read_state, write_state
from tiltune.finetune.runs.verdicts import together
from tiltune.samplers.condition import Condition, ConditionTable, selected
from tiltune.samplers.denoiser import estimated_data
from tiltune.samplers.resampling import importance_resample
from tiltune.samplers.rollout import rollout
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler
from toys.conditional import Conditional, ConditionalShift

SLOPES = torch.tensor([[1.0, -0.5], [-1.2, 0.4], [0.1, 0.5]], dtype=torch.float64)
VP = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}


@pytest.fixture(scope="module")
def problem() -> Conditional:
    chain = chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", **VP), 6)
    return Conditional(chain, SLOPES)


@pytest.fixture(scope="module")
def population(problem: Conditional) -> Population:
    return population_of(problem, 12_000)


def population_of(problem: Conditional, size: int) -> Population:
    drawn = rollout(problem.prior(), None, size, torch.Generator().manual_seed(0))
    return Population(drawn.with_(energy=problem.energy(drawn.terminal, drawn.context["class_labels"])))


# --- the table ------------------------------------------------------------------------------------------------------------


def test_conditions_go_in_turn_and_with_their_trajectories(problem: Conditional) -> None:
    drawn = rollout(problem.prior(), None, 5, torch.Generator().manual_seed(0))
    assert drawn.group.tolist() == [0, 1, 2, 0, 1]
    assert [index.tolist() for index in drawn.groups] == [[0, 3], [1, 4], [2]]
    picked = drawn.select(torch.tensor([4, 2]))
    assert picked.context["class_labels"].tolist() == [10, 20]
    assert picked.context["prompts"] == ["prompt 1", "prompt 2"]
    alone = rollout(problem.prior().only(2), None, 2, torch.Generator().manual_seed(0))
    assert alone.group.tolist() == [0, 0] and alone.context["class_labels"].tolist() == [20, 20]
    assert selected(None, slice(0, 1)) is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (((), {}), "without a row"),
        ((("a", "b", "a"), {}), "the condition a stands twice"),
        ((("a", "b"), {"class_labels": torch.zeros(3)}), "class_labels has 3 rows for 2 conditions"),
        ((("a",), {}, {"prompts": ()}), "prompts has 0 rows for 1 conditions"),
    ],
)
def test_a_table_that_cannot_be_is_refused(columns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConditionTable(*columns)


# --- the population ---------------------------------------------------------------------------------------------------------


def test_weights_and_log_z_are_each_conditions_own(problem: Conditional, population: Population) -> None:
    """log Z within 5 standard errors of the closed form (p < 1e-5 together); draws are even over the conditions, and each
    condition's have the mean of its own tilted law."""
    truth = torch.tensor([law.log_z for law in problem.laws])
    weights = [population.log_weight(1.0)[index].exp() for index in population.trajectories.groups]
    error = torch.tensor([(weight.std() / weight.mean()).item() / math.sqrt(len(weight)) for weight in weights])
    assert ((population.log_z(1.0) - truth).abs() < 5 * error).all()
    assert (truth[0] - truth[2]).abs() > 10 * error.max()  # one log Z for all would be seen
    drawn = population.trajectories.select(population.draw(6001, 1.0, torch.Generator().manual_seed(1)))
    assert [len(index) for index in drawn.groups] == [2001, 2000, 2000]
    for index, law in zip(drawn.groups, problem.laws, strict=True):
        expected = -law.slope.float()  # N(0, I) tilted by exp(-b·x) is N(-b, I), here but for the chain's own variance
        assert (drawn.terminal[index].mean(0) - expected).norm() < 0.15 * expected.norm()
    assert population.weight(1.0).sum().item() == pytest.approx(1.0, abs=1e-12)
    assert [population.weight(1.0)[index].sum().item() for index in population.trajectories.groups] == pytest.approx([1 / 3] * 3)


def test_the_condition_that_is_hardest_to_reach_sets_the_temperature() -> None:
    energy, group = torch.cat([torch.linspace(0, 1, 2000), torch.linspace(0, 160, 2000)]), torch.arange(4000) // 2000
    alone = [temperature_within_reach(energy[group == row], 1.0) for row in (0, 1)]
    assert alone[0] == 1.0 < alone[1]
    assert temperature_within_reach(energy, 1.0, group) == alone[1]


# --- one update -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_the_mean_of_the_conditions_own(name: str) -> None:
    """On a batch of three conditions in any order, to 1e-6; taken for one condition it is another gradient."""
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(3, (24,), generator=generator)
    levels = torch.tensor([0.0, 4.0, -7.0])  # of the conditions' energies
    energy = levels[group] + torch.randn(24, generator=generator)
    ratio = 0.3 * torch.randn(4, 24, generator=generator)
    batch = Batch(ratio, energy, torch.ones(24, dtype=torch.bool), ratio.sum(0), 0.1 * ratio, group)
    log_z = torch.tensor([0.1, -0.2, 0.3])
    loss, found = objective_gradient(OBJECTIVES[name], batch, 0.5, log_z, 20.0)
    g = found["step_log_ratio"]
    assert ("log_z" in found) == OBJECTIVES[name].learns_log_z
    expected, losses = torch.zeros_like(g), []
    for row in range(3):
        own = (group == row).nonzero()[:, 0]
        part, alone = objective_gradient(OBJECTIVES[name], batch.select(own), 0.5, log_z[row], 20.0)
        losses.append(part / 3)
        expected[:, own] = alone["step_log_ratio"] / 3
        if OBJECTIVES[name].learns_log_z:
            assert found["log_z"][row].item() == pytest.approx(alone["log_z"].item() / 3, abs=1e-6)
    assert torch.allclose(g, expected, atol=1e-6) and loss.item() == pytest.approx(sum(losses).item(), abs=1e-5)
    as_one = objective_gradient(OBJECTIVES[name], replace(batch, group=None), 0.5, torch.zeros(1), 20.0)[1]["step_log_ratio"]
    assert not torch.allclose(as_one, g, atol=1e-3)


def test_the_soft_value_knows_the_condition(problem: Conditional, population: Population) -> None:
    """Its error is below a third of that of a value that is asked for another condition."""
    prior, generator = problem.prior(), torch.Generator().manual_seed(1)
    value = fit_soft_value(population, PathData(prior, population.trajectories), 1.0, 250, generator)
    state = torch.randn(600, 2, generator=torch.Generator().manual_seed(2))
    step = torch.full((600,), 4)

    def error(asked: int, row: int) -> float:
        g, _ = (part[4].float() for part in problem.laws[row].soft_value)
        exact = state @ g
        data = estimated_data(prior.denoiser, prior.chain, state, step, Condition(prior.condition_table, torch.full((600,), row)))
        found = value(data, step, torch.full((600,), asked))
        return ((found - found.mean()) - (exact - exact.mean())).square().mean().item()

    for row in range(3):
        assert error(row, row) < error((row + 1) % 3, row) / 3
    _, spreads = standardized(population, 1.0)
    assert torch.allclose(spreads, SLOPES.float().norm(dim=1), rtol=0.05)


# --- whole trainings --------------------------------------------------------------------------------------------------------

QUICK = TrainConfig(
    population_size=6000, warm_start_updates=120, warm_start_rows=300, warm_start_learning_rate=0.03, updates=60, batch_size=96,
    learning_rate=0.01, tempering_ess=None,
)  # fmt: skip
RECIPES = {
    **{name: replace(QUICK, objective=name) for name, objective in OBJECTIVES.items() if objective.targets_tilted_law},
    "rtb, tempered": replace(QUICK, objective="rtb", tempering_ess=0.5, warm_start="none", updates=150, learning_rate=0.05),
    "controlled": replace(QUICK, objective="reinforce_kl", soft_value_updates=200, forward_rows=128),
    "value drift": replace(QUICK, objective="log_variance", warm_start="value_drift", soft_value_updates=200),
    "noised back": replace(QUICK, behavior={"on_policy": 0.5, "noised_back": 0.5}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_learns_each_conditions_law(name: str, problem: Conditional) -> None:
    """After training the residual gap is below a fifth of the prior's for each condition, and the log Z of each is within .1 of
    the closed form. The control: judged by another condition's energy, the same policy is further away than the prior."""
    prior, policy = problem.prior(), ConditionalShift(problem)
    trainer = Trainer(prior, problem.energy, RECIPES[name], policy=policy, progress=False)
    result = trainer.train()
    assert list(result.log_z_by_condition) == ["label 0", "label 10", "label 20"]
    for row, law in enumerate(problem.laws):
        one = result.policy.only(row)
        evidence = gather_evidence(
            one.prior, one, problem.energy, 1.0, torch.Generator().manual_seed(5), size=4000, starts=0, rollouts=2
        )
        metrics = path_metrics(evidence)
        assert metrics["gap"] < 0.2 * metrics["prior"]["gap"], row
        assert metrics["log_z"] == pytest.approx(law.log_z, abs=0.1)
        if OBJECTIVES[RECIPES[name].objective].learns_log_z:  # else it is an estimate from the last batch
            assert result.log_z_by_condition[f"label {10 * row}"] == pytest.approx(law.log_z, abs=0.1)
        wrong = gather_evidence(
            one.prior,
            one,
            problem.laws[row - 1].energy,
            1.0,
            torch.Generator().manual_seed(5),
            size=4000,
            starts=0,
        )
        assert path_metrics(wrong)["gap"] > path_metrics(wrong)["prior"]["gap"]
    if RECIPES[name].warm_start != "none":
        assert result.improvement is not None and "on average over 3 conditions (the least: " in result.improvement.sentence
    last = trainer.history[-1]
    assert set(last["conditions"]) == {"label 0", "label 10", "label 20"}
    if "elbo" in last:
        assert last["elbo"] == pytest.approx(sum(own["elbo"] for own in last["conditions"].values()) / 3, abs=1e-9)


@pytest.mark.parametrize("name", ["rtb, tempered", "controlled", "value drift"])
def test_resumed_at_any_step_it_is_the_same_run(name: str, problem: Conditional, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"population_size": 150, "warm_start_rows": 32, "updates": 3, "batch_size": 12, "checkpoint_every": 1}
    config = replace(RECIPES[name], warm_start_updates=3, soft_value_updates=min(2, RECIPES[name].soft_value_updates), **sizes)

    def keep(trainer: Trainer) -> None:
        folder = tmp_path / str(trainer.global_step)
        folder.mkdir()
        write_state(folder, "run", trainer.state_dict())
        write_state(folder, "process", trainer.own_state_dict())

    def begin(keep: Any = None) -> Trainer:
        return Trainer(
            problem.prior(), problem.energy, config, policy=ConditionalShift(problem), progress=False, on_checkpoint=keep
        )

    whole = begin(keep)
    ended = whole.train()
    steps = sorted(int(folder.name) for folder in tmp_path.iterdir())
    assert len(steps) >= 3
    for step in steps:
        resumed = begin()
        resumed.load_state_dict(read_state(tmp_path / str(step), "run"), read_state(tmp_path / str(step), "process"))
        again = resumed.train()
        assert str(resumed.history) == str(whole.history), step
        assert again.log_z_by_condition == ended.log_z_by_condition
        for one, other in zip(again.policy.parameters(), ended.policy.parameters(), strict=True):
            assert torch.equal(one, other)


def test_an_offset_of_one_conditions_energies_changes_nothing(problem: Conditional) -> None:
    """The target is the same, and so are the training, to rounding, and what is said of it; each condition's gain is named."""
    config = replace(QUICK, objective="log_variance", updates=5, batch_size=25)
    told = []
    for offset in (0.0, 60.0):

        def energy(x: Tensor, class_labels: Tensor, offset: float = offset) -> Tensor:
            return problem.energy(x, class_labels) + offset * (class_labels == 10)

        trained = Trainer(problem.prior(), energy, config, policy=ConditionalShift(problem), progress=False).train()
        assert trained.improvement is not None
        told.append(trained.improvement)
    first, second = told
    assert second.nats == pytest.approx(first.nats, abs=0.01) and second.se == pytest.approx(first.se, abs=0.01)
    assert first.gap_prior == pytest.approx(second.gap_prior, abs=0.01) and first.nats < first.gap_prior + 3 * first.se
    assert list(first.by_condition) == ["label 0", "label 10", "label 20"]
    assert sum(nats for nats, _ in first.by_condition.values()) / 3 == pytest.approx(first.nats, abs=1e-9)


def test_a_condition_that_came_off_worse_than_the_prior_is_named() -> None:
    each = {"label 1": (2.0, 0.1), "label 2": (-0.8, 0.2)}
    sentence = Improvement(0.6, 0.1, 3.0, "the updates", by_condition=each).sentence
    assert (
        "WORSE THAN THE PRIOR: label 2, -0.80 ± 0.20 nats" in sentence
        and "closer to the target than the prior by 0.60" in sentence
    )
    assert "the least: label 1" in Improvement(0.6, 0.1, 3.0, "x", by_condition={"label 1": (0.3, 0.2)}).sentence


def test_one_invalid_energy_leaves_a_condition_out_of_one_update(problem: Conditional) -> None:
    """Of two trajectories of a condition one has none: its log Z stays where it was, the others' move."""
    calls = []

    def energy(x: Tensor, class_labels: Tensor) -> Tensor:
        calls.append(len(x))
        value = problem.energy(x, class_labels)
        return value.index_fill(0, (class_labels == 20).nonzero()[:1, 0], math.nan) if len(calls) == 4 + 1 else value

    config = replace(QUICK, objective="rtb", warm_start="none", updates=1, behavior={"on_policy": 1.0}, batch_size=6)
    trainer = Trainer(problem.prior(), energy, config, policy=ConditionalShift(problem), progress=False)
    moved = list(trainer.train().log_z_by_condition.values())
    assert moved[2] == 0.0 and moved[0] != 0.0 != moved[1] and sum(calls) == 12 + 6


def test_few_trajectories_of_a_condition_do_not_end_the_tempering(problem: Conditional) -> None:
    """Of two a half is always effective. Taken together they say that the target is far; of many each condition says so."""

    def chosen(count: int) -> float:
        group = torch.arange(count) % 3
        energy = 30 * torch.randn(count, generator=torch.Generator().manual_seed(0)) + 1000.0 * group
        temperature = Temperature(replace(QUICK, tempering_ess=0.3), Processes(torch.device("cpu")), conditions=3)
        temperature.begin()
        batch = Batch(torch.zeros(2, count), energy, torch.ones(count, dtype=torch.bool), group=group)
        temperature.lower(batch, count, 0.0, LogZ(3, 0.1, torch.device("cpu")), None)
        return temperature.alpha

    assert chosen(6) > 1.0 and chosen(36) > 8 and 15 < chosen(600) < 40


def test_an_energy_sees_the_conditions_of_its_samples(problem: Conditional) -> None:
    seen: list[tuple[list[int], list[str]]] = []

    def energy(x: Tensor, class_labels: Tensor, prompts: list[str]) -> Tensor:
        seen.append((class_labels.tolist(), prompts))
        return problem.energy(x, class_labels)

    config = replace(QUICK, warm_start="none", updates=1, behavior={"on_policy": 1.0}, batch_size=6)
    Trainer(problem.prior(), energy, config, policy=ConditionalShift(problem), progress=False).train()
    assert seen[-1] == ([0, 10, 20, 0, 10, 20], [f"prompt {row}" for row in (0, 1, 2)] * 2)


def test_a_condition_without_any_finite_energy_is_named(problem: Conditional) -> None:
    def energy(x: Tensor, class_labels: Tensor) -> Tensor:
        return torch.where(class_labels == 20, math.inf, problem.energy(x, class_labels))

    for config in (QUICK, replace(QUICK, warm_start="none", behavior={"on_policy": 1.0})):
        with pytest.raises(EnergyError, match="of label 20"):
            Trainer(problem.prior(), energy, config, policy=ConditionalShift(problem), progress=False).train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 10}, r"batch_size is 10, of which on_policy draws 5 in each process; .* 3 conditions"),
        ({"population_size": 60}, "the population is 60 paths here, for 3 conditions, .* needs 25 paths"),
    ],
)
def test_too_few_trajectories_a_condition_are_refused(changes: dict[str, int], message: str, problem: Conditional) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(
            problem.prior(), problem.energy, replace(QUICK, **changes), policy=ConditionalShift(problem), progress=False
        ).train()


def test_resampling_several_conditions_as_one_is_refused(problem: Conditional) -> None:
    trainer = Trainer(problem.prior(), problem.energy, QUICK, policy=ConditionalShift(problem), progress=False)
    with pytest.raises(ValueError, match=r"3 conditions, each with weights of its own; .*only"):
        importance_resample(trainer.collected(), lambda x: x.sum(1), 4, torch.Generator(), proposals=40)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (("pass", "pass"), ("pass", 0, "pass for 2 of 2 conditions: a, b")),
        (("pass", "inconclusive"), ("inconclusive", 3, "inconclusive for 1 of 2 conditions: b")),
        (("fail", "inconclusive"), ("fail", 1, "fail for 1 of 2 conditions: a")),
    ],
)
def test_a_run_passes_where_every_condition_does(verdicts: tuple[str, str], expected: tuple[str, int, str]) -> None:
    figures = {"gap": 1.0, "kl_to_prior": 1.0, "kl_from_target": 1.0, "ess": 0.5}
    own = {"energy_calls": 7, "certificate_energy_calls": 10, **figures}
    whole = together({name: {"verdict": verdict, **own} for name, verdict in zip("ab", verdicts, strict=True)})
    assert (whole["verdict"], whole["exit_status"], whole["reasons"][0]) == expected
    assert (whole["energy_calls"], whole["certificate_energy_calls"]) == (7, 20)


def test_replay_keeps_conditions_and_energies_that_are_none() -> None:
    chain = chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", clip_sample=False), 4)
    problem = Conditional(chain, SLOPES)
    prior, generator = problem.prior(), torch.Generator().manual_seed(0)
    kept = Replay(prior)
    for number in range(3):
        drawn = rollout(prior, None, 9 + number, generator)
        energy = torch.arange(len(drawn)) + 100.0 * number
        energy[1] = math.nan
        kept.add(drawn.with_(energy=energy))
    kept.settle()
    again = Replay(prior)
    again.load_state_dict(kept.state_dict())
    first, second = (one.draw(30, torch.Generator().manual_seed(1)) for one in (kept, again))
    assert torch.equal(first.states, second.states) and torch.equal(first.group, second.group)
    assert [len(members) for members in first.groups] == [10, 10, 10]
    assert first.energy is not None
    for part, row in ((part, row) for part in range(3) for row in range(len(first))):
        if first.energy[row] // 100 == part:  # its condition is the one that its path was drawn with
            assert first.group[row] == int(first.energy[row] - 100 * part) % 3
    assert first.energy.isnan().any() and len({int(one) // 100 for one in first.energy[~first.energy.isnan()]}) == 3


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_group_has_the_same_gradient_however_it_lies_on_processes(name: str, processes: int) -> None:
    """Two prompts of eight rollouts each on 1 x 16, 2 x 8 and 4 x 4 processes x rollouts: the same gradient to 1e-6."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(16) % 2
    ratio = 0.3 * torch.randn(3, 16, generator=generator)
    energy = 4.0 * group + torch.randn(16, generator=generator)
    whole = Batch(ratio, energy, torch.ones(16, dtype=torch.bool), ratio.sum(0), 0.1 * ratio, group)
    log_z = torch.tensor([0.1, -0.2])
    loss, expected = objective_gradient(OBJECTIVES[name], whole, 0.5, log_z, 20.0)
    rows = torch.arange(16).chunk(processes)

    class Gathered:
        """Every process's tensor in rank order; calls come in the same order everywhere."""

        def __init__(self, rank: int) -> None:
            self.rank = rank
            self.waiting = [ratio.T, energy, whole.valid, ratio.sum(0), 0.1 * ratio.T, group]

        def __call__(self, tensor: Tensor) -> Tensor:
            full = self.waiting.pop(0)
            assert torch.equal(full[rows[self.rank]], tensor)
            return full

    for rank in range(processes):
        shared: dict[str, Any] = {"gather": Gathered(rank), "rank": rank, "world_size": processes}
        own = replace(whole.select(rows[rank]), group=group[rows[rank]])
        part, found = objective_gradient(OBJECTIVES[name], own, 0.5, log_z, 20.0, **shared)
        assert part.item() == pytest.approx(loss.item(), abs=1e-6)
        for key, gradient in expected.items():
            mine = gradient if key == "log_z" else gradient[:, rows[rank]] * processes  # processes average what they pass on
            torch.testing.assert_close(found[key], mine, rtol=1e-6, atol=1e-6)
