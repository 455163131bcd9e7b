"""The probe: an energy that answers differently for the same samples is named before any training; rounding is not refused."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.energies.cache import CachedEnergy
from tiltune.finetune.energies.energy import Energy, EnergyMeter
from tiltune.finetune.energies.error import EnergyError
from tiltune.finetune.energies.probe import probe_energy
from tiltune.finetune.energies.weighted_sum import WeightedSum
from tiltune.finetune.energies.workers.pool import EnergyPool
from tiltune.finetune.learning.trainer import Trainer
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.prior import Prior
from tiltune.samplers.schedulers.brownian import brownian_chain

CALLS = itertools.count(1)  # a draw could hit a number that is within rounding of the one before
X = torch.tensor([[0.3, -1.2], [2.0, 0.4], [-0.7, 0.1], [1.1, 1.5]])


def probed(energy: Energy, alpha: float = 1.0, x: Tensor = X, **context: Any) -> EnergyMeter:
    """The meter, after the first answer and the probe; a warning is an error."""
    meter = EnergyMeter(energy)
    first = meter(x, **context)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe_energy(meter, x, first, context, alpha)
    return meter


def plain(x: Tensor) -> Tensor:
    return x.sum(1)


def noisy(x: Tensor) -> Tensor:
    """One shift for a whole call, so that the range of the energies, which rounding is judged by, does not grow with it."""
    return x.sum(1) + 10 * next(CALLS)


def centered(x: Tensor) -> Tensor:
    return x.sum(1) - x.sum(1).mean()


def ranked(x: Tensor) -> Tensor:
    return x.sum(1).argsort().argsort().to(x.dtype)


def placed(x: Tensor) -> Tensor:
    """The same noise in every call, but for the place in the batch."""
    return x.sum(1) + torch.randn(len(x), generator=torch.Generator().manual_seed(0))


def squeezed(x: Tensor) -> Tensor:
    return x.sum(1, keepdim=True).squeeze()


def walled(x: Tensor) -> Tensor:
    return torch.where(torch.arange(len(x)) == 1, torch.inf, x.sum(1))


class InTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x).sum(1)


AGAIN, OTHERS = "for the same samples a second time", "for the same samples in other batches"
WRONG: dict[str, tuple[Any, str]] = {
    "noisy of test_energy_probe.py": (noisy, AGAIN),
    "InTraining of test_energy_probe.py": (InTraining(), AGAIN),
    "centered of test_energy_probe.py": (centered, OTHERS),
    "ranked of test_energy_probe.py": (ranked, OTHERS),
    "placed of test_energy_probe.py": (placed, OTHERS),
    "walled of test_energy_probe.py": (walled, OTHERS),
}


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize(
    "around", [lambda e: e, CachedEnergy, lambda e: CachedEnergy(WeightedSum({e.__class__.__name__: (2.0, CachedEnergy(e))}))]
)
def test_an_energy_that_answers_differently_is_named(name: str, around: Any) -> None:
    energy, how = WRONG[name]
    with pytest.raises(EnergyError, match=f"answered differently {how}") as caught:
        probed(around(energy))
    assert "No policy can fit" in str(caught.value)
    assert not any(wrapper in str(caught.value) for wrapper in ("CachedEnergy", "WeightedSum", "EnergyPool", "lambda"))


@pytest.mark.parametrize("name", WRONG)
def test_it_has_the_name_of_the_users_function(name: str) -> None:
    for wrapped in (WRONG[name][0], CachedEnergy(WRONG[name][0])):
        with pytest.raises(EnergyError, match=f"^energy {name} answered"):
            probed(wrapped)


def test_of_a_sum_only_the_term_that_changed_is_named() -> None:
    energy = WeightedSum({"plain": (1.0, plain), "noisy": (0.5, noisy), "centered": (1.0, lambda x: 0 * x.sum(1))})
    with pytest.raises(EnergyError, match=r"^energy noisy of test_energy_probe.py answered"):
        probed(energy)
    with EnergyPool(energy, 2) as pool, pytest.raises(EnergyError, match=r"^energy noisy of test_energy_probe.py answered"):
        probed(pool)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_in_other_processes_are_probed_too(workers: int, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import time\n"
        "def noisy(x):\n    return x.sum(1) + time.monotonic_ns() % 10**10 / 1e3\ndef plain(x):\n    return x.sum(1)\n"
    )
    said = pytest.raises(EnergyError, match=r"^energy noisy of mine.py answered differently for the same samples a second")
    with EnergyPool([f"{tmp_path}/mine.py:plain", f"2*{tmp_path}/mine.py:noisy"], workers) as pool, said:
        probed(CachedEnergy(pool))
    with EnergyPool([f"{tmp_path}/mine.py:plain"], workers) as pool:
        assert probed(pool).calls == 12


def test_what_answers_alike_is_counted_twelve_times_and_nothing_is_said() -> None:
    seen: list[int] = []

    def counting(x: Tensor, class_labels: Tensor, prompts: list[str]) -> Tensor:
        seen.append(len(x))
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return x.sum(1) + 10 * class_labels + lengths

    context = {"class_labels": torch.arange(4), "prompts": ["", "a", "bb", "ccc"]}
    for wrapped in (counting, CachedEnergy(counting)):
        seen.clear()
        meter = probed(wrapped, **context)
        assert seen == [4, 4, 3, 1] and (meter.calls, meter.cache_hits) == (12, 0)


def test_infinities_and_invalid_values_that_stay_are_alike() -> None:
    def partly(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 1.5, torch.inf, torch.where(x[:, 0] < 0, torch.nan, x.sum(1)))

    meter = probed(partly)
    assert (meter.calls, meter.invalid, meter.forbidden) == (12, 3, 3)


def test_a_single_sample_that_loses_its_dimension_is_told_how_to_keep_it() -> None:
    with pytest.raises(EnergyError, match=r"squeezed of .* returned shape \(\) for 1 sample, .*squeeze\(1\)"):
        probed(squeezed)


@dataclass
class Rounding:
    """A relative error that differs from call to call."""

    size: float
    calls: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (5 + x.sum(1)) * (1 + self.size * (-1) ** self.calls)


def test_rounding_passes_half_precision_is_warned_of_and_more_is_refused() -> None:
    probed(Rounding(1e-7))
    probed(Rounding(1e-3), alpha=100.0)  # a ten-thousandth of a nat
    with pytest.raises(UserWarning, match=r"energy Rounding of .* answered differently .*half precision"):
        probed(Rounding(4e-3), alpha=0.1)
    with pytest.raises(EnergyError, match="No policy can fit"):
        probed(Rounding(0.2), alpha=0.1)


def test_the_trainer_probes_before_it_draws_a_population_and_draws_nothing_for_it() -> None:
    prior = Prior(MLPDenoiser(dim=2, width=4, depth=1, fourier_features=2), brownian_chain(2), (2,))
    asked: list[int] = []

    def unsteady(x: Tensor) -> Tensor:
        asked.append(len(x))
        return x.sum(1) + len(asked)

    with pytest.raises(EnergyError, match=r"unsteady of test_energy_probe.py answered differently"):
        Trainer(prior, unsteady, TrainConfig(population_size=50), progress=False).train()
    assert asked == [4, 4]
