"""The picture of four particles: distances and energies beside their measured laws, and the training curves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..four_particles import distances, measured
from ..metrics.samples import on_cpu
from .curves import POLICY, PRIOR, TARGET, curves, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ...finetune.certificate.evidence import Evidence


def histogram_figure(evidence: Evidence, history: list[dict[str, Any]], metrics: dict[str, Any]) -> Figure:
    """Densities of prior and policy with the measured one of the target, and the training curves."""
    evidence = on_cpu(evidence)
    figure = new_figure(12.5, 3.4)
    panels = figure.subplots(1, 4, width_ratios=(1, 1, 1.15, 1.15))
    truth = measured()
    sides = (evidence.prior_samples, PRIOR, "prior"), (evidence.samples, POLICY, "policy")
    for samples, color, label in sides:
        _density(panels[0], distances(samples).flatten(), color, label, (0.0, 9.0))
    inner = truth["energy_edges"]
    span = inner[-1] - inner[0]
    for energy, color, label in ((evidence.prior_energy, PRIOR, "prior"), (evidence.energy, POLICY, "policy")):
        _density(panels[1], energy, color, label, (inner[0] - 0.5 * span, inner[-1] + span))
    for panel, name in ((panels[0], "distance"), (panels[1], "energy")):
        edges, shares = torch.tensor(truth[f"{name}_edges"]), torch.tensor(truth[f"{name}_shares"])[1:-1]
        panel.stairs((shares / edges.diff()).numpy(), edges.numpy(), color=TARGET, label="target")
        panel.set_yticks([])
        panel.legend(fontsize=7, frameon=False)
    panels[0].set_title(f"Distances ({metrics['verdict']})", fontsize=10)
    panels[1].set_title("Energies", fontsize=10)
    curves(panels[2], panels[3], history, metrics["log_z_true"])
    own = [f"{name} TV {metrics[f'{name}_tv']:.3f} (exact {metrics[f'{name}_tv_exact']:.3f})" for name in ("distance", "energy")]
    bounds = f"ELBO {metrics['elbo']:.2f} ≤ log Z {metrics['log_z']:.2f} (measured {metrics['log_z_true']:.2f})"
    title = [*own, f"ESS {metrics['ess']:.2f}", bounds, f"{metrics['energy_calls']:,} energy calls"]
    figure.suptitle("   ".join(title), fontsize=9)
    return figure


def _density(panel: Axes, value: Tensor, color: str, label: str, limits: tuple[float, float]) -> None:
    """A histogram of the values within limits, whose area is their share."""
    kept = value[(value >= limits[0]) & (value <= limits[1])]
    bins = 60
    weight = torch.full((len(kept),), bins / (limits[1] - limits[0]) / len(value))
    panel.hist(kept.numpy(), bins=bins, range=limits, weights=weight.numpy(), histtype="step", color=color, label=label)
