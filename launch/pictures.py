"""Pictures of runs on priors about which nothing is known: samples of any shape, and energies of both sides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..samplers.steering import systematic
from ..tasks.plots import POLICY, PRIOR, TARGET, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..finetune.certificate import Evidence

SIDE = 8


def is_images(samples: Tensor) -> bool:
    """Whether samples [N, ...] are gray or color images."""
    return samples.ndim == 4 and samples.shape[1] in (1, 3)


def sheet(images: Tensor) -> Tensor:
    """At most 8 x 8 images [N, 1 or 3, H, W] in [-1, 1] → one picture [height, width, 3] in [0, 1], white lines between them."""
    images = images[: SIDE * SIDE].detach().float().cpu()
    count, _, height, width = images.shape
    columns = min(count, SIDE)
    rows = -(-count // columns)
    picture = torch.ones(rows * (height + 1), columns * (width + 1), 3)
    for position, image in enumerate((images / 2 + 0.5).clamp(0, 1)):
        row, column = divmod(position, columns)
        picture[row * (height + 1) :, column * (width + 1) :][:height, :width] = image.permute(1, 2, 0)
    return picture[:-1, :-1]


def sample_figure(images: Tensor) -> Figure:
    """A grid of images."""
    picture = sheet(images)
    figure = new_figure(5.0, 5.0 * picture.shape[0] / picture.shape[1])
    _show(figure.subplots(), images, "", "")
    return figure


def run_figure(evidence: Evidence, certificate: dict[str, Any]) -> Figure:
    """Prior, policy and target (prior samples by weight) side by side, and the energies of all three."""
    target = systematic(evidence.target_weight, min(512, len(evidence.prior_samples)), torch.Generator().manual_seed(0))
    figure = new_figure(12.5, 3.4)
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.2))
    _show(axes[0], evidence.prior_samples, "Prior", PRIOR)
    _show(axes[1], evidence.samples, f"Policy ({certificate['verdict']})", POLICY)
    _show(axes[2], evidence.prior_samples[target], "Target: prior samples by weight", TARGET)
    _energies(axes[3], evidence)
    figure.suptitle(
        f"ELBO {certificate['elbo']:.2f} ≤ log Z {certificate['log_z_forward']:.2f} ≤ EUBO {certificate['eubo']:.2f}   "
        f"ESS {certificate['ess']:.2f}   target side {certificate['target_ess']:.0f} effective",
        fontsize=9,
    )
    return figure


def _show(axes: Axes, samples: Tensor, title: str, color: str) -> None:
    """Images as a grid, anything else as points in its first two coordinates, or as a histogram of its only one."""
    axes.set_title(title, fontsize=10)
    if is_images(samples):
        axes.imshow(sheet(samples).numpy(), interpolation="nearest")
        axes.set_axis_off()
        return
    flat = samples[:4000].detach().float().cpu().flatten(1)
    if flat.shape[1] == 1:
        axes.hist(flat[:, 0].numpy(), bins=60, density=True, color=color)
    else:
        axes.scatter(*flat[:, :2].T.numpy(), s=1.5, c=color, alpha=0.5, linewidths=0, rasterized=True)


def _energies(axes: Axes, evidence: Evidence) -> None:
    sides = (
        ("prior", evidence.prior_energy, torch.full_like(evidence.prior_energy, 1 / len(evidence.prior_energy)), PRIOR),
        ("policy", evidence.energy, torch.full_like(evidence.energy, 1 / len(evidence.energy)), POLICY),
        ("target", evidence.prior_energy, evidence.target_weight, TARGET),
    )
    finite = torch.cat([energy[torch.isfinite(energy)] for _, energy, _, _ in sides]).cpu().double()
    low, high = finite.quantile(0.002).item(), finite.quantile(0.998).item()
    edges = torch.linspace(low, max(high, low + 1e-6), 41).tolist()
    for name, energy, weight, color in sides:
        kept = torch.isfinite(energy)
        shares = weight[kept].cpu().numpy()
        axes.hist(energy[kept].cpu().numpy(), edges, weights=shares, histtype="step", color=color, label=name)
    axes.set_title("Energy", fontsize=10)
    axes.set_yticks([])
    axes.legend(fontsize=7, frameon=False)
