"""What the study of RTB and Trust-PCL comes to, in words and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...tasks.plots.curves import new_figure
from .axes import COLORS
from .table import Row, averaged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "RTB and Trust-PCL are one loss up to alpha². Does that survive training?"
KEYS = ("problem", "alpha", "setting")
SETTINGS = ("sgd", "adam", "adam, large epsilon", "adam, gradient clipped", "adam, V learned")
SAME = 1e-3  # of the way: below it the two trainings are one


def answer(rows: Sequence[Row]) -> str:
    """In Markdown: how far the two have parted, by setting and temperature."""
    seeds = len({row["seed"] for row in rows})
    alphas = sorted({row["alpha"] for row in rows})
    loss, gradient = (
        {problem: max(row[name] for row in rows if row["problem"] == problem) for problem in _problems(rows)}
        for name in ("loss_error", "gradient_error")
    )
    lines = [
        f"# {QUESTION}",
        "",
        f"{seeds} seeds. Largest deviation over all temperatures and seeds from the factor alpha², of the first loss and of the"
        " first gradient: " + "; ".join(f"{name}: {loss[name]:.1e} and {gradient[name]:.1e}" for name in _problems(rows)) + ".",
        "",
        "Distance between the weights of the two trainings over the distance that RTB's weights went, largest of the seeds:",
        "",
        "| problem | setting | " + " | ".join(f"alpha {alpha:g}" for alpha in alphas) + " |",
        "|---" * (2 + len(alphas)) + "|",
    ]
    for problem in _problems(rows):
        for setting in SETTINGS:
            own = [row for row in rows if row["problem"] == problem and row["setting"] == setting]
            if own:
                worst = [max(row["parted"] for row in own if row["alpha"] == alpha) for alpha in alphas]
                lines.append(f"| {problem} | {setting} | " + " | ".join(_said(value) for value in worst) + " |")
    lines += ["", f"Bold: beyond {SAME:g}, where they are no longer one training.", ""]
    lines += [
        "Mean gap of RTB and of Trust-PCL at the end, nats:",
        "",
        "| problem | setting | alpha | RTB | Trust-PCL |",
        "|---" * 5 + "|",
    ]
    gaps = averaged([row for row in rows if "gap_rtb" in row], KEYS, ("gap_rtb", "gap_pcl"))
    lines += [
        f"| {mean['problem']} | {mean['setting']} | {mean['alpha']:g} | {mean['gap_rtb']:.3g} | {mean['gap_pcl']:.3g} |"
        for mean in gaps
    ]
    return "\n".join(lines) + "\n"


def _said(value: float) -> str:
    return f"**{value:.1e}**" if value > SAME else f"{value:.1e}"


def _problems(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["problem"] for row in rows))


def figure(rows: Sequence[Row]) -> Figure:
    """How far the two have parted against alpha, a panel for each problem."""
    problems = _problems(rows)
    shown = new_figure(3.3 * len(problems) + 0.4, 3.4)
    panels: Any = shown.subplots(1, len(problems), squeeze=False, sharey=True)
    means = averaged(rows, KEYS, ("parted",))
    for axes, problem in zip(panels[0], problems, strict=True):
        for place, setting in enumerate(SETTINGS):
            own = [mean for mean in means if mean["problem"] == problem and mean["setting"] == setting]
            x, y = [mean["alpha"] for mean in own], [max(mean["parted"], 1e-17) for mean in own]
            axes.plot(x, y, marker="o", markersize=4, linewidth=1.1, color=COLORS[place], label=setting)
        axes.axhline(SAME, color="black", linewidth=0.6, linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(problem, fontsize=9)
        axes.set_xlabel("alpha", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25, linewidth=0.5)
    panels[0, 0].set_ylabel("distance of the weights, over RTB's way", fontsize=8)
    handles, names = panels[0, 0].get_legend_handles_labels()
    shown.legend(handles, names, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    return shown
