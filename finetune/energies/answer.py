"""What an energy must answer, one floating number a sample, and for each other answer what to write instead."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
from torch import Tensor

from .error import EnergyError

AS_TENSOR = "return torch.as_tensor({}, dtype=x.dtype, device=x.device)"
EACH = "reduce all dimensions but the first, as in x.flatten(1).mean(1)"


def checked(value: Any, x: Tensor, name: str) -> Tensor:
    """The energies [B] of the samples ``x`` [B, ...], as the energy ``name`` returned them. Another device than that of ``x`` is
    fine, since energies are few: they are moved.

    Errors: EnergyError, with what to write, for all else: no tensor, another shape, integers, a graph that ``x`` did not bring.
    """
    count = len(x)
    if not isinstance(value, Tensor):
        raise EnergyError(
            f"energy {name} returned {_what(value)}, not a floating tensor of shape ({count},), one number a sample;"
            f" {_instead_of_object(value, count)}."
        )
    if value.shape != (count,):
        raise EnergyError(
            f"energy {name} returned shape {tuple(value.shape)} for {count} {'sample' if count == 1 else 'samples'}, not"
            f" ({count},), one number a sample; {_instead_of_shape(value, count)}."
        )
    if value.is_complex():
        raise EnergyError(
            f"energy {name} returned {value.dtype}, and complex numbers have no order; return values.real or abs()."
        )
    if not value.is_floating_point():
        raise EnergyError(f"energy {name} returned {value.dtype}, not floating-point numbers; return values.to(x.dtype).")
    if not x.requires_grad:
        refuse_graph(value, name)
    return value


def refuse_graph(value: Tensor, name: str) -> None:
    """Errors: EnergyError for energies [B] that require grad."""
    if value.requires_grad:
        raise EnergyError(
            f"energy {name} returned a tensor that requires grad, which would keep its graph alive for the whole run;"
            " decorate it with @torch.no_grad() or return value.detach()."
        )


def _what(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, np.ndarray):
        return f"a numpy array of shape {value.shape}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _is_pair(value: tuple[Any, ...], count: int) -> bool:
    """Whether it looks like (scores, info), the answer of another toolkit's reward."""
    return len(value) == 2 and isinstance(value[1], dict) and count != 1


def _instead_of_object(value: Any, count: int) -> str:
    if value is None:
        return "its last line should return the energies"
    if callable(value):
        return "it looks like a factory, to be called first: name(...)"
    if isinstance(value, dict):
        return f"return one of its entries ({', '.join(map(str, list(value)[:8]))}), as a tensor"
    if isinstance(value, numbers.Number | np.generic):  # of the whole batch
        return f"{EACH}, without .item()"
    if isinstance(value, tuple) and _is_pair(value, count):
        return "a reward that returns (scores, info) is made an energy by from_reward(reward, images=...)"
    if isinstance(value, list | tuple) and len(value) == count and all(isinstance(one, Tensor) for one in value):
        if all(one.numel() == 1 for one in value):
            return "return torch.stack([one.reshape(()) for one in values])"
        return "reduce each entry to one number, and return torch.stack(values)"
    if isinstance(value, np.ndarray | list | tuple):
        shape = value.shape if isinstance(value, np.ndarray) else (len(value),)
        if shape == (count,):
            return AS_TENSOR.format("values")
        if len(shape) == 2 and shape == (count, 1):
            return AS_TENSOR.format("values[:, 0]")
        return "compute one number a sample, and " + AS_TENSOR.format("values")
    return AS_TENSOR.format("values")


def _instead_of_shape(value: Tensor, count: int) -> str:
    if value.ndim == 0 and count == 1:
        return "squeeze() drops the dimension of the samples where there is one alone: name the axis, as in squeeze(1)"
    if value.ndim == 0:
        return f"one number for the whole batch does not do: {EACH}"
    if value.numel() == count:
        axes = [axis for axis, size in enumerate(value.shape) if size == 1]
        return f"return values.squeeze({axes[0]})" if value.ndim == 2 and axes else "return values.flatten()"
    if len(value) == count:
        return "one sample has several numbers there: sum them, values.flatten(1).sum(1), or take one, as in values[:, 0]"
    if value.ndim == 1:
        return "leave no sample out and keep their order; what must not occur has the energy +inf"
    return "the first dimension is that of the samples: " + EACH
