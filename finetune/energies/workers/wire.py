"""Samples and energies as bytes, on the way to a worker process or a remote scorer: safetensors, never a pickle.

question   x               [B, ...] the samples
           context.NAME    [B, ...] what else is known of them, where it is a tensor
           context         [bytes] the rest of it, as UTF-8 JSON: {NAME: B values}; absent where there is none
answer     energy          [B] floating; +inf is zero density
           term.NAME       [B] what a weighted sum remembers of its terms; remote scorers send none
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..error import EnergyError


def pack_samples(x: Tensor, context: Mapping[str, Any]) -> bytes:
    """A question.

    Errors: EnergyError for context that is neither a tensor nor plain values.
    """
    tensors = {f"context.{key}": value for key, value in context.items() if isinstance(value, Tensor)}
    plain = {key: list(value) for key, value in context.items() if not isinstance(value, Tensor)}
    if plain:
        try:
            text = json.dumps(plain).encode()
        except (TypeError, ValueError) as error:
            raise EnergyError(
                f"the context {', '.join(plain)} cannot be sent to a worker or a scorer ({error}); use tensors, or strings,"
                " numbers, lists and dicts."
            ) from error
        tensors["context"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return _bytes({"x": x, **tensors})


def unpack_samples(body: bytes) -> tuple[Tensor, dict[str, Any]]:
    """What `pack_samples` was given, on the CPU."""
    tensors = _tensors(body)
    x, plain = tensors.pop("x"), tensors.pop("context", None)
    context: dict[str, Any] = {key.removeprefix("context."): value for key, value in tensors.items()}
    return x, context if plain is None else context | json.loads(bytes(plain.tolist()))


def pack_energies(energy: Tensor, terms: Mapping[str, Tensor]) -> bytes:
    """An answer."""
    return _bytes({"energy": energy, **{f"term.{name}": value for name, value in terms.items()}})


def unpack_energies(body: bytes) -> tuple[Tensor, dict[str, Tensor]]:
    """(energy [B], {term: [B]}), on the CPU.

    Errors: ValueError for what is not an answer; the number and the type of the energies are the caller's to check.
    """
    try:
        tensors = _tensors(body)
    except Exception as error:  # safetensors has an exception of its own, and none for some of what is wrong
        raise ValueError(f"it is not safetensors ({error})") from None
    if "energy" not in tensors:
        raise ValueError(f"it holds no tensor named energy (but {', '.join(sorted(tensors)) or 'none'})")
    energy = tensors.pop("energy")
    return energy, {name.removeprefix("term."): value for name, value in tensors.items()}


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})


def _tensors(body: bytes) -> dict[str, Tensor]:
    from safetensors.torch import load

    return load(body)
