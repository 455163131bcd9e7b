"""Which adapter of a shared network is on: off at rest, on inside a policy's call, and the same again when recomputed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]


class AdapterSwitch:
    """Which of a network's adapters is on; at rest none is, so that whoever holds the network holds the prior.

    peft's own switch walks over all modules and moves requires_grad. This one sets two attributes a layer, and nothing where
    the wanted adapter is on already.
    """

    def __init__(self) -> None:
        self.on: str | None = None
        self._layers: dict[str, list[nn.Module]] = {}

    def __len__(self) -> int:
        return len(self._layers)

    def add(self, name: str, layers: list[nn.Module]) -> None:
        """Take charge of an adapter's peft layers, and put it to rest."""
        self._layers[name] = layers
        self._set(name)
        self._set(None)

    @contextmanager
    def using(self, name: str | None) -> Generator[None, None, None]:
        """Run with one adapter on, or with none, and leave as it was found, also after an error."""
        before = self.on
        if before == name:
            yield
            return
        self._set(name)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, name: str | None) -> None:
        # Past nn.Module's own attribute setter, which costs ten times as much.
        for layer in self._layers.get(self.on or "", ()):
            layer.__dict__["_disable_adapters"] = True
        for layer in self._layers.get(name or "", ()):
            layer.__dict__["_disable_adapters"] = False
            layer.__dict__["_active_adapter"] = [name]
        self.on = name

    def checkpoint(self, block: nn.Module, *args: Any) -> Any:
        """Gradient checkpointing that recomputes with the adapter that was on in the forward pass."""
        name = self.on

        def forward(*inner: Any) -> Any:
            with self.using(name):
                return block(*inner)

        return cast(Any, checkpoint(forward, *args, use_reentrant=False))
