"""Negative log-likelihoods as energies: a classifier's, and that of a noisy linear measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .energy import Energy


def from_classifier(
    model: Callable[[Tensor], Tensor],
    classes: int | Iterable[int],
    *,
    preprocess: Callable[[Tensor], Tensor] | None = None,
) -> Energy:
    """E(x) = -log Σ_{c in classes} p(c | x), nats, of a classifier with logits [B, classes]; never negative.

    Computed as softplus(logsumexp of the other logits - logsumexp of the wanted ones), in float32 at least: it neither
    overflows nor cancels. A module is put in evaluation mode. A graph is kept only where ``x`` requires grad.

    classes: one class or a set of them. preprocess: samples → what the classifier takes, such as `to_unit`.

    Errors: ValueError for no class or a negative one; when called, for other than logits [B, classes], or a class beyond them.
    """
    wanted = _class_indices(classes)
    if isinstance(model, nn.Module):
        model.eval()

    def energy(x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            logits = model(x if preprocess is None else preprocess(x))
            if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
                found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"the classifier returned {found}, not logits of shape [{len(x)}, classes]")
            number = logits.shape[1]
            if wanted[-1] >= number:
                raise ValueError(f"class {wanted[-1]} is wanted of a classifier with {number} classes, 0 to {number - 1}")
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            chosen = torch.zeros(number, dtype=torch.bool, device=logits.device)
            chosen[wanted] = True
            return functional.softplus(logits[:, ~chosen].logsumexp(1) - logits[:, chosen].logsumexp(1))

    energy.__name__ = f"from_classifier({', '.join(map(str, wanted))})"
    return energy


def linear_measurement(operator: Callable[[Tensor], Tensor] | Tensor, y: Tensor, noise_std: float) -> Energy:
    """E(x) = ½ Σ_i ((A x - y)_i / σ)²: the Gaussian likelihood of one measurement y = A x + σ ε, for inverse problems.

    Summed over the measured dimensions, never averaged. The constant m/2 · log(2πσ²) is left out: it moves log Z and nothing
    else. At alpha = 1 the tilted prior is the posterior p(x | y). Differentiable in x.

    operator: A, in one of three forms. A boolean mask of the samples' shape (or one that broadcasts to it), True where
        measured: y has the samples' shape, and what it holds elsewhere, NaN included, is ignored. A floating matrix [m, D],
        applied to the samples flattened to D: y is [m]. A function of the batch, [B, ...] → [B, *y.shape].

    Errors: ValueError for a noise that is not positive and finite, or an operator or y of another kind; when called, for
        shapes that do not match.
    """
    if not 0 < noise_std < float("inf"):
        raise ValueError(f"noise_std is {noise_std}; a Gaussian likelihood needs a positive, finite one.")
    if not isinstance(y, Tensor) or not y.is_floating_point():
        found = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"y is {found}; pass the measurement as a floating-point tensor.")
    if isinstance(operator, Tensor):
        measure, measured = _tensor_measurement(operator, y)
    elif callable(operator):
        measure, measured = operator, y
    else:
        raise ValueError(f"the operator is {type(operator).__name__}; pass a boolean mask, a matrix or a function.")
    if not measured.isfinite().all():
        raise ValueError("y holds NaN or infinities where it is measured; with a mask, set that to False there.")

    def energy(x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        image = measure(x)
        if image.shape != (len(x), *measured.shape):
            raise ValueError(
                f"the operator makes {tuple(image.shape)} of samples {tuple(x.shape)}, and one measurement is"
                f" {tuple(measured.shape)}"
            )
        return 0.5 * ((image - measured.to(image)) / noise_std).square().flatten(1).sum(1)

    energy.__name__ = "linear_measurement"
    return energy


def _tensor_measurement(tensor: Tensor, y: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """(samples [B, ...] → measurements [B, m], y [m]) of a mask or a matrix."""
    if tensor.dtype == torch.bool:
        try:
            mask = tensor.expand(y.shape)
        except RuntimeError:
            raise ValueError(
                f"the mask {tuple(tensor.shape)} does not fit y {tuple(y.shape)}, which has the shape of a sample."
            ) from None
        if not mask.any():
            raise ValueError("the mask is False everywhere: nothing is measured, so there is no posterior to sample.")

        def select(x: Tensor) -> Tensor:
            if x.shape[1:] != mask.shape:
                raise ValueError(f"the mask is for samples of shape {tuple(mask.shape)}, not {tuple(x.shape[1:])}")
            return x[:, mask.to(x.device)]

        return select, y[mask]
    if tensor.ndim != 2 or not tensor.is_floating_point():
        raise ValueError(
            f"the operator is {tensor.dtype} {tuple(tensor.shape)}; a mask has dtype torch.bool, a matrix is floating [m, D]."
        )
    if y.shape != tensor.shape[:1]:
        raise ValueError(f"the matrix {tuple(tensor.shape)} measures [{len(tensor)}] numbers, and y has shape {tuple(y.shape)}.")

    def multiply(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        if flat.shape[1] != tensor.shape[1]:
            raise ValueError(f"the matrix {tuple(tensor.shape)} does not apply to samples of {flat.shape[1]} numbers")
        return flat @ tensor.to(x).T

    return multiply, y


def _class_indices(classes: Any) -> list[int]:
    """Sorted, without repetition."""
    try:
        found = sorted({index(one) for one in (classes if isinstance(classes, Iterable) else [classes])})
    except TypeError:
        raise ValueError(f"classes is {classes!r}; pass one class, such as 3, or several, such as [0, 2, 4].") from None
    if not found or found[0] < 0:
        raise ValueError(f"classes is {classes!r}; name at least one, counted from 0.")
    return found
