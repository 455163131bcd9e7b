"""Pictures of runs on priors about which nothing is known: samples of any shape, and energies of both sides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..tasks.metrics.samples import on_cpu
from ..tasks.plots.curves import POLICY, PRIOR, TARGET, new_figure
from ..tasks.plots.images import image_grid, sheet, target_samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..finetune.certificate.evidence import Evidence


def is_images(samples: Tensor) -> bool:
    """Whether samples [N, ...] are gray or color images."""
    return samples.ndim == 4 and samples.shape[1] in (1, 3)


def sample_figure(images: Tensor) -> Figure:
    """A grid of images."""
    picture = sheet(images)
    figure = new_figure(5.0, 5.0 * picture.shape[0] / picture.shape[1])
    image_grid(figure.subplots(), images, "")
    return figure


def run_figure(evidence: Evidence, certificate: dict[str, Any]) -> Figure:
    """Prior, policy and target (prior samples by weight) side by side, and the energies of all three."""
    evidence = on_cpu(evidence)
    target = target_samples(evidence, min(512, len(evidence.target_samples)))
    figure = new_figure(12.5, 3.4)
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.2))
    _show(axes[0], evidence.prior_samples, "Prior", PRIOR)
    _show(axes[1], evidence.samples, f"Policy ({certificate['verdict']})", POLICY)
    _show(axes[2], target, "Target: prior samples by weight", TARGET)
    _energies(axes[3], evidence)
    figure.suptitle(
        f"ELBO {certificate['elbo']:.2f} ≤ log Z {certificate['log_z_forward']:.2f} ≤ EUBO {certificate['eubo']:.2f}   "
        f"ESS {certificate['ess']:.2f}   target side {certificate['target_ess']:.0f} effective",
        fontsize=9,
    )
    return figure


def _show(axes: Axes, samples: Tensor, title: str, color: str) -> None:
    """Images as a grid, anything else as points in its first two coordinates, or as a histogram of its only one."""
    if is_images(samples):
        image_grid(axes, samples, title)
        return
    axes.set_title(title, fontsize=10)
    flat = samples[:4000].detach().float().flatten(1)
    if flat.shape[1] == 1:
        axes.hist(flat[:, 0].numpy(), bins=60, density=True, color=color)
    else:
        axes.scatter(*flat[:, :2].T.numpy(), s=1.5, c=color, alpha=0.5, linewidths=0, rasterized=True)


def _energies(axes: Axes, evidence: Evidence) -> None:
    sides = (
        ("prior", evidence.prior_energy, torch.full_like(evidence.prior_energy, 1 / len(evidence.prior_energy)), PRIOR),
        ("policy", evidence.energy, torch.full_like(evidence.energy, 1 / len(evidence.energy)), POLICY),
        ("target", evidence.target_energy, evidence.target_weight, TARGET),
    )
    finite = torch.cat([energy[torch.isfinite(energy)] for _, energy, _, _ in sides]).double()
    low, high = finite.quantile(0.002).item(), finite.quantile(0.998).item()
    edges = torch.linspace(low, max(high, low + 1e-6), 41).tolist()
    for name, energy, weight, color in sides:
        kept = torch.isfinite(energy)
        shares = weight[kept].numpy()
        axes.hist(energy[kept].numpy(), edges, weights=shares, histtype="step", color=color, label=name)
    axes.set_title("Energy", fontsize=10)
    axes.set_yticks([])
    axes.legend(fontsize=7, frameon=False)
