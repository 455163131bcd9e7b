"""Random Gaussian mixtures of any dimension and seed, of unit variance in each coordinate, as priors with an exact denoiser."""

from __future__ import annotations

import math
from functools import cache

import torch

from ..samplers.chain import Chain
from ..samplers.prior import Prior
from .gaussian_mixture import GaussianMixture, MixtureDenoiser

COMPONENTS = 4
STD = 0.5  # of a component; the means make up for the rest of the unit variance


@cache
def random_mixture(dim: int, seed: int = 0) -> GaussianMixture:
    """Four isotropic components with random means and weights: mean 0 and variance 1 in each of ``dim`` coordinates.

    Errors: ValueError for a dimension below 1.
    """
    if dim < 1:
        raise ValueError(f"the dimension is {dim}; it is at least 1.")
    generator = torch.Generator().manual_seed(2**30 + 1_000_003 * dim + seed)
    weights = 0.5 + torch.rand(COMPONENTS, generator=generator, dtype=torch.float64)
    weights = weights / weights.sum()
    means = torch.randn(COMPONENTS, dim, generator=generator, dtype=torch.float64)
    means = means - weights @ means
    means = means * math.sqrt(1 - STD**2) / (weights @ means.square()).sqrt()
    covariances = (STD**2 * torch.eye(dim, dtype=torch.float64)).expand(COMPONENTS, dim, dim)
    return GaussianMixture(weights, means, covariances)


def exact_prior(mixture: GaussianMixture, chain: Chain) -> Prior:
    """The prior whose network is the exact denoiser of ``mixture`` on ``chain``."""
    dim = mixture.means.shape[1]
    said = f"prior: the exact denoiser of {len(mixture.weights)} Gaussian components in {dim} dimensions, closed form"
    widest = torch.linalg.eigvalsh(mixture.moments()[1])[-1].item()
    return Prior(
        MixtureDenoiser(mixture, chain),
        chain,
        (dim,),
        data_variance=round(widest, 2),
        decisions=(said, f"chain: {chain.name}, K = {chain.num_steps}, v_prediction, x_hat not clipped"),
    )
