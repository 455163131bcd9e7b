"""A memory in front of an expensive energy."""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .answer import refuse_graph
from .energy import Energy, context_for, overlaps, start_energy
from .error import energy_name


class CachedEnergy:
    """An energy that is not asked twice for the same sample: only what is new in a batch is sent on, once each.

    A sample is known by a 160-bit BLAKE2b digest of its exact bytes, dtype, shape and context. The ``capacity`` samples used
    last are kept, some 300 bytes each. Right for energies that are a function of one sample: one that draws random numbers,
    or compares the samples of a batch, would be frozen at its first answer. Float rounding may depend on the size of the
    batch that is sent on, and so on what was known.

    cache_hits: samples answered without the energy, so far. term_values: as in `WeightedSum`, where it wraps one.

    Errors: ValueError for a capacity below 1.
    """

    def __init__(self, energy: Energy, capacity: int = 100_000) -> None:
        if capacity < 1:
            raise ValueError(f"the cache's capacity is {capacity}; it must be positive.")
        self.energy, self.capacity = energy, capacity
        self.overlaps = overlaps(energy)
        self.cache_hits = 0
        self.term_values: dict[str, Tensor] = {}
        self.__name__ = energy_name(energy)
        self._rows: OrderedDict[bytes, tuple[float, ...]] = OrderedDict()  # the energy, then its terms
        self._unsettled: set[bytes] = set()
        self._terms: list[str] = []
        self._dtype = torch.float32

    def settle(self) -> None:
        """A step is complete: what was learned in it belongs to `state_dict` from now on."""
        self._unsettled.clear()

    def state_dict(self) -> dict[str, Any]:
        """What was remembered when it was settled last: plain values and tensors."""
        rows = {key: row for key, row in self._rows.items() if key not in self._unsettled}
        table = torch.tensor(list(rows.values()), dtype=torch.float64)
        keys = [key.hex() for key in rows]
        return {"keys": keys, "rows": table, "terms": self._terms, "dtype": str(self._dtype).removeprefix("torch.")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rows = zip(state_dict["keys"], state_dict["rows"].tolist(), strict=True)
        self._rows = OrderedDict((bytes.fromhex(key), tuple(row)) for key, row in rows)
        self._terms, self._dtype = list(state_dict["terms"]), getattr(torch, state_dict["dtype"])

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, x: Tensor, **context: Any) -> Tensor:
        """x [B, ...] → [B] in the energy's dtype, on the device of ``x``.

        Errors: ValueError where ``x`` wants a gradient, which a memory does not have; EnergyError as from the energy itself.
        """
        return self.start(x, **context)()

    def start(self, x: Tensor, **context: Any) -> Callable[[], Tensor]:
        """The same in two halves, one batch at a time, for an energy that `overlaps`."""
        if x.requires_grad:
            raise ValueError("a cached energy has no gradient; call the energy that it wraps.")
        context = context_for(self.energy, context, len(x))
        keys = _keys(x, context)
        rows = {key: self._rows[key] for key in keys if key in self._rows}
        first = {key: position for position, key in reversed(list(enumerate(keys))) if key not in rows}
        new = sorted(first.values())
        ask = self._ask(x, context, new) if new else None

        def finish() -> Tensor:
            if ask is not None:
                rows.update(zip((keys[position] for position in new), ask(), strict=True))
                self._unsettled.update(first)
            self.cache_hits += len(x) - len(new)
            return self._remembered(keys, rows, x.device)

        return finish

    def _remembered(self, keys: list[bytes], rows: dict[bytes, tuple[float, ...]], device: torch.device) -> Tensor:
        """[B] energies of the samples in ``rows``, which are the last used from now on."""
        for key in keys:
            self._rows[key] = rows[key]
            self._rows.move_to_end(key)
        while len(self._rows) > self.capacity:
            self._rows.popitem(last=False)
        columns = torch.tensor([rows[key] for key in keys], dtype=torch.float64).reshape(len(keys), 1 + len(self._terms))
        value, *terms = columns.to(self._dtype).to(device).unbind(1)
        self.term_values = dict(zip(self._terms, terms, strict=True))
        return value

    def _ask(self, x: Tensor, context: dict[str, Any], positions: list[int]) -> Callable[[], list[tuple[float, ...]]]:
        """The energy, and its terms, of the samples at ``positions``: one row each."""
        index = torch.tensor(positions, device=x.device)
        part = {
            key: value[index.to(value.device)] if isinstance(value, Tensor) else [value[i] for i in positions]
            for key, value in context.items()
        }
        finish = start_energy(self.energy, x[index], part, self.__name__)

        def asked() -> list[tuple[float, ...]]:
            value = finish()
            refuse_graph(value, self.__name__)
            terms: dict[str, Tensor] = getattr(self.energy, "term_values", {})
            self._terms, self._dtype = list(terms), value.dtype
            columns = [column.double().cpu() for column in (value, *terms.values())]
            return [tuple(row) for row in torch.stack(columns, 1).tolist()]

        return asked


def _keys(x: Tensor, context: dict[str, Any]) -> list[bytes]:
    """One digest a sample.

    Errors: ValueError for context that is neither a tensor nor plain values, and so has no bytes of its own.
    """
    digests = [hashlib.blake2b(digest_size=20) for _ in range(len(x))]
    for name, value in {"": x, **context}.items():
        if isinstance(value, Tensor):
            size = math.prod(value.shape[1:])
            table = value.detach().cpu().contiguous().reshape(len(value), size).view(torch.uint8).numpy()
            head, parts = f"{name} {value.dtype} {tuple(value.shape[1:])}", [row.tobytes() for row in table]
        else:
            try:
                head, parts = name, [json.dumps(one, sort_keys=True).encode() for one in value]
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"the cache cannot tell one sample's {name} from another's ({error}); use tensors, or strings, numbers,"
                    " lists and dicts."
                ) from error
        for digest, part in zip(digests, parts, strict=True):
            digest.update(f"{head} {len(part)} ".encode() + part)
    return [digest.digest() for digest in digests]
