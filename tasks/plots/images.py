"""The pictures of the image tasks: prior, policy and weighted prior samples side by side, returned as matplotlib figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...finetune.certificate.evidence import Evidence
from ...finetune.estimators import even
from ...samplers.resampling import systematic
from ..inpainting import Inpainting
from ..metrics.samples import on_cpu
from .curves import curves, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE = 8


def sheet(images: Tensor, side: int = SIDE) -> Tensor:
    """At most ``side``² images [N, 1 or 3, H, W] in [-1, 1], ``side`` in a row → one picture [height, width, 3] in [0, 1] with
    white lines between them."""
    images = images[: side * side].detach().float().cpu()
    count, _, height, width = images.shape
    columns = min(count, side)
    rows = -(-count // columns)
    picture = torch.ones(rows * (height + 1), columns * (width + 1), 3)
    for position, image in enumerate((images / 2 + 0.5).clamp(0, 1)):
        row, column = divmod(position, columns)
        picture[row * (height + 1) :, column * (width + 1) :][:height, :width] = image.permute(1, 2, 0)
    return picture[:-1, :-1]


def image_grid(axes: Axes, images: Tensor, title: str) -> None:
    """The first images [N, 1 or 3, H, W] in [-1, 1] as a `sheet`."""
    axes.imshow(sheet(images).numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()


def target_samples(evidence: Evidence, count: int = SIDE**2) -> Tensor:
    """``count`` samples of the tilted prior: those of evidence on the CPU, drawn by their weights."""
    generator = torch.Generator().manual_seed(0)
    return evidence.target_samples[systematic(evidence.target_weight, count, generator)]


def image_figure(evidence: Evidence, history: list[dict[str, Any]], certificate: dict[str, Any]) -> Figure:
    """Prior, policy and target as image grids, and the training curves where there are any."""
    evidence = on_cpu(evidence)
    figure = new_figure(13.0 if history else 8.0, 3.4)
    ratios = (1, 1, 1, 1.1, 1.1) if history else (1, 1, 1)
    axes = figure.subplots(1, len(ratios), width_ratios=ratios)
    image_grid(axes[0], evidence.prior_samples, "Prior")
    image_grid(axes[1], evidence.samples, f"Policy ({certificate['verdict']})")
    image_grid(axes[2], target_samples(evidence), "Target: samples by weight")
    if history:
        log_z = certificate["log_z_forward"]
        curves(axes[3], axes[4], history, log_z)
        axes[3].set(ylim=(log_z - 4, log_z + 4))
    figure.suptitle(summary(certificate), fontsize=9)
    return figure


def summary(certificate: dict[str, Any]) -> str:
    """One line of a certificate's metrics."""
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
    for images, share in zip((evidence.samples, evidence.target_samples), shares, strict=True):
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
    image_grid(grids[2].subplots(), target_samples(evidence), "Target: samples by weight")
    figure.suptitle(summary(certificate), fontsize=9)
    return figure
