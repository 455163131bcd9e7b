"""What the study of gradient estimators comes to, in words and as a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...tasks.plots.curves import new_figure
from .axes import COLORS, log_scale
from .comparison_answer import LEAST, gap_factor
from .gradient_estimators import ESTIMATORS
from .intervals import Interval, interval
from .table import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "Which estimator of the gradient says most for each network evaluation?"
KEYS = ("dim", "stage", "estimator")


def efficiency(rows: Sequence[Row], dim: int, stage: int, name: str) -> Interval:
    """log of the efficiency, over the seeds."""
    own = [row for row in rows if (row["dim"], row["stage"], row["estimator"]) == (dim, stage, name)]
    return interval([math.log(max(row["efficiency"], 1e-6)) for row in own])


def gap_factors(rows: Sequence[Row], dim: int, name: str) -> Interval:
    """`gap_factor` of what training by this estimator ends with, against the whole path."""
    return gap_factor({(row["estimator"], row["seed"]): row["gap"] for row in rows if row["dim"] == dim}, name, "whole")


def answer(rows: Sequence[Row]) -> str:
    """In Markdown: a table for each dimension, all against the whole path with all steps."""
    seeds, stages = len({row["seed"] for row in rows}), sorted({row["stage"] for row in rows})
    lines = [
        f"# {QUESTION}",
        "",
        f"{seeds} seeds, 95% intervals, Student's t of logarithms. Efficiency: noise times evaluations of the whole path with all"
        " steps, over the estimator's own; above 1 it says more for each network evaluation. Gap: what training by the estimator"
        f" leaves at equal evaluations, over what the whole path leaves (gaps below {LEAST:g} nats count as that); below 1 it is"
        " closer.",
    ]
    for dim in sorted({row["dim"] for row in rows}):
        own = [row for row in rows if row["dim"] == dim]
        whole = interval([row["gap"] for row in own if row["estimator"] == "whole" and row["stage"] == stages[0]])
        there = {stage: interval([row["gap_there"] for row in own if row["stage"] == stage]).mean for stage in stages}
        heads = [f"efficiency after {stage} updates (gap {gap:.2g})" for stage, gap in there.items()]
        lines += ["", f"## D = {dim}", "", f"Training by the whole path leaves {whole.mean:.3g} nats.", ""]
        lines += ["| estimator | " + " | ".join([*heads, "gap at equal evaluations"]) + " |", "|---" * (len(stages) + 2) + "|"]
        for name, estimator in ESTIMATORS.items():
            cells = [_factor(efficiency(own, dim, stage, name)) if estimator.unbiased else "" for stage in stages]
            lines.append("| " + " | ".join([estimator.label, *cells, _factor(gap_factors(own, dim, name))]) + " |")
    return "\n".join(lines) + "\n"


def _factor(value: Interval) -> str:
    if value.low == value.high:
        return "1"
    return value.exp().said(2)


def figure(rows: Sequence[Row]) -> Figure:
    """Efficiency at each stage, and the gap at equal evaluations: a row of panels for each dimension."""
    dims, stages = (sorted({row[name] for row in rows}) for name in ("dim", "stage"))
    shown = new_figure(8.0, 2.6 * len(dims) + 0.9)
    panels: Any = shown.subplots(len(dims), 2, squeeze=False)
    for (left, right), dim in zip(panels, dims, strict=True):
        ends: tuple[list[float], list[float]] = ([1.0], [1.0])
        for place, (name, estimator) in enumerate(ESTIMATORS.items()):
            color = COLORS[place % len(COLORS)] if estimator.unbiased else "#8a8a8a"
            if estimator.unbiased:
                found = [efficiency(rows, dim, stage, name) for stage in stages]
                ends[0].extend(math.exp(one.mean) for one in found)
                _points(left, [stage * (1 + 0.04 * (place - 3)) for stage in stages], found, color, "-")
            gap = gap_factors(rows, dim, name)
            ends[1].append(math.exp(gap.mean))
            _points(right, [place], [gap], color, "", estimator.label)
        for axes, means in zip((left, right), ends, strict=True):  # by the means: intervals of few seeds go far beyond
            log_scale(axes, "y", 0.4 * min(means), 2.5 * max(means))
            axes.axhline(1.0, color="black", linewidth=0.7)
            axes.grid(alpha=0.25, linewidth=0.5)
        left.set_xscale("log")
        left.set_xticks(stages, [str(stage) for stage in stages])
        left.minorticks_off()
        left.set_ylabel("efficiency", fontsize=8)
        left.set_title(f"D = {dim}: signal for each evaluation", fontsize=9)
        right.set_title(f"D = {dim}: gap at equal evaluations, over the whole path's", fontsize=9)
        right.set_xticks([])
    panels[-1][0].set_xlabel("updates before", fontsize=8)
    handles, names = panels[0][1].get_legend_handles_labels()
    shown.legend(handles, names, loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    return shown


def _points(axes: Any, x: Sequence[float], found: Sequence[Interval], color: str, line: str, label: str | None = None) -> None:
    drawn = [one.exp() for one in found]
    y = [one.mean for one in drawn]
    error = [[one.mean - one.low for one in drawn], [one.high - one.mean for one in drawn]]
    axes.errorbar(x, y, error, marker="o", markersize=4, linestyle=line, linewidth=1.1, color=color, label=label)
