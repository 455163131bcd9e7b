"""The figure of the study of dimensions: metrics against energy calls in each dimension, and gaps against the dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...tasks.plots.curves import new_figure
from .dimension_answer import differences
from .intervals import interval
from .methods import COMPARATORS, LABELS, METHODS, OFF_POLICY, ON_POLICY, PRIOR
from .table import Row, averaged

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which stay apart for color-blind readers, with a marker each; on-policy methods are solid.
STYLES: dict[str, tuple[str, str, str]] = {
    "reinforce_kl": ("#000000", "o", "-"),
    "rtb": ("#0072B2", "s", "-"),
    "rtb_prior": ("#8a8a8a", "v", "--"),
    "rtb_inflated": ("#E69F00", "^", "--"),
    "rtb_tilted_prior": ("#D55E00", "D", "--"),
    "rtb_noised_back": ("#CC79A7", "P", "--"),
    "rtb_climbed": ("#009E73", "X", "--"),
    "ppo_kl": ("#b3b300", "<", "-"),
    "trust_pcl": ("#5b2a86", ">", "-"),
    "ddpo": ("#a05a2c", "x", "-"),
    "recipe": ("#56B4E9", "*", ":"),
    "snis": ("#8a8a8a", "1", ":"),
    "smc": ("#009E73", "2", ":"),
}
PANELS: dict[str, tuple[str, str]] = {  # column: (label, scale)
    "component_tv": ("component TV", "linear"),
    "gap": ("gap, EUBO − ELBO (nats)", "log"),
    "log_z_error": ("|log Z error| (nats)", "log"),
    "ess_share": ("ESS over the exact\ndenoiser's", "linear"),
}
SPREAD = 0.012  # of an axis, by which methods stand beside each other, so that their intervals are seen


def figure(rows: Sequence[Row]) -> Figure:
    """Small multiples for each effective share of the prior, one above the other."""
    shares, dims = (sorted({row[name] for row in rows}) for name in ("ess", "dim"))
    shown = new_figure(max(7.2, 2.1 * len(dims) + 0.6), 10.2 * len(shares))
    parts: Any = shown.subfigures(len(shares), 1, squeeze=False)
    for share, part in zip(shares, parts[:, 0], strict=True):
        own = [row for row in rows if row["ess"] == share]
        part.suptitle(_title(own, share), fontsize=10)
        upper, lower = part.subfigures(2, 1, height_ratios=(2.5, 1))
        _against_calls(upper, own, dims)
        _against_dimension(lower, own, dims)
        handles, labels = upper.axes[0].get_legend_handles_labels()
        part.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return shown


def _title(rows: Sequence[Row], share: float) -> str:
    seeds = len({row["seed"] for row in rows})
    return f"{share:g} of the prior effective; means over {seeds} seeds with 95% intervals"


def _against_calls(part: Any, rows: Sequence[Row], dims: Sequence[int]) -> None:
    """A row of panels for each metric, a column for each dimension. All curves begin at the prior."""
    panels = part.subplots(len(PANELS), len(dims), squeeze=False, sharex=True, sharey="row")
    means = averaged(rows, ("dim", "budget", "method"), tuple(PANELS))
    start = {mean["dim"]: mean for mean in means if mean["method"] == PRIOR}
    budgets = sorted({row["budget"] for row in rows})
    ticks = [budget for budget in budgets if not 0 < budget < budgets[-1] / 4]  # of many budgets, the lowest stand too close
    for line, (column, (label, scale)) in zip(panels, PANELS.items(), strict=True):
        for axes, dim in zip(line, dims, strict=True):
            for name in LABELS:
                own = [mean for mean in means if (mean["dim"], mean["method"]) == (dim, name) and mean[column] is not None]
                if not own:
                    continue
                aside = SPREAD * budgets[-1] * _place(name)
                _curve(axes, name, [mean["budget"] + aside for mean in own], own, column)
                _from_prior(axes, name, own[0]["budget"] + aside, start[dim][column], own[0][column])
            axes.plot(0, start[dim][column], marker="o", markersize=4, color="#444444", markerfacecolor="white", zorder=3)
            _finish(axes, scale, _shown(means, column))
            axes.set_xticks(ticks, [f"{budget / 1000:.1f}k" if budget else "prior" for budget in ticks])
        line[0].set_ylabel(label, fontsize=8)
    for axes, dim in zip(panels[0], dims, strict=True):
        axes.set_title(f"D = {dim}", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("energy calls", fontsize=8)


def _against_dimension(part: Any, rows: Sequence[Row], dims: Sequence[int]) -> None:
    """At the largest budget: the gaps, and by how much the on-policy ones are larger."""
    budget = max(row["budget"] for row in rows)
    last = [row for row in rows if row["budget"] == budget]
    means = averaged(last, ("dim", "method"), ("gap", "gap_prior", "gap_exact"))
    left, *right = part.subplots(1, 1 + len(ON_POLICY))
    for name in METHODS:
        if name in COMPARATORS:  # far above
            continue
        own = [mean for mean in means if mean["method"] == name]
        _curve(left, name, _beside(dims, name), own, "gap")
    known = [mean for mean in means if mean["method"] == next(iter(METHODS))]
    for column, text, above in (("gap_prior", "prior", 4), ("gap_exact", "exact denoiser", -10)):
        value = [mean[column] for mean in known]
        left.plot(dims, value, color="#444444", linewidth=1.0, linestyle=(0, (1, 1)))
        left.annotate(text, (dims[0], value[0]), (0, above), textcoords="offset points", fontsize=7)
    left.set_title(f"gap at {budget:,} calls (nats)", fontsize=9)
    _finish(left, "log", [value for column in ("gap", "gap_prior", "gap_exact") for value in _shown(means, column)])
    for axes, on_policy in zip(right, ON_POLICY, strict=True):
        axes.axhline(0, color="black", linewidth=0.8)
        shown: list[float] = []
        for name in OFF_POLICY:
            found = [interval(values) for values in differences(last, [on_policy], [name]).values()]
            own = [{"gap": one.mean, "gap_low": one.low, "gap_high": one.high} for one in found]
            _curve(axes, name, _beside(dims, name), own, "gap")
            shown += [one.mean for one in found]
        axes.set_title(f"gap of {METHODS[on_policy].label},\nless that of off-policy (nats)", fontsize=9)
        _finish(axes, "symlog", shown)
    for axes in (left, *right):
        axes.set_xscale("log")
        axes.set_xticks(dims, [str(dim) for dim in dims])
        axes.minorticks_off()
        axes.set_xlabel("dimension D", fontsize=8)


def _shown(means: Sequence[Row], column: str) -> list[float]:
    """What an axis must hold: the comparators, which run away from the target, may leave it."""
    return [mean[column] for mean in means if mean["method"] not in COMPARATORS and mean[column] is not None]


def _place(name: str) -> float:
    """Of a method, beside the others."""
    return list(LABELS).index(name) - 0.5 * (len(LABELS) - 1)


def _beside(dims: Sequence[int], name: str) -> list[float]:
    """The dimensions on a logarithmic axis, a little aside."""
    return [dim * (dims[-1] / dims[0]) ** (SPREAD * _place(name)) for dim in dims]


def _curve(axes: Axes, name: str, x: Sequence[float], means: Sequence[Row], column: str) -> None:
    """Means with their intervals."""
    color, marker, line = STYLES[name]
    value = [mean[column] for mean in means]
    error = [[mean[column] - mean[f"{column}_low"] for mean in means], [mean[f"{column}_high"] - mean[column] for mean in means]]
    axes.errorbar(
        x,
        value,
        error,
        color=color,
        marker=marker,
        linestyle=line,
        markersize=4,
        linewidth=1.1,
        elinewidth=0.7,
        label=LABELS[name],
    )


def _from_prior(axes: Axes, name: str, budget: float, before: float, after: float) -> None:
    """The stretch of a curve before its first training."""
    color, _, line = STYLES[name]
    axes.plot([0, budget], [before, after], color=color, linestyle=line, linewidth=0.6, alpha=0.6)


def _finish(axes: Axes, scale: str, means: Sequence[float]) -> None:
    """Scale and limits by the means: of few seeds, the intervals of some go far beyond."""
    low, high = min(means), max(means)
    if scale == "log":
        axes.set_yscale("log", nonpositive="clip")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(max(0.4 * low, 1e-3), 2.5 * high)
    elif scale == "symlog":
        axes.set_yscale("symlog", linthresh=1.0)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(min(2.5 * low, -1.0), max(2.5 * high, 1.0))
    else:
        axes.set_ylim(0, min(1.5 * high, 1.15))
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.tick_params(labelsize=7)
