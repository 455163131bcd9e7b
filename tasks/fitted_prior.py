"""A Gaussian prior fitted to a density that is known up to its normalizer: what makes a target without a prior a tilted one.

With E(x) = log p_prior(x) - log rho(x) the tilted prior at alpha = 1 is rho normalized, and log Z the log of rho's integral.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..samplers.prior import Prior
from .cosine_chain import cosine_chain
from .gaussian_mixture import GaussianMixture, MixtureDenoiser


def gaussian_prior(scale: Tensor, steps: int) -> Prior:
    """N(0, diag(scale²)), scale [D], on the cosine chain in units of ``scale``, in which it is N(0, I) and the chain is exact."""
    dim = len(scale)
    eye = torch.eye(dim, dtype=torch.float64)
    standard = GaussianMixture(torch.ones(1, dtype=torch.float64), torch.zeros(1, dim, dtype=torch.float64), eye[None])
    chain = cosine_chain(steps)
    widths = ", ".join(f"{width:g}" for width in scale.unique().tolist())
    return Prior(
        MixtureDenoiser(standard, chain),
        chain,
        (dim,),
        lambda state: state * scale.to(state),
        data_variance=1.0,
        decisions=(
            f"prior: a Gaussian in {dim} dimensions with the standard deviations {widths}, closed form",
            f"chain: {chain.name}, K = {chain.num_steps}, v_prediction, x_hat not clipped",
        ),
    )


def log_gaussian(x: Tensor, scale: Tensor) -> Tensor:
    """log N(x; 0, diag(scale²)) [N] of x [N, D]."""
    scale = scale.to(x)
    return -0.5 * (x / scale).square().sum(1) - scale.log().sum() - 0.5 * x.shape[1] * math.log(2 * math.pi)
