"""What the study of temperatures comes to, in words and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...tasks.plots.curves import new_figure
from .axes import COLORS
from .intervals import Interval, interval
from .table import Row

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
        f"{seeds} seeds, 95% intervals, Student's t. Each cell: the policy's mean, and by how much it differs from that"
        " of the tilted law, seed by seed, which is known but for the steps: the chain's own law differs a little.",
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
    """The front, a color for each seed: energy and diversity against the KL, policies as points, the tilted law as a line."""
    dims, seeds = (sorted({row[name] for row in rows}) for name in ("dim", "seed"))
    shown = new_figure(7.6, 3.0 * len(dims) + 0.3)
    panels: Any = shown.subplots(len(dims), 2, squeeze=False)
    for line, dim in zip(panels, dims, strict=True):
        for axes, name in zip(line, ("energy", "diversity"), strict=True):
            for place, seed in enumerate(seeds):
                own = sorted((row for row in rows if (row["dim"], row["seed"]) == (dim, seed)), key=lambda row: row["alpha"])
                color, first = COLORS[place % len(COLORS)], place == 0
                exact = [row["kl_exact"] for row in own], [row[f"{name}_exact"] for row in own]
                axes.plot(*exact, color=color, linewidth=1.1, label="tilted law (exact)" if first else None)
                policy = [row["kl"] for row in own], [row[name] for row in own]
                axes.plot(*policy, color=color, marker="o", markersize=4, linestyle="", label="policy" if first else None)
                for row in own if first else ():
                    place_of = (row["kl"], row[name])
                    axes.annotate(f"α = {row['alpha']:g}", place_of, (4, 4), textcoords="offset points", fontsize=6, color=color)
            axes.set_ylabel(PAIRS[name], fontsize=8)
            axes.set_title(f"D = {dim}", fontsize=9)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.25, linewidth=0.5)
    for axes in panels[-1]:
        axes.set_xlabel("KL to the prior, over paths (nats)", fontsize=8)
    panels[0, 0].legend(fontsize=7, frameon=False)
    return shown
