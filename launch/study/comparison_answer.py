"""What a comparison of arms comes to: paired factors in words, and a figure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...tasks.plots.curves import new_figure
from .axes import COLORS, log_scale
from .intervals import Interval, interval
from .table import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST = 0.02  # nats, about the noise of a gap by 500 rollouts
PANELS = {  # column: (label, scale)
    "gap": ("gap (nats)", "log"),
    "component_tv": ("component TV", "linear"),
}


def last_rows(rows: Sequence[Row], dim: int) -> dict[tuple[str, int], Row]:
    """{(arm, seed): the row after the last update}."""
    most = max(row["updates"] for row in rows)
    return {(row["arm"], row["seed"]): row for row in rows if row["dim"] == dim and row["updates"] == most}


def gap_factor(gaps: Mapping[tuple[str, int], float], name: str, other: str) -> Interval:
    """log of the gap of ``name`` over that of ``other``, seed by seed. gaps: {(name, seed): nats}.

    A gap below `LEAST` is not told from it. Factors, since a gap that broke down is so much larger than the others that a mean of
    differences would be its alone.
    """
    seeds = sorted({seed for _, seed in gaps})
    return interval([math.log(max(gaps[name, seed], LEAST) / max(gaps[other, seed], LEAST)) for seed in seeds])


def factor(rows: Sequence[Row], dim: int, arm: str, other: str) -> Interval:
    """`gap_factor` of two arms after the last update."""
    return gap_factor({key: row["gap"] for key, row in last_rows(rows, dim).items()}, arm, other)


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
            line = f"- **{label}**: gap {gap.mean:.3g} nats ({gap.low:.3g} to {gap.high:.3g}), component TV {lost.mean:.3f}"
            if broken := sum(row["gap"] > row["gap_prior"] for row in own):
                line += f", {broken} of {len(own)} trainings further from the target than the prior"
            other = against[arm]
            if other is not None:
                found = factor(rows, dim, arm, other)
                word = {1: "further from the target", -1: "closer to the target", 0: "not shown to differ"}[found.sign]
                times = found.exp()
                line += f"; against {labels[other]}: {word}, {times.mean:.2g} times its gap ({times.low:.2g} to {times.high:.2g})"
            lines.append(line + ".")
    return "\n".join(lines) + "\n"


def figure(rows: Sequence[Row], labels: Mapping[str, str]) -> Figure:
    """After the last update: a line for each arm, gap and component TV of each dimension beside each other."""
    dims = sorted({row["dim"] for row in rows})
    shown = new_figure(2.6 + 2.1 * len(PANELS) * len(dims), 0.9 + 0.24 * len(labels))
    panels: Any = shown.subplots(1, len(PANELS) * len(dims), squeeze=False, sharey=True)
    places = list(range(len(labels)))[::-1]
    for (dim, (column, (label, scale))), axes in zip(itertools.product(dims, PANELS.items()), panels[0], strict=True):
        last = last_rows(rows, dim)
        ends: list[float] = []
        for place, (number, arm) in zip(places, enumerate(labels), strict=True):
            own = [max(row[column], LEAST) if scale == "log" else row[column] for (name, _), row in last.items() if name == arm]
            found = interval([math.log(value) for value in own]).exp() if scale == "log" else interval(own)
            error = [[found.mean - found.low], [found.high - found.mean]]
            axes.errorbar(found.mean, place, xerr=error, marker="o", markersize=4, color=COLORS[number % 7])
            ends += [found.mean, *own]
        if scale == "log":
            log_scale(axes, "x", 0.7 * min(ends), 1.5 * max(ends))
        else:
            axes.set_xlim(0, 1.05 * max(*ends, 0.01))
        axes.set_title(f"D = {dim}", fontsize=9)
        axes.set_xlabel(label, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25, linewidth=0.5)
    panels[0, 0].set_yticks(places, list(labels.values()), fontsize=7)
    return shown
