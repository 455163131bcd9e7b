"""The pictures of the image tasks: prior, policy and weighted prior samples side by side, returned as matplotlib figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..finetune.certificate import Evidence
from ..samplers.steering import systematic
from .image_metrics import even, on_cpu
from .inpainting import Inpainting
from .plots import curves, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE = 8


def tile(images: Tensor) -> Tensor:
    """The first 64 of images [N, 1, H, W] as one picture, eight by eight, a white line between them."""
    height, width = images.shape[2:]
    sheet = torch.ones(SIDE * (height + 1), SIDE * (width + 1))
    for position, image in enumerate(images[: SIDE**2, 0]):
        row, column = divmod(position, SIDE)
        sheet[row * (height + 1) :, column * (width + 1) :][:height, :width] = image
    return sheet[:-1, :-1]


def image_grid(axes: Axes, images: Tensor, title: str) -> None:
    """Images [N, 1, H, W] in [-1, 1], tiled."""
    axes.imshow(tile(images).numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()


def target_images(evidence: Evidence) -> Tensor:
    """64 images of the tilted prior: prior samples drawn by their weights."""
    generator = torch.Generator().manual_seed(0)
    return evidence.prior_samples[systematic(evidence.target_weight, SIDE**2, generator)]


def image_figure(evidence: Evidence, history: list[dict[str, Any]], certificate: dict[str, Any]) -> Figure:
    """Prior, policy and target as image grids, and the training curves where there are any."""
    evidence = on_cpu(evidence)
    figure = new_figure(13.0 if history else 8.0, 3.4)
    ratios = (1, 1, 1, 1.1, 1.1) if history else (1, 1, 1)
    axes = figure.subplots(1, len(ratios), width_ratios=ratios)
    image_grid(axes[0], evidence.prior_samples, "Prior")
    image_grid(axes[1], evidence.samples, f"Policy ({certificate['verdict']})")
    image_grid(axes[2], target_images(evidence), "Target: prior samples by weight")
    if history:
        log_z = certificate["log_z_forward"]
        curves(axes[3], axes[4], history, log_z)
        axes[3].set(ylim=(log_z - 4, log_z + 4))
    figure.suptitle(summary(certificate), fontsize=9)
    return figure


def summary(certificate: dict[str, Any]) -> str:
    """One line of a certificate's figures."""
    parts = []
    if "share" in certificate:
        parts.append(f"wanted share {certificate['share']:.3f} (target {certificate['share_reference']:.3f})")
        parts.append(f"diversity {certificate['diversity']:.2f}")
    if "residual" in certificate:
        parts.append(f"measured residual {certificate['residual']:.2f} (target {certificate['residual_reference']:.2f})")
    parts += [
        f"energy TV {certificate['energy_tv']:.3f}",
        f"W2 ratio {certificate['w2_ratio']:.2f}",
        f"ELBO {certificate['elbo']:.2f} ≤ log Z {certificate['log_z_forward']:.2f} ≤ EUBO {certificate['eubo']:.2f}",
    ]
    return "   ".join(parts)


def inpainting_figure(evidence: Evidence, problem: Inpainting, certificate: dict[str, Any]) -> Figure:
    """What was measured, posterior mean and spread of policy and target, and samples of prior, policy and target."""
    evidence = on_cpu(evidence)
    figure = new_figure(14.5, 3.5)
    subfigures: Any = figure.subfigures(1, 4, width_ratios=(1.35, 1, 1, 1))
    left, *grids = subfigures
    panels = left.subplots(2, 3)
    seen = torch.where(problem.measured, problem.value, torch.nan)
    shares = (even(len(evidence.samples)), evidence.target_weight)
    sides = []
    for images, share in zip((evidence.samples, evidence.prior_samples), shares, strict=True):
        mean = torch.einsum("n,nchw->hw", share, images.double())
        spread = torch.einsum("n,nchw->hw", share, (images.double() - mean).square()).sqrt()
        sides.append((mean, spread))
    top = max(float(spread.max()) for _, spread in sides)
    columns = (
        (("Image", problem.image[0], -1, 1), ("Measured", seen[0], -1, 1)),
        (("Policy: mean", sides[0][0], -1, 1), ("Target: mean", sides[1][0], -1, 1)),
        (("Policy: spread", sides[0][1], 0, top), ("Target: spread", sides[1][1], 0, top)),
    )
    for column, entries in enumerate(columns):
        for row, (title, picture, low, high) in enumerate(entries):
            axes = panels[row, column]
            axes.imshow(picture.numpy(), cmap="gray" if low else "viridis", vmin=low, vmax=high, interpolation="nearest")
            axes.set_facecolor("#cfd8e6")
            axes.set(xticks=[], yticks=[])
            axes.set_title(title, fontsize=9)
    image_grid(grids[0].subplots(), evidence.prior_samples, "Prior")
    image_grid(grids[1].subplots(), evidence.samples, f"Policy ({certificate['verdict']})")
    image_grid(grids[2].subplots(), target_images(evidence), "Target: prior samples by weight")
    figure.suptitle(summary(certificate), fontsize=9)
    return figure
