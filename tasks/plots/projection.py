"""The picture of a task with a known truth in many dimensions: two axes of prior, policy and target, and the training curves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..gaussian_mixture import GaussianMixture
from ..metrics.samples import on_cpu
from .curves import POLICY, PRIOR, TARGET, curves, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ...finetune.certificate.evidence import Evidence

SHOWN = 3000
LINES = 161


def mixture_projection(target: GaussianMixture) -> tuple[Tensor, GaussianMixture | None]:
    """The first two principal axes of a mixture [D, 2], and the mixture in them; of one dimension that axis [1, 1] and None."""
    axes = torch.linalg.eigh(target.moments()[1])[1].flip(1)[:, :2]
    if axes.shape[1] == 1:
        return axes, None
    return axes, GaussianMixture(target.weights, target.means @ axes, axes.T @ target.covariances @ axes)


def projection_figure(
    evidence: Evidence,
    axes: Tensor,
    exact: Tensor | None,
    contour: GaussianMixture | None,
    history: list[dict[str, Any]],
    metrics: dict[str, Any],
    shown: tuple[str, ...],
    names: tuple[str, str] = ("first axis of the target", "second"),
) -> Figure:
    """Prior and policy [N, D] in ``axes`` [D, 2], on exact samples [N, D] and the target's contours where they are known.

    shown: the metrics in the title, each beside the same of exact samples. names: of the axes.
    """
    evidence = on_cpu(evidence)
    figure = new_figure(12.5, 3.4)
    panels = figure.subplots(1, 4, width_ratios=(1, 1, 1.15, 1.15))
    sides = (
        (panels[0], evidence.prior_samples, PRIOR, "Prior"),
        (panels[1], evidence.samples, POLICY, f"Policy ({metrics['verdict']})"),
    )
    points = [side.double() @ axes for _, side, _, _ in sides] + ([] if exact is None else [exact.double() @ axes])
    low, high = _limits(torch.cat(points[:1] + points[2:]))
    for (panel, _, color, title), side in zip(sides, points, strict=False):
        panel.set_title(title, fontsize=10)
        if axes.shape[1] == 1:
            _histograms(panel, side, points[2], color)
            continue
        panel.scatter(*side[:SHOWN].T, s=1.5, c=color, alpha=0.5, linewidths=0, rasterized=True)
        if contour is not None:
            _contours(panel, contour, low, high)
        elif exact is not None:
            panel.scatter(*points[2][:SHOWN].T, s=1.0, c=TARGET, alpha=0.35, linewidths=0, rasterized=True)
        panel.set(xlim=(low[0].item(), high[0].item()), ylim=(low[1].item(), high[1].item()))
        panel.set_xlabel(names[0], fontsize=8)
        panel.set_ylabel(names[1], fontsize=8)
    curves(panels[2], panels[3], history, metrics["log_z_true"])
    figure.suptitle(_title(metrics, shown), fontsize=9)
    return figure


def _title(metrics: dict[str, Any], shown: tuple[str, ...]) -> str:
    own = [
        f"{name.replace('_tv', ' TV').replace('_', ' ')} {metrics[name]:.3f} (exact {metrics[f'{name}_exact']:.3f})"
        for name in shown
    ]
    reference = metrics.get("ess_reference")
    ess = f"ESS {metrics['ess']:.2f}" + ("" if reference is None else f" (exact denoiser {reference:.2f})")
    bounds = f"ELBO {metrics['elbo']:.2f} ≤ log Z {metrics['log_z']:.2f} ≤ EUBO {metrics['eubo']:.2f}"
    return "   ".join([*own, ess, bounds, f"{metrics['energy_calls']:,} energy calls"])


def _limits(points: Tensor) -> tuple[Tensor, Tensor]:
    """Corners [2] each around all but one in a thousand of the points [N, 2]."""
    low, high = points.quantile(0.001, 0), points.quantile(0.999, 0)
    return low - 0.15 * (high - low), high + 0.15 * (high - low)


def _contours(panel: Axes, target: GaussianMixture, low: Tensor, high: Tensor) -> None:
    """Contours of a density in the plane at 1, 2 and 3 standard deviations from its highest mode."""
    x, y = (torch.linspace(low[i].item(), high[i].item(), LINES, dtype=torch.float64) for i in (0, 1))
    log_density = target.log_density(torch.cartesian_prod(x, y)).reshape(LINES, LINES).T
    levels = sorted(log_density.max().item() - drop for drop in (0.5, 2.0, 4.5))
    panel.contour(x, y, log_density, levels=levels, colors=TARGET, linewidths=0.8, linestyles="solid", zorder=3)


def _histograms(panel: Axes, side: Tensor, exact: Tensor, color: str) -> None:
    panel.hist(side[:, 0].numpy(), bins=60, density=True, color=color)
    panel.hist(exact[:, 0].numpy(), bins=60, density=True, histtype="step", color=TARGET)
