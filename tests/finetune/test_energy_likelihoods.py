"""Likelihoods as energies, against torch.distributions, closed forms and autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiltune.finetune.energies.energy import EnergyMeter
from tiltune.finetune.energies.error import EnergyError
from tiltune.finetune.energies.images import to_unit
from tiltune.finetune.energies.likelihoods import from_classifier, linear_measurement
from tiltune.tasks.gaussian_mixture import GaussianMixture


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- classifier -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "indices"), [(3, [3]), ([3], [3]), ((0, 2, 4), [0, 2, 4]), ({9, 1}, [1, 9]), (range(0, 10, 2), [0, 2, 4, 6, 8])]
)
def test_the_energy_of_a_classifier_is_minus_log_probability(classes: Any, indices: list[int]) -> None:
    logits = 5 * normal(64, 10)
    probability = torch.distributions.Categorical(logits=logits).probs
    expected = -probability[:, indices].sum(1).log()
    energy = from_classifier(lambda x: x, classes)(logits)
    assert energy.dtype == torch.float64
    torch.testing.assert_close(energy, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(EnergyMeter(from_classifier(lambda x: x, classes))(logits.float()), expected.float())
    # The control: the mean over the wanted classes of -log p is another energy, unless there is one class.
    wrong = -probability[:, indices].log().mean(1)
    assert torch.allclose(wrong, expected) == (len(indices) == 1)


def test_the_energy_of_a_classifier_neither_overflows_nor_cancels() -> None:
    logits = torch.tensor([[40.0, 0.0, -1.0], [-500.0, 500.0, 0.0], [0.0, -math.inf, 3.0], [-math.inf, 0.0, 0.0]])
    energy = from_classifier(lambda x: x, 0)(logits)
    sure = math.log1p(math.exp(-40) + math.exp(-41))
    torch.testing.assert_close(energy[:3], torch.tensor([sure, 1000.0, math.log1p(math.exp(3))]))
    assert energy[3] == math.inf
    assert sure > 0
    # The control: a difference of two logsumexps loses the small one altogether, and softmax the large.
    assert (logits.logsumexp(1) - logits[:, 0])[0] == 0
    assert logits.softmax(1)[1, 0].log() == -math.inf
    assert from_classifier(lambda x: x, range(3))(logits).tolist() == [0.0] * 4
    half = from_classifier(lambda x: x, 0)(logits[:2].half())
    assert half.dtype == torch.float32


def test_the_gradient_of_a_classifier_is_p_minus_its_share_among_the_wanted() -> None:
    """∇_z E = softmax(z) - softmax over the wanted classes only."""
    logits = (3 * normal(16, 5)).requires_grad_(True)
    from_classifier(lambda x: x, [1, 4])(logits).sum().backward()
    expected = logits.detach().softmax(1)
    expected[:, [1, 4]] -= logits.detach()[:, [1, 4]].softmax(1)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected, rtol=1e-9, atol=1e-12)


def test_a_network_is_evaluated_in_evaluation_mode_and_without_a_graph() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3))
    energy = from_classifier(network, 0, preprocess=to_unit)
    assert not network.training
    x = normal(6, 1, 2, 2).float()
    first = EnergyMeter(energy)(x)  # refuses what requires grad
    assert torch.equal(first, EnergyMeter(energy)(x))
    torch.testing.assert_close(first, -network((x / 2 + 0.5).clamp(0, 1)).log_softmax(1)[:, 0].detach())
    x = x.requires_grad_(True)
    assert torch.autograd.grad(energy(x).sum(), x)[0].abs().sum() > 0


@pytest.mark.parametrize("classes", [[], -1, [0, -2], "3", 2.5, [1.0], None])
def test_what_is_no_class_is_refused(classes: Any) -> None:
    with pytest.raises(ValueError, match=r"classes is .*; (pass one class|name at least one)"):
        from_classifier(lambda x: x, classes)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: x[:, :3], "class 3 is wanted of a classifier with 3 classes, 0 to 2"),
        (lambda x: x[:, 0], r"the classifier returned \(4,\), not logits of shape \[4, classes\]"),
        (lambda x: x[:2], r"returned \(2, 10\), not logits"),
        (lambda x: {"logits": x}, "returned dict, not logits"),
    ],
)
def test_what_is_no_classifier_is_refused(model: Any, message: str) -> None:
    with pytest.raises(EnergyError, match=message):
        EnergyMeter(from_classifier(model, 3))(torch.zeros(4, 10))


# --- linear measurement -----------------------------------------------------------------------------------------------


def log_likelihood(measured: Tensor, y: Tensor, noise_std: float) -> Tensor:
    return torch.distributions.Normal(measured, noise_std).log_prob(y).flatten(1).sum(1)


def constant(number: int, noise_std: float) -> float:
    """What the energy leaves out."""
    return 0.5 * number * math.log(2 * math.pi * noise_std**2)


@pytest.mark.parametrize("form", ["mask", "broadcast mask", "matrix", "function"])
def test_a_linear_measurement_is_the_gaussian_likelihood(form: str) -> None:
    x, noise_std = normal(7, 3, 4, 4), 0.3
    full = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.4
    mask = full.expand(3, 4, 4)
    matrix = normal(5, 48, seed=2)
    if form == "matrix":
        y = normal(5, seed=3)
        energy, measured = linear_measurement(matrix, y, noise_std), x.flatten(1) @ matrix.T
    elif form == "function":
        y = normal(3, 2, 2, seed=3)
        energy = linear_measurement(lambda x: nn.functional.avg_pool2d(x, 2), y, noise_std)
        measured = nn.functional.avg_pool2d(x, 2)
    else:
        holes = normal(3, 4, 4, seed=3).masked_fill(~mask, torch.nan)
        y, measured = holes[mask], x[:, mask]
        energy = linear_measurement(mask if form == "mask" else full, holes, noise_std)
    expected = -log_likelihood(measured, y, noise_std) - constant(y.numel(), noise_std)
    value = energy(x)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(EnergyMeter(energy)(x.float()), expected.float(), rtol=1e-4, atol=1e-3)
    # The control: averaged over the measured dimensions, the temperature is multiplied by their number.
    averaged = 0.5 * ((measured - y) / noise_std).square().flatten(1).mean(1)
    torch.testing.assert_close(averaged * y.numel(), value)
    assert not torch.allclose(averaged, expected, rtol=0.5)


def test_at_alpha_one_the_tilted_prior_is_the_posterior() -> None:
    """log p(x) - E(x) - log p(x | y) is the same for all x: log Z of the closed form; with the average it is not."""
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    factor = normal(2, 6, 6, seed=4)
    prior = GaussianMixture(weights, normal(2, 6, seed=5), factor @ factor.mT + 0.1 * torch.eye(6, dtype=torch.float64))
    matrix, noise_std = normal(3, 6, seed=6), 0.5
    y = matrix @ normal(6, seed=7) + noise_std * normal(3, seed=8)
    precision = matrix.T @ matrix / noise_std**2
    # Complete the square: E = ½ (x - a)ᵀ L (x - a) + bᵀx + const with a = 0, b = -Aᵀy/σ², const = ½|y|²/σ².
    posterior, log_z = prior.tilt_quadratic(precision, torch.zeros(6, dtype=torch.float64), -matrix.T @ y / noise_std**2)
    log_z = log_z - 0.5 * y.square().sum() / noise_std**2
    x = 2 * normal(50, 6, seed=9)
    energy = linear_measurement(matrix, y, noise_std)(x)
    residual = prior.log_density(x) - energy - posterior.log_density(x)
    torch.testing.assert_close(residual, log_z.expand(50), rtol=1e-9, atol=1e-9)
    averaged = prior.log_density(x) - energy / 3 - posterior.log_density(x)
    assert averaged.std() > 1


def test_the_gradient_of_a_measurement_is_the_normal_equation() -> None:
    matrix, y, x = normal(4, 6), normal(4, seed=1), normal(3, 2, 3, seed=2).requires_grad_(True)
    (gradient,) = torch.autograd.grad(linear_measurement(matrix, y, 0.2)(x).sum(), x)
    expected = (x.detach().flatten(1) @ matrix.T - y) @ matrix / 0.2**2
    torch.testing.assert_close(gradient, expected.reshape(3, 2, 3))
    holes = torch.tensor([[1.0, torch.nan]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(linear_measurement(~holes.isnan(), holes, 0.5)(x[:, :1, :2]).sum(), x)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient[:, 0, 0], (x.detach()[:, 0, 0] - 1) / 0.25)


Y = torch.zeros(1, 2, 2)
MASK = torch.ones(1, 2, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("operator", "y", "noise_std", "message"),
    [
        (MASK, Y, 0.0, "noise_std is 0.0.*positive, finite"),
        (MASK, Y, -1.0, "noise_std is -1.0"),
        (MASK, Y, math.inf, "noise_std is inf"),
        (MASK, Y, math.nan, "noise_std is nan"),
        (MASK, Y.long(), 1.0, "y is torch.int64; pass the measurement as a floating-point tensor"),
        (MASK, [0.0], 1.0, "y is list"),
        (MASK, torch.full((1, 2, 2), torch.nan), 1.0, "y holds NaN or infinities where it is measured"),
        (MASK, Y[:, :1], 1.0, r"the mask \(1, 2, 2\) does not fit y \(1, 1, 2\)"),
        (~MASK, Y, 1.0, "mask is False everywhere"),
        (MASK.float(), Y, 1.0, r"operator is torch.float32 \(1, 2, 2\); a mask has dtype torch.bool"),
        (torch.ones(2, 4, dtype=torch.long), torch.zeros(2), 1.0, "operator is torch.int64.*a matrix is floating"),
        (torch.ones(2, 4), torch.zeros(3), 1.0, r"measures \[2\] numbers, and y has shape \(3,\)"),
        ("blur", Y, 1.0, "operator is str; pass a boolean mask, a matrix or a function"),
    ],
)
def test_what_is_no_measurement_is_refused(operator: Any, y: Any, noise_std: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_measurement(operator, y, noise_std)


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (linear_measurement(MASK, Y, 1.0), r"mask is for samples of shape \(1, 2, 2\), not \(3, 2, 2\)"),
        (linear_measurement(torch.ones(2, 4), torch.zeros(2), 1.0), r"matrix \(2, 4\) does not apply to samples of 12 numbers"),
        (linear_measurement(lambda x: x[:, :1], Y[0], 1.0), r"makes \(5, 1, 2, 2\) of samples.*one measurement is \(2, 2\)"),
        (linear_measurement(lambda x: x.sum(), Y, 1.0), r"makes \(\) of samples"),
    ],
)
def test_samples_of_another_shape_are_refused_not_broadcast(energy: Any, message: str) -> None:
    with pytest.raises(EnergyError, match=message):
        EnergyMeter(energy)(torch.zeros(5, 3, 2, 2))
