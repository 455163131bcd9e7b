"""Run by torchrun in two processes: what accelerate and torch do there, each fact as JSON.

Started by test_canaries.py as `python -m torch.distributed.run … two_canaries.py OUT`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from tiltune.launch.cluster.torchrun import end_at_once


class Scaled(nn.Module):
    """A weight and a buffer: its output's gradient is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: float) -> Any:
        return self.weight * x + self.seen


def wrapping(buffers: bool) -> Accelerator:
    return Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=buffers)])


def gradient(rank: int) -> dict[str, float]:
    """Powers of two, so that sums and means are exact."""
    accelerator = wrapping(False)
    model = accelerator.prepare(Scaled())
    weight: Any = accelerator.unwrap_model(model).weight
    model(2.0 ** (3 * rank)).backward()
    found = {"one pass": weight.grad.item()}
    weight.grad = None
    for power in range(2):
        with accelerator.no_sync(model):
            model(2.0 ** (3 * rank + power)).backward()
    found["held back"] = weight.grad.item()
    model(2.0 ** (3 * rank + 2)).backward()
    return found | {"sent along": weight.grad.item()}


def buffer_after_a_call(rank: int, buffers: bool) -> float:
    """A number that only this process has, once the model was called without gradients."""
    accelerator = wrapping(buffers)
    model = accelerator.prepare(Scaled())
    inner: Any = accelerator.unwrap_model(model)
    inner.seen.fill_(rank + 1)
    with torch.no_grad():
        model(1.0)
    return inner.seen.item()


def main() -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    rows = torch.tensor([[rank, 0], [rank, 1]])
    found = {
        "environment": {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")},
        "accelerate": [rank, accelerator.num_processes, accelerator.device.type, torch.distributed.get_backend()],
        "gathered": accelerator.gather(rows).tolist(),  # pyright: ignore[reportAttributeAccessIssue]
        "gradient": gradient(rank),
        "buffer": buffer_after_a_call(rank, False),
        "buffer that is sent": buffer_after_a_call(rank, True),
    }
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
    end_at_once(0)


if __name__ == "__main__":
    main()
