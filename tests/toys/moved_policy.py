"""A small prior with random weights, and a policy away from it at every step."""

from __future__ import annotations

import torch
from torch import nn

from tiltune.samplers.chain import Chain
from tiltune.samplers.make_policy import trainable_copy
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.prior import Prior


def moved_policy(chain: Chain, generator: torch.Generator) -> tuple[Prior, nn.Module]:
    """(prior, policy) over states [2], float64; every weight is drawn from ``generator``."""
    network = MLPDenoiser(dim=2, width=8, depth=1, fourier_features=4)
    for parameter in network.parameters():
        parameter.data.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    prior = Prior(network.double(), chain, (2,))
    policy = trainable_copy(prior)
    for parameter in policy.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return prior, policy
