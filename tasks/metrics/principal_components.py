"""Principal components of pixels, and the Fréchet distance among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PixelBasis:
    """Leading principal components of images: mean [P], axes [P, dim], float64, and the share of variance they hold."""

    mean: Tensor
    axes: Tensor
    share: float

    def __call__(self, images: Tensor) -> Tensor:
        """Images [N, ...] → coordinates [N, dim] in pixel units."""
        return (images.flatten(1).double() - self.mean) @ self.axes


def pixel_basis(images: Tensor, dim: int) -> PixelBasis:
    """The ``dim`` leading principal components of images [N, ...]."""
    flat = images.flatten(1).double()
    center = flat.mean(0)
    centered, free = flat - center, len(flat) - 1
    if len(flat) >= flat.shape[1]:
        values, axes = torch.linalg.eigh(centered.T @ centered / free)
    else:  # of fewer images than pixels the same components, by the matrix between images
        values, vectors = torch.linalg.eigh(centered @ centered.T / free)
        axes = centered.T @ vectors[:, -dim:] / (values[-dim:].clamp(min=1e-300) * free).sqrt()
    return PixelBasis(center, axes[:, -dim:].flip(1), (values[-dim:].sum() / values.sum()).item())


def frechet(x: Tensor, y: Tensor) -> float:
    """Squared Fréchet distance of Gaussians fitted to [n, D], [m, D] (Dowson and Landau 1982), in squared pixel units."""

    def fitted(z: Tensor) -> tuple[Tensor, Tensor]:
        return z.mean(0), torch.cov(z.T)

    (mean_x, cov_x), (mean_y, cov_y) = fitted(x.double()), fitted(y.double())
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    return ((mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross).item()


def frechet_with_error(x: Tensor, y: Tensor, groups: int = 10) -> tuple[float, float]:
    """`frechet`, and a standard error by the jackknife over ``groups`` parts of both samples, which are in random order.

    Biased upward by sampling, as every such distance: compare it with that of two sets of data of the same sizes.
    """
    left_out = []
    for group in range(groups):
        kept = [torch.arange(len(z)) % groups != group for z in (x, y)]
        left_out.append(frechet(x[kept[0]], y[kept[1]]))
    values = torch.tensor(left_out, dtype=torch.float64)
    error = ((groups - 1) / groups * (values - values.mean()).square().sum()).sqrt()
    return frechet(x, y), error.item()
