"""Classifier-free guidance (arXiv 2207.12598): the output that a chain sees is

    out_negative + w (out_condition - out_negative)

of prior and policy alike, so that log-ratios are of guided outputs. Both halves run in one call of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from .shapes import States, Timestep

NEGATIVE = "negative_"  # before the name of an argument: its value in the other half
Inputs = Mapping[str, Shaped[Tensor, " batch ..."]]
Call = Callable[[States, Timestep, dict[str, Any]], States]


def guided(call: Call, state: States, timestep: Timestep, inputs: Inputs, scale: float) -> States:
    """The network's output at ``scale`` w; 1 is the condition alone, in half of the evaluations.

    inputs: of each state, by the names of the network's arguments; "a.b" is the entry b of the argument a. Those that begin
    with `NEGATIVE` are of the other half, which takes all that it has no own value of from the first.
    """
    positive = {name: value for name, value in inputs.items() if not name.startswith(NEGATIVE)}
    if scale == 1:
        return call(state, timestep, _nested(positive))
    other = {name: inputs.get(NEGATIVE + name, value) for name, value in positive.items()}
    both = {name: torch.cat([other[name], value]) for name, value in positive.items()}
    each = timestep if timestep.ndim == 0 else timestep.expand(len(state)).repeat(2)
    without, within = call(torch.cat([state, state]), each, _nested(both)).chunk(2)
    return without + scale * (within - without)


def _nested(inputs: Inputs) -> dict[str, Any]:
    """Arguments of a network, those named "a.b" gathered into dicts."""
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        head, dot, entry = name.partition(".")
        if dot:
            found.setdefault(head, {})[entry] = value
        else:
            found[name] = value
    return found
