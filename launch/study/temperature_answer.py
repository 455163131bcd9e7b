"""What the study of temperatures comes to, in words and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...tasks.plots.curves import new_figure
from .intervals import Interval, interval
from .table import Row, averaged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "What does the temperature trade between energy, KL to the prior, and diversity?"
KEYS = ("dim", "alpha")
PAIRS = {"energy": "mean energy", "kl": "KL to the prior (nats)", "diversity": "mean distance of two samples"}


def answer(rows: Sequence[Row]) -> str:
    """In Markdown: at each temperature the policy beside the target."""
    seeds = len({row["seed"] for row in rows})
    lines = [
        f"# {QUESTION}",
        "",
        f"{seeds} seeds, 95% intervals, Student's t. Each cell: the policy's mean, and by how much it differs from the exact"
        " value of the tilted law, seed by seed.",
    ]
    for dim in sorted({row["dim"] for row in rows}):
        own = [row for row in rows if row["dim"] == dim]
        lines += ["", f"## D = {dim}", "", "| alpha | " + " | ".join([*PAIRS.values(), "gap (nats)"]) + " |", "|---" * 5 + "|"]
        for alpha in sorted({row["alpha"] for row in own}):
            some = [row for row in own if row["alpha"] == alpha]
            cells = [f"{interval([row[name] for row in some]).mean:.3g}, {_off(some, name)}" for name in PAIRS]
            lines.append(f"| {alpha:g} | " + " | ".join([*cells, f"{interval([row['gap'] for row in some]).mean:.2g}"]) + " |")
    return "\n".join(lines) + "\n"


def _off(rows: Sequence[Row], name: str) -> str:
    found: Interval = interval([row[name] - row[f"{name}_exact"] for row in rows])
    return f"off by {found.mean:+.2g} ({found.low:+.2g} to {found.high:+.2g})"


def figure(rows: Sequence[Row]) -> Figure:
    """The front: energy and diversity against the KL, policies as points, the tilted law as a line; a row for each dimension."""
    dims = sorted({row["dim"] for row in rows})
    shown = new_figure(7.6, 3.0 * len(dims) + 0.3)
    panels: Any = shown.subplots(len(dims), 2, squeeze=False)
    columns = [column for name in PAIRS for column in (name, f"{name}_exact")]
    means = averaged(rows, KEYS, columns)
    for line, dim in zip(panels, dims, strict=True):
        own = [mean for mean in means if mean["dim"] == dim]
        for axes, name in zip(line, ("energy", "diversity"), strict=True):
            exact = [mean["kl_exact"] for mean in own], [mean[f"{name}_exact"] for mean in own]
            axes.plot(*exact, color="#444444", linewidth=1.1, marker="x", markersize=5, label="tilted law (exact)")
            error = [[abs(mean[name] - mean[f"{name}_{end}"]) for mean in own] for end in ("low", "high")]
            style: dict[str, Any] = {"color": "#0072B2", "marker": "o", "markersize": 5, "linestyle": "", "elinewidth": 0.8}
            axes.errorbar([mean["kl"] for mean in own], [mean[name] for mean in own], error, label="policy", **style)
            for mean in own:
                place = (mean["kl"], mean[name])
                axes.annotate(f"α = {mean['alpha']:g}", place, (5, 4), textcoords="offset points", fontsize=7)
            axes.set_ylabel(PAIRS[name], fontsize=8)
            axes.set_title(f"D = {dim}", fontsize=9)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.25, linewidth=0.5)
    for axes in panels[-1]:
        axes.set_xlabel("KL to the prior, over paths (nats)", fontsize=8)
    panels[0, 0].legend(fontsize=7, frameon=False)
    return shown
