"""What the study of horizons comes to, in words and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...tasks.plots.curves import new_figure
from .intervals import interval
from .table import Row, averaged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "What does a short horizon of Trust-PCL cost in bias of the value, and what does it save in variance?"
KEYS = ("dim", "horizon")
VALUES = {  # column: (label, color)
    "value_error": ("learned with the policy", "#0072B2"),
    "value_error_before": ("of the population", "#D55E00"),
}


def answer(rows: Sequence[Row]) -> str:
    """In Markdown: each horizon against the whole path, seed by seed."""
    lines = [f"# {QUESTION}", ""]
    for dim in sorted({row["dim"] for row in rows}):
        own = {(row["horizon"], row["seed"]): row for row in rows if row["dim"] == dim}
        seeds = sorted({seed for _, seed in own})
        horizons = sorted({horizon for horizon, _ in own} - {0})
        whole = interval([own[0, seed]["gap"] for seed in seeds])
        prior = interval([own[0, seed]["gap_prior"] for seed in seeds])
        lines += [
            f"**D = {dim}**, {len(seeds)} seeds, 95% intervals. Over the whole path a gap of {whole.mean:.2f} nats"
            f" ({whole.low:.2f} to {whole.high:.2f}) is left of the prior's {prior.mean:.2f}.",
            "",
        ]
        for horizon in horizons:
            more = interval([own[horizon, seed]["gap"] - own[0, seed]["gap"] for seed in seeds])
            value = interval([own[horizon, seed]["value_error"] for seed in seeds])
            before = interval([own[horizon, seed]["value_error_before"] for seed in seeds])
            verdict = {1: "further from the target", -1: "closer to the target", 0: "not shown to differ"}[more.sign]
            lines.append(
                f"- d = {horizon}: {verdict}, by {more.mean:+.2f} nats ({more.low:+.2f} to {more.high:+.2f}); its value is off by"
                f" {value.mean:.2f} of its spread ({value.low:.2f} to {value.high:.2f}; {before.mean:.2f} before the updates)."
            )
        lines.append("")
    return "\n".join(lines)


def figure(rows: Sequence[Row]) -> Figure:
    """Gap and error of the value against the horizon, a column for each dimension."""
    dims = sorted({row["dim"] for row in rows})
    shown = new_figure(3.4 * len(dims), 5.2)
    panels: Any = shown.subplots(2, len(dims), squeeze=False, sharex=True)
    means = averaged(rows, KEYS, ("gap", "value_error", "value_error_before"))
    longest = 2 * max(row["horizon"] for row in rows)  # where the whole path stands
    for column, dim in enumerate(dims):
        own = [mean for mean in means if mean["dim"] == dim]
        own.sort(key=lambda mean: mean["horizon"] or longest)
        for axes, names in zip(panels[:, column], (("gap",), tuple(VALUES)), strict=True):
            for name in names:
                some = [mean for mean in own if mean["horizon"] or name == "gap"]
                error = [[abs(mean[name] - mean[f"{name}_{end}"]) for mean in some] for end in ("low", "high")]
                label, color = VALUES.get(name, (None, "#0072B2"))
                style: dict[str, Any] = {"color": color, "marker": "o", "markersize": 4, "linewidth": 1.1, "label": label}
                axes.errorbar([mean["horizon"] or longest for mean in some], [mean[name] for mean in some], error, **style)
            axes.set_xscale("log")
            axes.set_ylim(bottom=0)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.25, linewidth=0.5)
        panels[0, column].set_title(f"D = {dim}", fontsize=9)
        ticks = sorted({mean["horizon"] or longest for mean in own})
        panels[1, column].set_xticks(ticks, [f"{tick}" if tick < longest else "whole" for tick in ticks])
        panels[1, column].minorticks_off()
        panels[1, column].set_xlabel("horizon d (steps)", fontsize=8)
    panels[0, 0].set_ylabel("gap, EUBO − ELBO (nats)", fontsize=8)
    panels[1, 0].set_ylabel("RMS error of the value\nover its spread", fontsize=8)
    panels[1, -1].legend(fontsize=7, frameon=False)
    return shown
