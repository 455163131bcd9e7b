"""What the study of dimensions comes to: how the gap between on-policy and off-policy methods goes with the dimension."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .intervals import Interval, interval, slope
from .methods import METHODS, OFF_POLICY, ON_POLICY
from .table import Row


@dataclass(frozen=True)
class Trend:
    """The on-policy method's gap less the off-policy one's, each seed on its own: positive where off-policy is closer.

    lowest, highest: at the lowest and the highest dimension; change: the one less the other; slope: for each tenfold dimension,
    the line of least squares over log10 of all dimensions.
    """

    on_policy: str
    off_policy: str
    lowest: Interval
    highest: Interval
    change: Interval
    slope: Interval


def differences(rows: Sequence[Row], on_policy: str, off_policy: str, column: str = "gap") -> dict[int, list[float]]:
    """{dimension: the on-policy method's value less the off-policy one's, one a seed}, at the largest budget."""
    budget = max(row["budget"] for row in rows)
    value = {(row["method"], row["dim"], row["seed"]): row[column] for row in rows if row["budget"] == budget}
    dims, seeds = (sorted({key[place] for key in value}) for place in (1, 2))
    return {dim: [value[on_policy, dim, seed] - value[off_policy, dim, seed] for seed in seeds] for dim in dims}


def trend(rows: Sequence[Row], on_policy: str, off_policy: str, column: str = "gap") -> Trend:
    """Of the rows of one effective share."""
    by_dim = differences(rows, on_policy, off_policy, column)
    dims = list(by_dim)
    first, last = by_dim[dims[0]], by_dim[dims[-1]]
    logs = [math.log10(dim) for dim in dims]
    slopes = [slope(logs, list(values)) for values in zip(*by_dim.values(), strict=True)]
    change = [after - before for before, after in zip(first, last, strict=True)]
    return Trend(on_policy, off_policy, interval(first), interval(last), interval(change), interval(slopes))


def meaning(found: Trend, dims: Sequence[int]) -> str:
    """The trend in a sentence."""
    on, off = METHODS[found.on_policy].label, METHODS[found.off_policy].label
    if not found.slope.sign:
        return f"{on} against {off}: no trend is shown, since the interval of the slope holds zero ({_said(found.slope)})."
    ends = f"from {found.lowest.mean:+.2f} nats at D = {dims[0]} to {found.highest.mean:+.2f} at D = {dims[-1]}"
    favored, other = (off, on) if found.slope.sign > 0 else (on, off)
    widens = abs(found.highest.mean) > abs(found.lowest.mean)
    how = "widens" if widens else "narrows"
    return (
        f"{on} against {off}: the difference {how} with the dimension, {ends}, toward {favored} and away from {other}"
        f" (slope {_said(found.slope)})."
    )


def answer(rows: Sequence[Row], steps: int) -> str:
    """The answer in Markdown: the slopes with their intervals, a sentence for each, and what they do not say."""
    shares, dims = (sorted({row[name] for row in rows}) for name in ("ess", "dim"))
    seeds, budget = len({row["seed"] for row in rows}), max(row["budget"] for row in rows)
    lines = [
        "# Does the gap between on-policy and off-policy methods widen with the dimension?",
        "",
        f"Random Gaussian mixtures in {', '.join(map(str, dims))} dimensions, {steps} steps, {seeds} seeds;"
        f" {budget:,} energy calls a training. The gap of a method is EUBO - ELBO, the symmetrized KL between policy and target over"
        " paths. What is compared is the gap of an on-policy method less that of an off-policy one, in nats: positive where"
        " off-policy is closer.",
        "Intervals are 95%, Student's t over the seeds, each on its own: of twenty that should hold zero, one does not.",
    ]
    for share in shares:
        lines += _of_share([row for row in rows if row["ess"] == share], share, dims)
    return "\n".join([*lines, "", *_limits(rows, dims)]) + "\n"


def _of_share(rows: Sequence[Row], share: float, dims: Sequence[int]) -> list[str]:
    trends = [trend(rows, on, off) for on in ON_POLICY for off in OFF_POLICY]
    relative = {(one.on_policy, one.off_policy): trend(rows, one.on_policy, one.off_policy, "gap_left") for one in trends}
    widening = [one for one in trends if one.slope.sign and abs(one.highest.mean) > abs(one.lowest.mean)]
    on_ahead = sum(one.slope.sign < 0 for one in widening)
    head = f"## {share:g} of the prior effective"
    summary = (
        f"**{len(widening)} of {len(trends)} differences widen with the dimension: {on_ahead} toward the on-policy method,"
        f" {len(widening) - on_ahead} toward the off-policy one. Of {sum(not one.slope.sign for one in trends)} the interval of"
        " the slope holds zero.**"
    )
    lines = ["", head, "", summary, ""]
    lines += [
        f"| on-policy | off-policy | slope for each tenfold D (nats) | D = {dims[-1]} less D = {dims[0]} (nats)"
        f" | at D = {dims[0]} | at D = {dims[-1]} | slope, in shares of the prior's gap |",
        "|---" * 7 + "|",
    ]
    for one in trends:
        cells = [one.slope, one.change, one.lowest, one.highest, relative[one.on_policy, one.off_policy].slope]
        names = [METHODS[name].label for name in (one.on_policy, one.off_policy)]
        lines.append("| " + " | ".join([*names, *map(_said, cells)]) + " |")
    return [*lines, "", *(f"- {meaning(one, dims)}" for one in trends)]


def _limits(rows: Sequence[Row], dims: Sequence[int]) -> list[str]:
    """How much farther the prior is from the target in many dimensions, which the nats do not leave out."""
    prior = {dim: statistics.fmean(row["gap_prior"] for row in rows if row["dim"] == dim) for dim in (dims[0], dims[-1])}
    return [
        "The share of the prior that is effective is the same in all dimensions, but the prior's own gap is not:"
        f" {prior[dims[0]]:.1f} nats at D = {dims[0]} and {prior[dims[-1]]:.1f} at D = {dims[-1]}. Slopes in nats grow with it;"
        " those in shares of the prior's gap do not. All methods have the same updates, batch size and learning rate, none a warm"
        " start or a temperature above the target's; the default recipe, which has both, is in the tables and the figure alone.",
    ]


def _said(value: Interval) -> str:
    return f"{value.mean:+.3g} ({value.low:+.3g} to {value.high:+.3g})"
