"""What a run asks of a shipped task. A run knows a task as an object that it is given, never as a module that it imports."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from ...samplers.denoiser import Denoiser
    from ...samplers.prior import Prior
    from ..certificate.criteria import Verdict
    from ..certificate.evidence import Evidence
    from ..config.prior import PriorConfig
    from ..config.run import RunConfig
    from ..energies.energy import Energy


class Task(Protocol):
    """A task's prior, the module of its energies, and what it knows of the truth."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def load_prior(self) -> Callable[[PriorConfig], Prior]: ...
    @property
    def metrics(self) -> Callable[[PriorConfig, Evidence, Energy, torch.Generator], dict[str, Any]]: ...
    @property
    def judge(self) -> Callable[[dict[str, Any]], tuple[Verdict, list[str]]]: ...
    @property
    def refuse(self) -> Callable[[RunConfig], None] | None: ...
    @property
    def reference(self) -> Callable[[PriorConfig, Energy, float], Denoiser | None] | None: ...
