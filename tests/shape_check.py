"""Checks shapes and dtypes at runtime, in tests alone: beartype on those annotations of a function that hold a shape.

The others stay pyright's. Beartype would refuse some of them, Protocols for one, that mean what they say.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray

# What is checked: a module, or a package with all that is in it.
CHECKED = (
    "tiltune.samplers",
    "tiltune.finetune.certificate",
    "tiltune.finetune.estimators",
    "tiltune.finetune.learning",
    "tiltune.finetune.populations",
)


def shapes_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its shapes checked, as jaxtyping asks of a type checker. It calls this once for each function."""
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if holds_shape(hint)}
    return beartype(function) if function.__annotations__ else function


def holds_shape(hint: Any) -> bool:
    """Whether a type is a tensor with a shape, or made of such types: a union, a list, a tuple."""
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return any(holds_shape(part) for part in get_args(hint))
