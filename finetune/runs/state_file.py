"""Nested Python state with tensors as NAME.safetensors and NAME.json, back exactly, and never by pickle.

JSON holds None, booleans, integers, finite floats, strings and lists as they are; an object stands for what JSON lacks:

    {"dict": [[key, value], …]}      in order; keys are strings or integers, as in an optimizer's state
    {"tuple": […]}
    {"float": "7ff8000000000000"}    infinities and NaN: the 64 bits
    {"tensor": "3", "dtype": "float32", "shape": [2, 5]}      its name in the safetensors file
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1
DEPTH = 100
DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
    )
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_state(folder: Path, name: str, tree: Any) -> None:
    """Write ``tree`` into ``folder`` as NAME.safetensors and NAME.json.

    tree: dicts with string or integer keys, lists, tuples, strings, integers, floats, booleans, None, and tensors of any shape,
    stride and device with a dtype of `DTYPES`. Tensors that share memory are written each by itself.

    Errors: ValueError for anything else, which names its place in the tree; nothing is written then.
    """
    _refuse_place(name)
    tensors: dict[str, Tensor] = {}
    text = json.dumps({"format": FORMAT, "state": _encode(tree, tensors, name, 0)}, allow_nan=False)
    save_file(_apart(tensors), folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def read_state(folder: Path, name: str) -> Any:
    """What `write_state` wrote: tensors bit for bit, on the CPU and without gradients; an `OrderedDict` as a dict.

    Errors: ValueError for files that are missing, damaged, or that do not fit together; nothing that they say is run.
    """
    _refuse_place(name)
    path = folder / f"{name}.json"
    try:
        parsed = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
        if not isinstance(parsed, dict) or parsed.keys() != {"format", "state"} or parsed["format"] != FORMAT:
            raise ValueError(f"it is not a state of format {FORMAT}")
        with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
            unread = set(file.keys())
            state = _decode(parsed["state"], file, unread, 0)
        if unread:
            raise ValueError(f"the tensors {sorted(unread)[:3]} have no place in it")
    except RecursionError:
        raise ValueError(f"{path} cannot be restored: it is nested too deeply.") from None
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be restored: {str(error).rstrip('.')}.") from None
    return state


def _refuse_place(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ValueError(f"{name!r} is no name for a state; letters, digits, '_', '-' and '.' make one, with no folder in it.")


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _encode(value: Any, tensors: dict[str, Tensor], place: str, depth: int) -> Any:
    if depth > DEPTH:
        raise ValueError(f"the state at {place[:100]}… is nested deeper than {DEPTH} levels; does it contain itself?")
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if kind in (list, tuple):
        items = [_encode(item, tensors, f"{place}[{index}]", depth + 1) for index, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    if kind in (dict, OrderedDict):
        for key in value:
            if type(key) not in (str, int):
                raise ValueError(f"the state at {place} has the key {key!r}; only strings and integers come back as they were.")
        return {"dict": [[key, _encode(item, tensors, f"{place}[{key!r}]", depth + 1)] for key, item in value.items()]}
    if kind in (Tensor, torch.nn.Parameter):
        return _encode_tensor(value, tensors, place)
    raise ValueError(
        f"the state at {place} is a {kind.__module__}.{kind.__qualname__}, which would not come back as it was; use plain"
        " dicts, lists, tuples, numbers, strings and tensors."
    )


def _encode_tensor(tensor: Tensor, tensors: dict[str, Tensor], place: str) -> dict[str, Any]:
    if tensor.dtype not in NAMES or tensor.layout is not torch.strided or tensor.is_meta:
        raise ValueError(
            f"the state at {place} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}; safetensors holds dense"
            f" ones with data, of {', '.join(DTYPES)}."
        )
    name = str(len(tensors))
    tensors[name] = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return {"tensor": name, "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with a memory each: safetensors refuses to write one memory under two names."""
    names = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    return {
        name: tensor.clone() if names[tensor.untyped_storage().data_ptr()] > 1 else tensor for name, tensor in tensors.items()
    }


def _decode(node: Any, file: Any, unread: set[str], depth: int) -> Any:
    if depth > DEPTH:
        raise ValueError(f"it is nested deeper than {DEPTH} levels")
    if isinstance(node, list):
        return [_decode(item, file, unread, depth + 1) for item in node]
    if not isinstance(node, dict):
        return node
    match node:
        case {"tuple": list(items)} if len(node) == 1:
            return tuple(_decode(item, file, unread, depth + 1) for item in items)
        case {"dict": list(pairs)} if len(node) == 1:
            return _decode_dict(pairs, file, unread, depth)
        case {"float": str(bits)} if len(node) == 1 and re.fullmatch(r"[0-9a-f]{16}", bits):
            return struct.unpack(">d", bytes.fromhex(bits))[0]
        case {"tensor": str(name), "dtype": str(dtype), "shape": list(shape)} if len(node) == 3:
            return _decode_tensor(name, dtype, shape, file, unread)
    raise ValueError(f"an object with the keys {sorted(node)[:4]} stands for nothing")


def _decode_dict(pairs: list[Any], file: Any, unread: set[str], depth: int) -> dict[str | int, Any]:
    found: dict[str | int, Any] = {}
    for pair in pairs:
        match pair:
            case [str() | int() as key, item] if type(key) is not bool and key not in found:
                found[key] = _decode(item, file, unread, depth + 1)
            case _:
                raise ValueError("a dict in it has an entry that is not a new string or integer with its value")
    return found


def _decode_tensor(name: str, dtype: str, shape: list[Any], file: Any, unread: set[str]) -> Tensor:
    if name not in unread:
        raise ValueError(f"the tensor {name!r} is not in the safetensors file, or has two places")
    unread.remove(name)
    tensor = file.get_tensor(name)
    if NAMES.get(tensor.dtype) != dtype or list(tensor.shape) != shape:
        raise ValueError(
            f"the tensor {name!r} is {tensor.dtype} {list(tensor.shape)} in the safetensors file, and {dtype} {shape} is stated"
        )
    return tensor.clone()  # not the file's memory: that may be pruned
