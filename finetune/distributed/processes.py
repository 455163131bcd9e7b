"""The processes of a run: who they are, what they share, and that they fail and stop together.

What talks to the others (`gather`, `mean`, `agree`, `together`, `poll`) is called by all processes, in the same order.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from ...samplers.policy import Policy
from .signals import NoAnswer, Preempted, ProcessError, asked_to_stop

# In the order of their say: a preempted run is started again, one that a person stopped is not.
ASKED = (None, Preempted, KeyboardInterrupt)


def _is_true(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


class Processes:
    """What torchrun started, or this process alone; on the device type of ``device``.

    timeout: seconds that one waits for another before it gives up; of the first `Processes` here, where there are more.
    sharded: whether the policy is (`sharding`), as accelerate's variables in the environment ask for; `tiltune launch --fsdp`
    sets them.

    Errors: ValueError where accelerate runs on another kind of device, and for what is not supported of FSDP.
    """

    def __init__(self, device: torch.device, timeout: float = 600.0) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

        # Sampling calls the wrapped network without gradients: buffers are the same everywhere, and sending them costs each call.
        wrapping = DistributedDataParallelKwargs(broadcast_buffers=False)
        waiting = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
        self._accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[wrapping, waiting])
        self._timeout = timeout
        if self._accelerator.device.type != device.type:
            raise ValueError(
                f"the prior is on {device} but accelerate runs on {self._accelerator.device}; move the prior's network there"
                " first."
            )
        self.device: torch.device = self._accelerator.device
        self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes
        self.sharded = _is_true("ACCELERATE_USE_FSDP") and self.count > 1
        if self.sharded and os.environ.get("FSDP_VERSION") != "2":
            raise ValueError("this asks for FSDP 1, which is not supported; set fsdp_version: 2 (FSDP_VERSION=2).")
        for name in ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
            if self.sharded and _is_true(name):
                raise ValueError(
                    f"{name} is true, which is not supported here; set it to false (--gradient-checkpointing is ours)."
                )
        self.stopped_by: BaseException | None = None  # the error on which all processes agreed to stop

    @property
    def main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def wrap(self, policy: Policy) -> Any:
        """The policy as it is called from now on: its gradients are averaged over the processes. `collect` brings it up to date.

        Errors: ValueError for a policy that cannot be sharded where it is to be.
        """
        if self.count == 1:
            return policy.to(self.device)
        if self.sharded:
            from .sharding import shard

            return shard(policy, self.device, self.count)
        with warnings.catch_warnings():
            # Torch 2.13 has a new name for it, which older ones do not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return self._accelerator.prepare(policy)

    def collect(self, wrapped: nn.Module, policy: Policy) -> None:
        """Give ``policy`` the weights of what `wrap` made of it; nothing to do unless they are sharded."""
        if self.sharded:
            from .sharding import collect

            collect(wrapped, policy)

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """A weight, a moment or a norm of a wrapped policy: all of it."""
        if not self.sharded:
            return tensor
        from .sharding import full_tensor

        return full_tensor(tensor)

    def shard(self, tensor: Tensor, like: Tensor) -> Tensor:
        """What this process holds of ``tensor``, as it does of the weight ``like``."""
        if not self.sharded:
            return tensor.to(like)
        from .sharding import shard_like

        return shard_like(tensor, like)

    def saved(self, tensor: Tensor) -> Tensor:
        """What this process writes of a weight or a moment into a checkpoint: all of it, or nothing where another one does."""
        if not self.sharded:
            return tensor
        full = self.full_tensor(tensor.detach())
        return full.cpu() if self.main else torch.empty(0)

    @contextmanager
    def no_sync(self, policy: nn.Module) -> Iterator[None]:
        """A forward and backward without averaging: the next backward pass outside averages both gradients together."""
        if not self.sharded:
            with nullcontext() if self.count == 1 else self._accelerator.no_sync(policy):
                yield
            return
        from .sharding import set_sync

        set_sync(policy, False)
        try:
            yield
        finally:
            set_sync(policy, True)

    def share(self, name: str, total: int) -> int:
        """This process's part of a size that the config states for the whole run.

        Errors: ValueError where it cannot be split evenly: processes with different numbers of rows would not mean the same.
        """
        if total % self.count:
            raise ValueError(
                f"{name} is {total}, which {self.count} processes cannot share evenly; give a multiple of {self.count}."
            )
        return total // self.count

    def gather(self, value: Tensor) -> Tensor:
        """[n, ...] of every process, in the order of ranks: [W n, ...]. n must be the same everywhere.

        Errors: NoAnswer where another process does not come, as gloo finds; nccl ends this process itself.
        """
        try:
            gathered = self._accelerator.gather(value)
        except RuntimeError as error:
            if "timed out" not in str(error).lower():
                raise
            self.stopped_by = NoAnswer(
                f"another process did not answer for {self._timeout:g} s: it hangs, in its energy perhaps, or is slower than"
                " that. This one ends, and torchrun ends all of them. Raise process_timeout for an energy that takes longer."
            )
            raise self.stopped_by from error
        assert isinstance(gathered, Tensor)
        return gathered

    def gather_valid(self, value: Tensor, valid: Tensor) -> Tensor:
        """[n] of every process, without what is invalid."""
        gathered = self.gather(value.masked_fill(~valid, math.nan))
        return gathered[~gathered.isnan()]

    def mean(self, value: float) -> float:
        """Over the processes."""
        if self.count == 1:
            return value
        return self.gather(torch.tensor([value], device=self.device, dtype=torch.float64)).mean().item()

    def most(self, number: int) -> int:
        """The largest of them over the processes."""
        if self.count == 1:
            return number
        return int(self.gather(torch.tensor([number], device=self.device)).max())

    def mean_of(self, values: Tensor) -> Tensor:
        """[n] over the processes, each on its own."""
        return values if self.count == 1 else self.gather(values[None]).mean(0)

    def agree(self, error: BaseException | None = None) -> None:
        """Go on only if all processes can.

        Errors: ``error``; ProcessError where another process has one.
        """
        if self.count > 1:
            failed = self.gather(torch.tensor([error is not None], device=self.device, dtype=torch.int32)).nonzero()[:, 0]
            if error is None and len(failed):
                error = ProcessError(f"process {failed[0].item()} failed, and all stop with it; its own output says why.")
        if error is not None:
            self.stopped_by = error
            raise error

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block in which one process may fail where others do not: then all raise behind it."""
        error = None
        try:
            yield
        except (Exception, KeyboardInterrupt) as caught:
            if caught is self.stopped_by:  # of an inner block: the others have left as well
                raise
            error = caught
        self.agree(error)

    def poll(self) -> None:
        """Where a run may stop: all processes do if any was asked to.

        Errors: KeyboardInterrupt or Preempted. A process alone raises them by itself, wherever it is.
        """
        if self.count == 1:
            return
        stop = asked_to_stop()
        asked = self.gather(torch.tensor([ASKED.index(stop)], device=self.device, dtype=torch.int32)).max().item()
        if kind := ASKED[int(asked)]:
            self.stopped_by = kind("asked to stop")
            raise self.stopped_by

    def refuse_other(self, number: int, what: str) -> None:
        """Errors: ProcessError where the processes do not have the same number."""
        numbers = self.gather(torch.tensor([number], device=self.device))
        if len(numbers.unique()) > 1:
            raise ProcessError(f"the processes found different {what}: {numbers.tolist()}. Do all see the same folder?")

    def refuse_same_noise(self, generator: torch.Generator) -> None:
        """Errors: ProcessError where two processes would draw the same trajectories, which is one batch paid for twice."""
        if self.count == 1:
            return
        copy = torch.Generator(device=self.device)
        copy.set_state(generator.get_state())
        drawn = self.gather(torch.randn(1, 8, generator=copy, device=self.device))
        if len(drawn.unique(dim=0)) < self.count:
            raise ProcessError("two processes draw the same noise: their generators have one seed.")

    def refuse_other_weights(self, weights: list[Tensor]) -> None:
        """Errors: ProcessError where the processes' weights are no longer the same."""
        if self.count == 1 or self.sharded:  # a shard has no copy that it could differ from
            return
        sums = torch.stack([weight.detach().double().square().sum() for weight in weights])
        everyone = self.gather(sums[None])
        if not torch.allclose(everyone, everyone[:1].expand_as(everyone), rtol=1e-6, atol=0):
            raise ProcessError("the processes' weights have drifted apart: a gradient was not shared.")
