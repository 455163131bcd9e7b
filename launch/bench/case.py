"""What is measured: a network with random weights, its trainable copy, and a chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from ...samplers.make_policy import make_policy, trainable_copy
from ...samplers.mlp import MLPDenoiser
from ...samplers.prior import Prior
from ...samplers.schedulers.brownian import brownian_chain

Network = Literal["mlp", "unet", "unet+lora"]


@dataclass(frozen=True, eq=False)
class Case:
    """A network, its trainable copy slightly moved, on a Brownian chain, with the batch of one update."""

    name: str
    prior: Prior
    policy: nn.Module
    batch: int

    @property
    def weights(self) -> list[Tensor]:
        return [*self.policy.parameters(), *self.policy.buffers()]


def make_case(name: Network, steps: int, batch: int, device: str) -> Case:
    """Random weights; the policy is the prior moved until log-ratios are some nats, as after some training.

    'unet+lora' has rank-4 adapters on the prior's own network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "mlp":
            network: Any = MLPDenoiser()
            torch.nn.init.normal_(network.outward.weight, std=0.1)
            shape: tuple[int, ...] = (2,)
            move = 1.5
        else:
            network = UNet2DModel(
                sample_size=16,
                in_channels=1,
                out_channels=1,
                layers_per_block=1,
                block_out_channels=(32, 64, 64),
                down_block_types=("DownBlock2D",) * 3,
                up_block_types=("UpBlock2D",) * 3,
                norm_num_groups=8,
            )
            shape, move = (1, 16, 16), 0.3
        prior = Prior(network.to(device), brownian_chain(steps), shape)
        policy = make_policy(prior, "lora", rank=4) if name == "unet+lora" else trainable_copy(prior)
        with torch.no_grad():
            for weight in (weight for weight in policy.parameters() if weight.requires_grad):
                if not weight.any():  # what adapters start at
                    weight += 0.02 * torch.randn(weight.shape).to(device)
                weight += move * weight.std(correction=0) * torch.randn(weight.shape).to(device)
    return Case(name, prior, policy, batch)


def quadratic(x: Tensor) -> Tensor:
    """½ ||x||², an energy that costs next to nothing."""
    return 0.5 * x.flatten(1).square().sum(1)
