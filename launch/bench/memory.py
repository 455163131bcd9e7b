"""Memory of a call: what autograd saves, and what the allocator holds."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


class KeptBytes:
    """Counts the live storages that autograd saved, each once, and their peak; those of ignored tensors not at all."""

    def __init__(self, ignored: list[Tensor]) -> None:
        self.ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        self.holders: dict[int, int] = {}
        self.now = self.peak = 0

    def ignore(self, tensor: Tensor) -> None:
        self.ignored.add(tensor.untyped_storage().data_ptr())

    def pack(self, tensor: Tensor) -> _Kept:
        return _Kept(self, tensor)

    def __enter__(self) -> KeptBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()


class _Kept:
    """One saved tensor; the graph lets go of it when it is freed."""

    def __init__(self, meter: KeptBytes, tensor: Tensor) -> None:
        self.meter, self.tensor = meter, tensor.detach()  # an output would hold the graph, and the graph it
        self.key, self.bytes = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        holders = meter.holders.get(self.key, 0)
        meter.holders[self.key] = holders + 1
        if not holders and self.key not in meter.ignored:
            meter.now += self.bytes
            meter.peak = max(meter.peak, meter.now)

    def __del__(self) -> None:
        meter = self.meter
        meter.holders[self.key] -= 1
        if not meter.holders[self.key]:
            del meter.holders[self.key]
            if self.key not in meter.ignored:
                meter.now -= self.bytes


def allocator_peak(run: Callable[[], None], device: str) -> int:
    """Bytes by which a call raises what the allocator holds, at its peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue] - missing from torch's stubs
        peak = max(peak, now)
    return peak
