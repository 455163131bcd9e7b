"""Energies: the adapters, and a meter that counts every call and refuses what is not an energy."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.energies.energy import EnergyMeter, from_density, from_reward
from tiltune.finetune.energies.error import EnergyError
from tiltune.finetune.energies.evaluation import ceiling_of
from tiltune.finetune.learning.batch import Batch
from tiltune.finetune.learning.objective_table import OBJECTIVES
from tiltune.finetune.learning.trainer import Trainer
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.prior import Prior
from tiltune.samplers.schedulers.brownian import brownian_chain
from tiltune.samplers.trajectory import Trajectories

X = torch.arange(8.0)[:, None].expand(8, 3)


def constant(*values: float) -> EnergyMeter:
    """A meter around an energy that returns these values whatever it is given."""
    return EnergyMeter(lambda x: torch.tensor(values), max_invalid=0.5)


def test_from_reward_negates_and_nothing_more() -> None:
    energy = from_reward(lambda x: 2 * x.sum(1))
    assert torch.equal(energy(X), -2 * X.sum(1))


def test_from_density_is_minus_log_once() -> None:
    values = torch.tensor([0.0, 0.5, 1.0, math.e, -1.0])
    energy = from_density(lambda x: values)(torch.zeros(5, 1))
    assert energy[0] == math.inf
    assert torch.allclose(energy[1:4], torch.tensor([math.log(2), 0.0, -1.0]))
    assert energy[4].isnan()


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (lambda x: x.mean(), r"returned shape \(\) for 8 samples.*x\.flatten\(1\)\.mean\(1\)"),
        (lambda x: x.sum(1, keepdim=True), r"shape \(8, 1\).*return values\.squeeze\(1\)\.$"),
        (lambda x: x, r"shape \(8, 3\)"),
        (lambda x: x.sum(1)[:4], r"shape \(4,\) for 8 samples"),
        (lambda x: x.sum(1).long(), r"returned torch.int64.*values\.to\(x\.dtype\)"),
        (lambda x: x.sum(1).numpy(), r"a numpy array of shape \(8,\).*return torch\.as_tensor\(values, "),
        (lambda x: 3.0, r"returned a float, not a floating tensor of shape \(8,\).*x\.flatten\(1\)\.mean\(1\)"),
        (lambda x: lambda y: y, r"returned a function, not a floating tensor.*factory, to be called first"),
        (lambda x: x.sum(1).requires_grad_(True), r"requires grad.*no_grad"),
        (lambda x: x @ torch.ones(5), r"raised RuntimeError.*input: \(8, 3\) torch.float32"),
    ],
)
def test_what_is_not_an_energy_is_refused(energy: object, message: str) -> None:
    with pytest.raises(EnergyError, match=message):
        EnergyMeter(energy)(X)  # type: ignore[arg-type]


def test_a_forgotten_no_grad_shows() -> None:
    weight = torch.ones(3, requires_grad=True)
    with torch.no_grad(), pytest.raises(EnergyError, match="requires grad"):
        EnergyMeter(lambda x: x @ weight)(X)


def test_the_cause_of_a_raise_is_kept_and_the_energy_named() -> None:
    def broken(x: Tensor) -> Tensor:
        raise KeyError("weights")

    said = r"energy broken of test_energy.py raised KeyError on line \d+ of test_energy.py: 'weights'"
    with pytest.raises(EnergyError, match=said) as caught:
        EnergyMeter(broken)(X)
    assert isinstance(caught.value.__cause__, KeyError)


def test_values_come_back_float32_and_counted() -> None:
    meter = EnergyMeter(lambda x: x.double().sum(1))
    value = meter(X)
    assert value.dtype == torch.float32
    assert not value.requires_grad
    assert torch.equal(value, X.sum(1))
    meter(X[:3])
    assert (meter.calls, meter.invalid, meter.forbidden) == (11, 0, 0)


def test_invalid_values_become_nan_and_infinite_ones_stay() -> None:
    meter = constant(1.0, math.nan, -math.inf, math.inf, 2.0, math.inf)
    value = meter(torch.zeros(6, 1))
    assert value.isnan().tolist() == [False, True, True, False, False, False]
    assert value[[3, 5]].eq(math.inf).all()
    assert (meter.calls, meter.invalid, meter.forbidden) == (6, 2, 2)


def test_too_many_invalid_values_stop_the_run() -> None:
    meter = EnergyMeter(lambda x: torch.where(x[:, 0] < 1, torch.nan, 1.0), max_invalid=0.05)
    good, mixed = torch.ones(95, 1), torch.zeros(5, 1)
    meter(good)
    meter(mixed)  # exactly 5%
    with pytest.raises(EnergyError, match="6 of 101 samples, above the 5%"):
        meter(torch.zeros(1, 1))


def by_label(x: Tensor, class_labels: Tensor | None = None) -> Tensor:
    return x.sum(1) if class_labels is None else x.sum(1) + 100 * class_labels


class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor, *, class_labels: Tensor) -> Tensor:
        return x @ self.weight + 100 * class_labels


LABELS = torch.arange(8)


@pytest.mark.parametrize(
    ("energy", "labels"),
    [
        (lambda x: x.sum(1), False),
        (by_label, True),
        (lambda x, **context: by_label(x, context["class_labels"]), True),
        (lambda x, *, class_labels: by_label(x, class_labels), True),
        (Labelled(), True),
        (functools.partial(by_label, class_labels=torch.zeros(8)), False),
        (from_reward(lambda x, class_labels: -by_label(x, class_labels)), True),
        (from_reward(lambda x: -x.sum(1)), False),
        (from_density(lambda x, class_labels: (-by_label(x, class_labels).double()).exp()), True),
        (EnergyMeter(by_label), True),
    ],
)
def test_an_energy_receives_the_context_that_its_signature_names(energy: Any, labels: bool) -> None:
    expected = X.sum(1) + 100 * LABELS * labels
    value = EnergyMeter(energy)(X, class_labels=LABELS, prompts=["a"] * 8)
    torch.testing.assert_close(value, expected.float())


def test_without_context_nothing_is_passed() -> None:
    assert torch.equal(EnergyMeter(by_label)(X), X.sum(1))


@pytest.mark.parametrize(
    ("energy", "context", "message"),
    [
        (Labelled(), {}, "energy Labelled of test_energy.py needs class_labels.*they have: no context"),
        (lambda x, target, class_labels: x, {"class_labels": LABELS}, "needs target,.*have: class_labels.*functools.partial"),
        (lambda images, prompts, metadata: (images, {}), {}, r"needs prompts and metadata.*from_reward\(..., images="),
        (by_label, {"class_labels": LABELS[:4]}, "class_labels is not one value for each of 8 samples"),
        (by_label, {"prompts": "a prompt"}, "prompts is not one value for each"),
        (by_label, {"class_labels": 3}, "class_labels is not one value for each"),
    ],
)
def test_context_that_does_not_fit_is_refused(energy: Any, context: dict[str, Any], message: str) -> None:
    with pytest.raises(EnergyError, match=message):
        EnergyMeter(energy)(X, **context)


def test_an_energy_that_works_in_place_moves_neither_samples_nor_context() -> None:
    def careless(x: Tensor, class_labels: Tensor, metadata: list[dict[str, int]]) -> Tensor:
        metadata[0]["seen"] = 1
        return x.mul_(2).sum(1) + class_labels.zero_()

    x, labels, metadata = X.clone(), LABELS.clone(), [{} for _ in range(8)]
    EnergyMeter(careless)(x, class_labels=labels, metadata=metadata)
    assert torch.equal(x, X)
    assert torch.equal(labels, LABELS)
    assert metadata == [{}] * 8


def test_an_energy_may_differentiate_inside() -> None:
    """The score norm of a Gaussian: x for E = x²/2, though the meter itself runs without a graph."""

    def score_norm(x: Tensor) -> Tensor:
        x = x.requires_grad_(True)
        (gradient,) = torch.autograd.grad((0.5 * x.square()).sum(), x)
        return gradient.square().sum(1)

    with torch.no_grad():
        assert torch.equal(EnergyMeter(score_norm)(X), X.square().sum(1))


def test_an_interrupt_in_an_energy_stays_one() -> None:
    def slow(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    for energy in (slow, from_reward(slow), from_reward(slow, images="raw"), from_density(slow)):
        meter = EnergyMeter(energy)
        with pytest.raises(KeyboardInterrupt):
            meter(X)
        assert meter.calls == 0


def with_energy(energy: Tensor) -> Trajectories:
    return Trajectories(torch.zeros(3, len(energy), 1), energy=energy)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_infinite_energies_reach_every_objective_capped(name: str) -> None:
    prior = Prior(MLPDenoiser(dim=1, width=4, depth=1, fourier_features=2), brownian_chain(2), (1,))
    config = TrainConfig(alpha=0.5, max_energy=30.0)
    trainer = Trainer(prior, lambda x: x.sum(1), config, progress=False)
    energy = torch.tensor([1.0, math.inf, 3.0, math.nan, 1e9, 2.0])
    capped, valid = trainer.state.energies.capped(with_energy(energy))
    ceiling = 1.2 + 30.0 * 0.5  # above the lowest tenth of 1, 2 and 3; 1e9 is a penalty
    assert capped.tolist() == pytest.approx([1.0, ceiling, 3.0, 0.0, ceiling, 2.0])
    assert valid.tolist() == [True, True, True, False, True, True]
    ratio = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    batch = Batch(ratio, capped, valid, ratio.detach().sum(0))
    loss = OBJECTIVES[name].loss(batch, config.alpha, torch.tensor(0.0, requires_grad=True), config.huber)
    loss.backward()
    assert ratio.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(ratio.grad).all()
    assert ratio.grad[:, 3].eq(0).all()
    # The next batch has its own; one without finite energies keeps the last.
    later, _ = trainer.state.energies.capped(with_energy(torch.tensor([-5.0, math.inf, -5.0])))
    assert later.tolist() == pytest.approx([-5.0, 10.0, -5.0])
    assert trainer.state.energies.capped(with_energy(torch.full((2,), math.inf)))[0].tolist() == pytest.approx([10.0, 10.0])


def test_the_ceiling_leaves_the_differences_of_what_the_policy_drew() -> None:
    """Neither a population that is a thousand nats ahead of the policy, nor an earlier policy that was, says what the policy's
    samples may cost; and where energies spread by more than the room, hardly any is cut."""
    prior = Prior(MLPDenoiser(dim=1, width=4, depth=1, fourier_features=2), brownian_chain(2), (1,))
    energies = Trainer(prior, lambda x: x.sum(1), progress=False).state.energies
    ahead = torch.full((300,), -1000.0)
    energies.capped(with_energy(ahead))
    own = 100 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    capped, _ = energies.capped(with_energy(torch.cat([own, ahead])), 200)
    assert (capped[:200] == own).sum() > 190
    # A policy that draws nothing finite has the ceiling of the others.
    capped, _ = energies.capped(with_energy(torch.cat([torch.full((200,), math.inf), ahead])), 200)
    assert capped.tolist() == [-970.0] * 200 + [-1000.0] * 300


@pytest.mark.parametrize("feasible", [5, 9, 10, 11, 50, 95])
def test_penalties_are_cut_however_few_escape_them(feasible: int) -> None:
    energy = torch.randn(100, generator=torch.Generator().manual_seed(0))
    energy[feasible:] += 1e6
    assert ceiling_of(energy, 30.0) < 40
    assert ceiling_of(100 * torch.randn(200, generator=torch.Generator().manual_seed(0)), 30.0) > 150
    assert ceiling_of(torch.tensor([3.0]), 30.0) == 33.0


def test_a_batch_without_any_finite_energy_is_refused() -> None:
    prior = Prior(MLPDenoiser(dim=1, width=4, depth=1, fourier_features=2), brownian_chain(2), (1,))
    trainer = Trainer(prior, lambda x: x.sum(1), progress=False)
    with pytest.raises(EnergyError, match="no mass where the prior samples"):
        trainer.state.energies.capped(with_energy(torch.full((4,), math.inf)))
