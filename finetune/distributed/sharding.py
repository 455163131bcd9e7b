"""A policy in shards, one a process: weights, gradients and moments (FSDP2, `torch.distributed.fsdp.fully_shard`).

A forward or backward pass gathers the weights of one unit at a time, so that all processes must make the same passes. Under
autocast, autograd keeps the casts of all of them for the backward pass, unless gradients are checkpointed. The prior stays whole
everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ...samplers.policy import Policy

UNIT = 2**20  # weights, at least: every unit is gathered once a pass, and a small one takes as long to ask for as to send


def shard(policy: Policy, device: torch.device, count: int) -> Policy:
    """A copy of ``policy`` in ``count`` shards; the policy itself goes to the CPU, where `collect` fills it.

    Errors: ValueError for a policy that does not train all its weights, for float16 and for channels-last weights.
    """
    if policy.kind != "full":
        raise ValueError(
            f"FSDP shards full policies, and this one is {policy.kind}, whose weights are few: launch it without --fsdp."
        )
    if getattr(policy.denoiser, "autocast", None) == torch.float16:
        raise ValueError("FSDP and float16 have not been shown to work together; use bf16 or float32.")
    if not all(weight.is_contiguous() for weight in policy.parameters()):
        raise ValueError("FSDP takes no channels-last weights; leave out channels_last.")
    policy.to("cpu")  # one unit after the other goes to the device, and only this process's part of it stays
    sharded = copy.deepcopy(policy, {id(policy.prior): policy.prior})
    mesh = init_device_mesh(device.type, (count,))
    # Weights that stay gathered behind a pass without gradients would miss the optimizer's next step: always reshard.
    for module in [*units(sharded), sharded]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return sharded


def units(network: nn.Module) -> Iterator[nn.Module]:
    """The elements of the network's lists (blocks, layers), inner ones first, that have enough weights outside earlier ones."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    for module in [element for one in reversed(lists) for element in one]:
        if isinstance(module, nn.ModuleList | nn.ModuleDict | FSDPModule):  # a list has no forward pass of its own
            continue
        if sum(weight.numel() for weight in module.parameters() if not isinstance(weight, DTensor)) >= UNIT:
            yield module


def collect(sharded: nn.Module, policy: Policy) -> None:
    """Copy all the weights into ``policy``, on every process."""
    with torch.no_grad():
        for weight, shards in zip(policy.parameters(), sharded.parameters(), strict=True):
            weight.copy_(full_tensor(shards.detach()))


def full_tensor(tensor: Tensor) -> Tensor:
    """What the processes hold parts of; another tensor is as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole ``tensor``, the same everywhere, as a parameter ``like`` it is held."""
    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device, like.dtype), like.device_mesh, like.placements)


def set_sync(sharded: nn.Module, sync: bool) -> None:
    """Whether backward passes share their gradients, or keep them for one that does."""
    assert isinstance(sharded, FSDPModule)
    sharded.set_requires_gradient_sync(sync)
