"""The pictures of the 2D task, returned as matplotlib figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..gaussian_mixture import GaussianMixture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIMIT = 13.5
# Okabe and Ito's colors, which stay apart for color-blind readers.
PRIOR, POLICY, TARGET, ELBO, EUBO, LOG_Z = "#8a8a8a", "#0072B2", "#D55E00", "#0072B2", "#D55E00", "#009E73"


def new_figure(width: float, height: float) -> Figure:
    """A figure that needs no display and no global pyplot state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure


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


def curves(bounds: Axes, residual: Axes, history: list[dict[str, Any]], log_z_true: float) -> None:
    """ELBO, EUBO and log Z over the updates, and the residual's standard deviation.

    The warm start, with its many small updates, takes the left third whatever their number.
    """
    warm = max((record["update"] for record in history if record["phase"] == "warm_start"), default=0)
    last = max((record["update"] for record in history if record["phase"] != "warm_start"), default=0)
    stretch = 0.5 * (last or warm) / warm if warm else 0.0

    def place(record: dict[str, Any]) -> float:
        return (record["update"] - warm) * stretch if record["phase"] == "warm_start" else record["update"]

    def series(name: str) -> tuple[list[float], list[float]]:
        found = [(place(record), record[name]) for record in history if name in record]
        return [update for update, _ in found], [value for _, value in found]

    for name, color, label in (("elbo", ELBO, "ELBO"), ("log_z", LOG_Z, "log Z"), ("eubo", EUBO, "EUBO")):
        bounds.plot(*series(name), color=color, label=label, linewidth=1.2)
    bounds.axhline(log_z_true, color="black", linewidth=0.8, linestyle="--", label="log Z of the chain")
    bounds.set_title("Bounds on log Z (nats)", fontsize=10)
    bounds.set(ylim=(log_z_true - 1.0, log_z_true + 1.0))
    bounds.legend(fontsize=7, loc="lower left", frameon=False)
    residual.plot(*series("residual_std"), color=POLICY, linewidth=1.2)
    residual.set_title("Residual's standard deviation (nats)", fontsize=10)
    residual.set(ylim=(0, None))
    left = -warm * stretch
    for axes in (bounds, residual):
        axes.grid(alpha=0.2)
        # The residual is known from the first update on; the warm start's stretch would only squeeze it.
        axes.set_xlim(left if axes is bounds else 0, max(last, 1))
        axes.set_xlabel("updates after the warm start" if warm else "updates")
        if warm and axes is bounds:
            axes.axvspan(left, 0, color="black", alpha=0.05, linewidth=0)
            axes.text(left, 0.97, f" warm start: {warm + 1}", transform=axes.get_xaxis_transform(), va="top", fontsize=7)
            axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last])


def mixture_figure(
    prior: Tensor, policy: Tensor, target: GaussianMixture, history: list[dict[str, Any]], certificate: dict[str, Any]
) -> Figure:
    """Prior, policy on the target's contours, and the training curves; prior, policy [N, 2]."""
    figure = new_figure(12.5, 3.4)
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 1.15, 1.15))
    scatter(axes[0], prior, PRIOR, "Prior")
    scatter(axes[1], policy, POLICY, f"Policy on the target ({certificate['verdict']})", target)
    curves(axes[2], axes[3], history, certificate["log_z_true"])
    figures = (
        f"W2 ratio {certificate['w2_ratio']:.2f}   mode TV {certificate['mode_tv']:.3f}   "
        f"ESS {certificate['ess']:.2f}   ELBO {certificate['elbo']:.2f} ≤ log Z {certificate['log_z']:.2f}"
        f" ≤ EUBO {certificate['eubo']:.2f}   {certificate['energy_calls']:,} energy calls"
    )
    figure.suptitle(figures, fontsize=9)
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
