"""What the study of rewards comes to, in words and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...tasks.mixture_target import target_mixture
from ...tasks.plots.curves import new_figure
from ...tasks.plots.mixture import contours
from .axes import COLORS, log_scale
from .intervals import interval
from .table import Row, averaged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "What is the reward: r = -E, or r = exp(-E)?"
KEYS = ("updates", "method")
BINS, REACH = 60, 13.0
REACHED = 0.1  # mode TV, for how soon


def answer(rows: Sequence[Row]) -> str:
    """In Markdown: where each ends, and after how many energy calls it was close."""
    seeds, most = len({row["seed"] for row in rows}), max(row["updates"] for row in rows)
    last = [row for row in rows if row["updates"] == most]
    prior = interval([row["gap_prior"] for row in last])
    lines = [
        f"# {QUESTION}",
        "",
        f"{seeds} seeds, {last[0]['calls']:,} energy calls a training, 95% intervals, Student's t. All are measured against"
        f" p_prior · exp(-E). The prior's own gap is {prior.mean:.1f} nats; that of the exact denoiser on this chain"
        f" {interval([row['gap_exact'] for row in last]).mean:.2f}.",
        "",
        f"| method | mode TV | W2 over that of exact samples | gap (nats) | energy calls to mode TV ≤ {REACHED:g} |",
        "|---|---|---|---|---|",
    ]
    for method in _methods(rows):
        own = [row for row in last if row["method"] == method]
        cells = [interval([row[name] for row in own]).said() for name in ("mode_tv", "w2_ratio", "gap")]
        lines.append("| " + " | ".join([method, *cells, _soon(rows, method)]) + " |")
    return "\n".join(lines) + "\n"


def _soon(rows: Sequence[Row], method: str) -> str:
    """The first point at which the mean over the seeds is within `REACHED`."""
    for updates in sorted({row["updates"] for row in rows}):
        own = [row for row in rows if row["method"] == method and row["updates"] == updates]
        if interval([row["mode_tv"] for row in own]).mean <= REACHED:
            return f"{own[0]['calls']:,}"
    return "not reached"


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def figure(rows: Sequence[Row]) -> Figure:
    """Samples of the first seed on the target's contours, and mode TV and gap against energy calls."""
    methods = _methods(rows)
    shown = new_figure(2.0 * len(methods) + 0.4, 5.2)
    parts: Any = shown.subfigures(2, 1, height_ratios=(1, 1.25))
    upper, lower = parts
    most, first = max(row["updates"] for row in rows), min(row["seed"] for row in rows)
    panels: Any = upper.subplots(1, len(methods), squeeze=False)
    for axes, method in zip(panels[0], methods, strict=True):
        [own] = [row for row in rows if (row["method"], row["updates"], row["seed"]) == (method, most, first)]
        counts = torch.tensor(own["histogram"]).view(BINS, BINS).T
        extent = (-REACH, REACH, -REACH, REACH)
        axes.imshow(counts.sqrt(), origin="lower", extent=extent, cmap="Blues", aspect="equal")
        contours(axes, target_mixture())
        axes.set_title(method, fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    below: Any = lower.subplots(1, 2)
    left, right = below
    means = averaged(rows, KEYS, ("mode_tv", "gap", "calls"))
    for place, method in enumerate(methods):
        own = [mean for mean in means if mean["method"] == method]
        x = [mean["calls"] * (1 + 0.012 * (place - 2)) for mean in own]
        style: dict[str, Any] = {"color": COLORS[place], "marker": "o", "markersize": 3, "linewidth": 1.1, "elinewidth": 0.6}
        style["linestyle"] = "--" if "exp" in method else "-"
        for axes, name in ((left, "mode_tv"), (right, "gap")):
            error = [[abs(mean[name] - mean[f"{name}_{end}"]) for mean in own] for end in ("low", "high")]
            axes.errorbar(x, [mean[name] for mean in own], error, label=method, **style)
    left.set_ylim(bottom=0)
    for axes, label in ((left, "mode TV"), (right, "gap, EUBO − ELBO (nats)")):
        axes.set_ylabel(label, fontsize=8)
        axes.set_xlabel("energy calls", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25, linewidth=0.5)
    gaps = [mean["gap"] for mean in means]
    log_scale(right, "y", max(0.6 * min(gaps), 1e-3), 1.6 * max(gaps))
    handles, names = left.get_legend_handles_labels()
    lower.legend(handles, names, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    return shown
