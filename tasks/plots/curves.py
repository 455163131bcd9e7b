"""Training curves, and what all pictures share: a figure without a display, and the colors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which stay apart for color-blind readers.
PRIOR, POLICY, TARGET, ELBO, EUBO, LOG_Z = "#8a8a8a", "#0072B2", "#D55E00", "#0072B2", "#D55E00", "#009E73"


def new_figure(width: float, height: float) -> Figure:
    """A figure that needs no display and no global pyplot state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure


def curves(bounds: Axes, residual: Axes, history: list[dict[str, Any]], log_z_true: float) -> None:
    """ELBO, EUBO and log Z over the updates, and the residual's standard deviation.

    The warm start, with its many small updates, takes the left third whatever their number.
    """
    warm = max((record["update"] for record in history if record["phase"] == "warm_start"), default=0)
    last = max((record["update"] for record in history if record["phase"] != "warm_start"), default=0)
    stretch = 0.5 * (last or warm) / warm if warm else 0.0

    def place(record: dict[str, Any]) -> float:
        return (record["update"] - warm) * stretch if record["phase"] == "warm_start" else record["update"]

    def series(name: str) -> tuple[list[float], list[float]]:
        found = [(place(record), record[name]) for record in history if name in record]
        return [update for update, _ in found], [value for _, value in found]

    for name, color, label in (("elbo", ELBO, "ELBO"), ("log_z", LOG_Z, "log Z"), ("eubo", EUBO, "EUBO")):
        updates, values = series(name)
        if values:
            bounds.plot(updates, values, color=color, label=label, linewidth=1.2)
    bounds.axhline(log_z_true, color="black", linewidth=0.8, linestyle="--", label="log Z of the chain")
    bounds.set_title("Bounds on log Z (nats)", fontsize=10)
    bounds.set(ylim=(log_z_true - 1.0, log_z_true + 1.0))
    bounds.legend(fontsize=7, loc="lower left", frameon=False)
    residual.plot(*series("residual_std"), color=POLICY, linewidth=1.2)
    residual.set_title("Residual's standard deviation (nats)", fontsize=10)
    residual.set(ylim=(0, None))
    left = -warm * stretch
    for axes in (bounds, residual):
        axes.grid(alpha=0.2)
        # The residual is known from the first update on; the warm start's stretch would only squeeze it.
        axes.set_xlim(left if axes is bounds else 0, max(last, 1))
        axes.set_xlabel("updates after the warm start" if warm else "updates")
        if warm and axes is bounds:
            axes.axvspan(left, 0, color="black", alpha=0.05, linewidth=0)
            axes.text(left, 0.97, f" warm start: {warm + 1}", transform=axes.get_xaxis_transform(), va="top", fontsize=7)
            axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last])
