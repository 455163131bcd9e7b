"""The pictures of the mixture task, returned as matplotlib figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..gaussian_mixture import GaussianMixture
from .curves import POLICY, PRIOR, TARGET, curves, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIMIT = 13.5


def scatter(axes: Axes, samples: Tensor, color: str, title: str, target: GaussianMixture | None = None) -> None:
    """Samples [N, 2], with the target's contours where one is given."""
    if target is not None:
        contours(axes, target)
    points = samples[:4000].cpu()
    axes.scatter(points[:, 0], points[:, 1], s=1.5, c=color, alpha=0.5, linewidths=0, rasterized=True)
    axes.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal")
    axes.set_title(title, fontsize=10)
    axes.set_xticks([-10, 0, 10])
    axes.set_yticks([-10, 0, 10])


def contours(axes: Axes, target: GaussianMixture) -> None:
    """Contours of the target, two and three standard deviations around its modes where they are isotropic."""
    line = torch.linspace(-LIMIT, LIMIT, 271, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    log_density = target.log_density(grid).reshape(271, 271).T
    levels = sorted(log_density.max().item() - drop for drop in (0.5, 2.0, 4.5))
    axes.contour(line, line, log_density, levels=levels, colors=TARGET, linewidths=0.8, zorder=3)


def mixture_figure(
    prior: Tensor, policy: Tensor, target: GaussianMixture, history: list[dict[str, Any]], certificate: dict[str, Any]
) -> Figure:
    """Prior, policy on the target's contours, and the training curves; prior, policy [N, 2]."""
    figure = new_figure(12.5, 3.4)
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 1.15, 1.15))
    scatter(axes[0], prior, PRIOR, "Prior")
    scatter(axes[1], policy, POLICY, f"Policy on the target ({certificate['verdict']})", target)
    curves(axes[2], axes[3], history, certificate["log_z_true"])
    metrics = (
        f"W2 ratio {certificate['w2_ratio']:.2f}   mode TV {certificate['mode_tv']:.3f}   "
        f"ESS {certificate['ess']:.2f}   ELBO {certificate['elbo']:.2f} ≤ log Z {certificate['log_z']:.2f}"
        f" ≤ EUBO {certificate['eubo']:.2f}   {certificate['energy_calls']:,} energy calls"
    )
    figure.suptitle(metrics, fontsize=9)
    return figure


def comparison_figure(runs: dict[str, tuple[Tensor, dict[str, Any]]], target: GaussianMixture) -> Figure:
    """One panel a run: policy samples [N, 2] on the target's contours."""
    figure = new_figure(2.6 * len(runs), 3.1)
    for axes, (name, (samples, certificate)) in zip(figure.subplots(1, len(runs)), runs.items(), strict=True):
        scatter(axes, samples, POLICY, name, target)
        axes.title.set_fontsize(9)
        axes.set_xlabel(
            f"{certificate['verdict']}: W2 ratio {certificate['w2_ratio']:.2f}, mode TV {certificate['mode_tv']:.2f}", fontsize=8
        )
    return figure
