"""Weighted sums and the cache: the same energies, with each term known, and fewer calls."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tiltune.finetune.energies.cache import CachedEnergy
from tiltune.finetune.energies.energy import EnergyMeter
from tiltune.finetune.energies.error import EnergyError
from tiltune.finetune.energies.weighted_sum import WeightedSum

X = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))


def square(x: Tensor) -> Tensor:
    return x.square().sum(1)


def total(x: Tensor) -> Tensor:
    return x.sum(1)


class Counting:
    """An energy that remembers the samples it was asked for."""

    def __init__(self, energy: Any = square) -> None:
        self.energy, self.asked = energy, []

    def __call__(self, x: Tensor, **context: Any) -> Tensor:
        self.asked.append(x.clone())
        return self.energy(x, **context)

    @property
    def samples(self) -> int:
        return sum(map(len, self.asked))


# --- sums -------------------------------------------------------------------------------------------------------------


def test_a_sum_scales_each_term_and_remembers_it_raw() -> None:
    energy = WeightedSum({"square": (0.5, square), "total": (-3.0, total)})
    meter = EnergyMeter(energy)
    assert meter.term_means == {}
    assert torch.equal(meter(X), 0.5 * square(X) - 3 * total(X))
    assert meter.calls == 9
    assert torch.equal(energy.term_values["square"], square(X))
    assert meter.term_means == pytest.approx({"square": square(X).mean().item(), "total": total(X).mean().item()})
    meter(X[:2])
    assert meter.term_means == pytest.approx({"square": square(X[:2]).mean().item(), "total": total(X[:2]).mean().item()})
    # The control: without the scales it is another energy.
    assert not torch.allclose(WeightedSum({"square": (1.0, square), "total": (1.0, total)})(X), energy(X))


def test_one_term_of_scale_one_changes_nothing_to_the_bit() -> None:
    assert torch.equal(WeightedSum({"square": (1.0, square)})(X), square(X))
    assert EnergyMeter(square).term_means == {}


def test_the_gradient_of_a_sum_is_the_sum_of_gradients() -> None:
    x = X.clone().requires_grad_(True)
    energy = WeightedSum({"square": (0.5, square), "total": (-3.0, total)})
    (gradient,) = torch.autograd.grad(energy(x).sum(), x)
    torch.testing.assert_close(gradient, X - 3)
    assert not energy.term_values["square"].requires_grad


def test_terms_share_neither_samples_nor_context() -> None:
    def careless(x: Tensor, class_labels: Tensor) -> Tensor:
        return x.zero_().sum(1) + class_labels.zero_()

    def labelled(x: Tensor, class_labels: Tensor) -> Tensor:
        return x.sum(1) + class_labels

    energy = WeightedSum({"careless": (1.0, careless), "plain": (1.0, square), "labelled": (1.0, labelled)})
    x, labels = X.clone(), torch.arange(9)
    torch.testing.assert_close(EnergyMeter(energy)(x, class_labels=labels), square(X) + total(X) + torch.arange(9))
    assert torch.equal(x, X)


def test_infinite_terms_are_kept_and_left_out_of_the_means() -> None:
    def wall(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 0, math.inf, 2.0)

    meter = EnergyMeter(WeightedSum({"wall": (0.1, wall), "nowhere": (1.0, lambda x: torch.full((len(x),), math.inf))}))
    assert meter(X).eq(math.inf).all()
    assert meter.term_means["wall"] == 2.0
    assert math.isnan(meter.term_means["nowhere"])
    assert meter.forbidden == 9


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (lambda x: x.sum(1, keepdim=True), r"returned shape \(9, 1\)"),
        (lambda x: x @ torch.ones(9), "raised RuntimeError"),
        (lambda x: 3.0, "returned a float"),
        (lambda x: lambda x: x, "returned a function.*factory"),
    ],
)
def test_a_broken_term_is_named(term: Any, message: str) -> None:
    energy = WeightedSum({"square": (1.0, square), "broken": (1.0, term)})
    with pytest.raises(EnergyError, match=f"^energy broken of test_energy_sum.py {message}"):
        EnergyMeter(energy)(X)


@pytest.mark.parametrize("scale", [0.0, math.nan, math.inf, -math.inf])
def test_scales_without_a_meaning_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=r"scale of energy square is .*finite and not zero"):
        WeightedSum({"square": (scale, square)})


def test_a_sum_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="name at least one"):
        WeightedSum({})


# --- cache ------------------------------------------------------------------------------------------------------------


def test_only_what_is_new_reaches_the_energy() -> None:
    counting = Counting()
    cached = CachedEnergy(counting)
    meter = EnergyMeter(cached)
    assert torch.equal(meter(X[:6]), square(X[:6]))
    assert (meter.calls, meter.cache_hits, counting.samples) == (6, 0, 6)
    assert torch.equal(meter(X.flip(0)), square(X.flip(0)))
    assert (meter.calls, meter.cache_hits, counting.samples) == (9, 6, 9)
    assert torch.equal(counting.asked[1], X.flip(0)[:3])
    assert torch.equal(meter(X), square(X))
    assert (meter.calls, meter.cache_hits, len(counting.asked), len(cached)) == (9, 15, 2, 9)
    # The control: a meter around the energy itself counts every sample.
    plain = EnergyMeter(square)
    for x in (X[:6], X.flip(0), X):
        plain(x)
    assert (plain.calls, plain.cache_hits) == (24, 0)


def test_repetitions_within_a_batch_are_sent_once() -> None:
    counting = Counting()
    batch = X[[0, 1, 0, 0, 2, 1]]
    assert torch.equal(CachedEnergy(counting)(batch), square(batch))
    assert torch.equal(counting.asked[0], X[:3])


def test_a_sample_is_known_by_its_exact_bytes_dtype_shape_and_context() -> None:
    counting = Counting(lambda x, class_labels=None, prompts=None: x.flatten(1).sum(1).float())
    cached = CachedEnergy(counting)
    labels, prompts = torch.zeros(1, dtype=torch.long), ["a"]
    one = torch.zeros(1, 4)
    different = [
        (one, {}),
        (-one, {}),  # -0.0
        (one.nextafter(torch.ones(())), {}),
        (one.to(torch.float64), {}),
        (one.to(torch.bfloat16), {}),
        (one.reshape(1, 2, 2), {}),
        (one[:, :3], {}),
        (one, {"class_labels": labels}),
        (one, {"class_labels": labels + 1}),
        (one, {"class_labels": labels.float()}),
        (one, {"prompts": prompts}),
        (one, {"prompts": ["b"]}),
        (one, {"prompts": prompts, "class_labels": labels}),
    ]
    for _ in range(2):
        for x, context in different:
            cached(x, **context)
    assert counting.samples == cached.cache_hits == len(cached) == len(different)


def test_context_that_the_energy_does_not_take_is_no_part_of_the_key() -> None:
    cached = CachedEnergy(square)
    cached(X, class_labels=torch.zeros(9))
    cached(X, class_labels=torch.ones(9))
    assert cached.cache_hits == 9


def test_context_goes_along_with_its_sample() -> None:
    def energy(x: Tensor, class_labels: Tensor, metadata: list[dict[str, float]]) -> Tensor:
        return x.sum(1) + class_labels + torch.tensor([one["shift"] for one in metadata])

    labels, metadata = torch.arange(9.0), [{"shift": 10.0 * one} for one in range(9)]
    cached = CachedEnergy(energy)
    some = [7, 2]
    cached(X[some], class_labels=labels[some], metadata=[metadata[one] for one in some])
    value = EnergyMeter(cached)(X, class_labels=labels, metadata=metadata)
    torch.testing.assert_close(value, total(X) + 11 * labels)
    assert cached.cache_hits == 2
    with pytest.raises(ValueError, match=r"cannot tell one sample's metadata from another's.*use tensors"):
        cached(X, class_labels=labels, metadata=[object()] * 9)


def test_the_cache_is_bounded_and_forgets_what_was_used_longest_ago() -> None:
    counting = Counting()
    cached = CachedEnergy(counting, capacity=3)
    assert torch.equal(cached(X), square(X))  # a batch larger than the cache
    assert len(cached) == 3
    cached(X[6:7])  # 7 is now the oldest
    cached(X[0:1])
    assert counting.samples == 10
    for kept in (8, 6, 0):
        cached(X[kept : kept + 1])
    assert counting.samples == 10
    cached(X[7:8])
    assert counting.samples == 11
    assert len(cached) == 3


def test_a_cached_sum_remembers_its_terms() -> None:
    meter = EnergyMeter(CachedEnergy(WeightedSum({"square": (0.5, square), "total": (-3.0, total)})))
    plain = EnergyMeter(WeightedSum({"square": (0.5, square), "total": (-3.0, total)}))
    for x in (X[:5], X, X.flip(0), X[:2]):
        torch.testing.assert_close(meter(x), plain(x), rtol=0, atol=0)
        assert meter.term_means == pytest.approx(plain.term_means)
    assert meter.calls == 9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_come_back_as_they_were(dtype: torch.dtype) -> None:
    values = torch.tensor([1 / 3, math.inf, -math.inf, math.nan, 1e-30, 0.0, -1e30, 5.0, 7.0], dtype=dtype)
    table = {tuple(x.tolist()): value for x, value in zip(X, values, strict=True)}
    cached = CachedEnergy(lambda x: torch.stack([table[tuple(one)] for one in x.tolist()]))
    for _ in range(2):
        back = cached(X)
        assert back.dtype == dtype
        assert torch.equal(back.nan_to_num(nan=99), values.nan_to_num(nan=99))
        assert back[3].isnan()


def test_remembered_invalid_values_do_not_inflate_their_share() -> None:
    """One NaN of 40 samples, asked for ten times: 10 of 400, under the 5% that stop a run."""
    x = torch.arange(40.0)[:, None]
    meter = EnergyMeter(CachedEnergy(lambda x: torch.where(x[:, 0] == 3, torch.nan, x[:, 0])))
    for _ in range(10):
        meter(x)
    assert (meter.calls, meter.cache_hits, meter.invalid) == (40, 360, 10)
    mostly = EnergyMeter(CachedEnergy(lambda x: torch.where(x[:, 0] < 4, torch.nan, x[:, 0])))
    mostly(x)
    with pytest.raises(EnergyError, match="8 of 80 samples"):
        mostly(x)


def test_what_raises_is_not_remembered() -> None:
    broken = [True]

    def flaky(x: Tensor) -> Tensor:
        if broken[0]:
            raise KeyboardInterrupt
        return x.sum(1)

    cached = CachedEnergy(WeightedSum({"flaky": (1.0, flaky)}))
    meter = EnergyMeter(cached)
    with pytest.raises(KeyboardInterrupt):
        meter(X)
    assert (meter.calls, cached.cache_hits, len(cached)) == (0, 0, 0)
    broken[0] = False
    assert torch.equal(meter(X), total(X))


def test_a_cache_is_no_place_for_gradients() -> None:
    with pytest.raises(ValueError, match="cached energy has no gradient"):
        CachedEnergy(square)(X.clone().requires_grad_(True))
    weight = torch.ones(4, requires_grad=True)
    with pytest.raises(EnergyError, match=r"energy lambda on line \d+ of test_energy_sum.py returned .* requires grad"):
        EnergyMeter(CachedEnergy(lambda x: x @ weight))(X)
    with pytest.raises(ValueError, match="capacity is 0"):
        CachedEnergy(square, capacity=0)
