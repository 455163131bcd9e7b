"""Calls of torch with their full types, which torch's own annotations leave out. The calls themselves are torch's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import cast

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from .shapes import Index


def floats(values: Real[Tensor, " n"]) -> list[float]:
    """The entries of a tensor of real numbers."""
    return cast("list[float]", values.tolist())  # pyright: ignore[reportUnknownMemberType]


def integers(values: Index) -> list[int]:
    """The entries of a tensor of integers."""
    return cast("list[int]", values.tolist())  # pyright: ignore[reportUnknownMemberType]


def unique(values: Real[Tensor, " n"]) -> Real[Tensor, " distinct"]:
    """The distinct values in ascending order."""
    return cast(Tensor, values.unique())  # pyright: ignore[reportUnknownMemberType]


def unique_with_inverse(values: Real[Tensor, " n"]) -> tuple[Real[Tensor, " distinct"], Index]:
    """(the distinct values in ascending order, for each value its index among them)."""
    return torch.unique(values, return_inverse=True)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def symmetric_pinv(matrix: Float[Tensor, " n n"]) -> Float[Tensor, " n n"]:
    """The pseudo-inverse of a symmetric matrix."""
    return cast(Tensor, torch.linalg.pinv(matrix, hermitian=True))  # pyright: ignore[reportUnknownMemberType]


def backward(tensor: Float[Tensor, ""] | Float[Tensor, " n"], gradient: Float[Tensor, " n"] | None = None) -> None:
    """Accumulate the gradients of a scalar, or of a tensor with ``gradient`` as its own."""
    tensor.backward(gradient)  # pyright: ignore[reportUnknownMemberType]


def forked_rng(devices: Sequence[torch.device] = ()) -> AbstractContextManager[None]:
    """On leaving, the global generators of the CPU and of ``devices`` are as they were on entering."""
    return torch.random.fork_rng(devices=devices)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def named_modules(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module below and including ``network`` once, with its name in it."""
    return cast("Iterator[tuple[str, nn.Module]]", network.named_modules())
