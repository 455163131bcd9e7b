"""Calls of torch with their full types, which torch's own annotations leave out. The calls themselves are torch's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn


def floats(values: Tensor) -> list[float]:
    """The entries of a tensor [n] of real numbers."""
    return cast("list[float]", values.tolist())  # pyright: ignore[reportUnknownMemberType]


def integers(values: Tensor) -> list[int]:
    """The entries of a tensor [n] of integers."""
    return cast("list[int]", values.tolist())  # pyright: ignore[reportUnknownMemberType]


def unique(values: Tensor) -> Tensor:
    """The distinct values [m] in ascending order."""
    return cast(Tensor, values.unique())  # pyright: ignore[reportUnknownMemberType]


def unique_with_inverse(values: Tensor) -> tuple[Tensor, Tensor]:
    """(the distinct values [m] in ascending order, for each value [n] its index among them)."""
    return torch.unique(values, return_inverse=True)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def unique_with_counts(values: Tensor) -> tuple[Tensor, Tensor]:
    """(the distinct values [m] in ascending order, how often each occurs [m])."""
    return torch.unique(values, return_counts=True)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """x [n] with matrix [n, n] x = right [n]. Errors: torch.linalg.LinAlgError for a singular matrix."""
    return cast(Tensor, torch.linalg.solve(matrix, right))  # pyright: ignore[reportUnknownMemberType]


def symmetric_pinv(matrix: Tensor) -> Tensor:
    """The pseudo-inverse [n, n] of a symmetric matrix [n, n]."""
    return cast(Tensor, torch.linalg.pinv(matrix, hermitian=True))  # pyright: ignore[reportUnknownMemberType]


def backward(tensor: Tensor, gradient: Tensor | None = None) -> None:
    """Accumulate the gradients of a scalar, or of a tensor [n] with ``gradient`` [n] as its own."""
    tensor.backward(gradient)  # pyright: ignore[reportUnknownMemberType]


def forked_rng(devices: Sequence[torch.device] = ()) -> AbstractContextManager[None]:
    """On leaving, the global generators of the CPU and of ``devices`` are as they were on entering."""
    return torch.random.fork_rng(devices=devices)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def named_modules(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module below and including ``network`` once, with its name in it."""
    return cast("Iterator[tuple[str, nn.Module]]", network.named_modules())
