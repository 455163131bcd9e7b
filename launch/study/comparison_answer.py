"""What a comparison of arms comes to: paired factors in words, and learning curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...tasks.plots.curves import new_figure
from .intervals import Interval, interval
from .table import Row, averaged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which stay apart for color-blind readers, then line styles.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LEAST = 0.02  # nats, about the noise of a gap by 500 rollouts
LINES = ("-", "--", ":")
PANELS = {  # column: (label, scale)
    "gap": ("gap, EUBO − ELBO (nats)", "log"),
    "component_tv": ("component TV", "linear"),
    "log_z_error": ("|log Z error| (nats)", "log"),
}


def last_rows(rows: Sequence[Row], dim: int) -> dict[tuple[str, int], Row]:
    """{(arm, seed): the row after the last update}."""
    most = max(row["updates"] for row in rows)
    return {(row["arm"], row["seed"]): row for row in rows if row["dim"] == dim and row["updates"] == most}


def factor(rows: Sequence[Row], dim: int, arm: str, other: str) -> Interval:
    """log of the gap of ``arm`` over that of ``other`` after the last update, seed by seed. A gap below `LEAST` is not told from
    it. Factors, since a gap that broke down is so much larger than the others that a mean of differences would be its alone."""
    last = last_rows(rows, dim)
    seeds = sorted({seed for _, seed in last})
    return interval([math.log(max(last[arm, seed]["gap"], LEAST) / max(last[other, seed]["gap"], LEAST)) for seed in seeds])


def answer(rows: Sequence[Row], question: str, labels: Mapping[str, str], against: Mapping[str, str | None]) -> str:
    """In Markdown: each arm's gap, and how it differs from the arm that it is compared with."""
    seeds = len({row["seed"] for row in rows})
    lines = [
        f"# {question}",
        "",
        f"{seeds} seeds, each a problem and a training of its own; 95% intervals, Student's t. The gap is EUBO - ELBO, the"
        " symmetrized KL between policy and target over paths. Arms are compared by the factor between their gaps, seed by seed"
        f" (geometric means; gaps below {LEAST:g} nats count as that): below 1 where the arm is closer to the target.",
    ]
    for dim in sorted({row["dim"] for row in rows}):
        last = last_rows(rows, dim)
        prior = interval([row["gap_prior"] for row in last.values()])
        lines += ["", f"## D = {dim}", "", f"The prior's own gap is {prior.mean:.2f} nats.", ""]
        for arm, label in labels.items():
            own = [row for (name, _), row in last.items() if name == arm]
            gap, lost = interval([row["gap"] for row in own]), interval([row["component_tv"] for row in own])
            line = f"- **{label}**: gap {_said(gap)}, component TV {lost.mean:.3f}"
            if broken := sum(row["gap"] > row["gap_prior"] for row in own):
                line += f", {broken} of {len(own)} trainings further from the target than the prior"
            other = against[arm]
            if other is not None:
                found = factor(rows, dim, arm, other)
                word = {1: "further from the target", -1: "closer to the target", 0: "not shown to differ"}[found.sign]
                mean, low, high = (math.exp(min(value, 700.0)) for value in (found.mean, found.low, found.high))
                line += f"; against {labels[other]}: {word}, {mean:.2g} times its gap ({low:.2g} to {high:.2g})"
            lines.append(line + ".")
    return "\n".join(lines) + "\n"


def _said(value: Interval) -> str:
    return f"{value.mean:.3g} nats ({value.low:.3g} to {value.high:.3g})"


def figure(rows: Sequence[Row], labels: Mapping[str, str]) -> Figure:
    """Learning curves: a column of panels for each dimension, a row for each metric."""
    dims = sorted({row["dim"] for row in rows})
    shown = new_figure(3.6 * len(dims) + 0.4, 2.2 * len(PANELS) + 0.2 + 0.11 * len(labels))
    panels: Any = shown.subplots(len(PANELS), len(dims), squeeze=False, sharex="col", sharey="row")
    means = averaged(rows, ("dim", "updates", "arm"), (*PANELS, "calls"))
    for line, (column, (label, scale)) in zip(panels, PANELS.items(), strict=True):
        for axes, dim in zip(line, dims, strict=True):
            for place, (arm, name) in enumerate(labels.items()):
                own = [mean for mean in means if mean["dim"] == dim and mean["arm"] == arm]
                # A little aside, so that intervals are seen beside each other.
                x = [mean["calls"] * (1 + 0.012 * (place - 0.5 * len(labels))) for mean in own]
                error = [[abs(mean[column] - mean[f"{column}_{end}"]) for mean in own] for end in ("low", "high")]
                style: dict[str, Any] = {"color": COLORS[place % 7], "linestyle": LINES[place // 7 % 3], "label": name}
                y = [mean[column] for mean in own]
                axes.errorbar(x, y, error, marker="o", markersize=3, linewidth=1.1, elinewidth=0.6, **style)
            values = [mean[column] for mean in means if mean["dim"] == dim]
            if scale == "log":
                axes.set_yscale("log", nonpositive="clip")
                axes.yaxis.set_major_formatter("{x:g}")
            else:
                axes.set_ylim(0, 1.2 * max(*values, 0.01))
            axes.grid(alpha=0.25, linewidth=0.5)
            axes.tick_params(labelsize=7)
        line[0].set_ylabel(label, fontsize=8)
    for axes, dim in zip(panels[0], dims, strict=True):
        axes.set_title(f"D = {dim}", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("energy calls", fontsize=8)
    for line, (column, (_, scale)) in zip(panels, PANELS.items(), strict=True):
        if scale == "log":  # by the means: of few seeds, the intervals of some go far beyond
            values = [mean[column] for mean in means]
            line[0].set_ylim(max(0.4 * min(values), 1e-3), 2.5 * max(values))
    handles, names = panels[0, 0].get_legend_handles_labels()
    shown.legend(handles, names, loc="outside lower center", ncols=2 if len(labels) > 3 else 1, fontsize=7, frameon=False)
    return shown
