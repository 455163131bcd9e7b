"""What the study of dimensions comes to: how the gap between on-policy and off-policy methods goes with the dimension."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .intervals import Interval, interval, slope
from .methods import COMPARATORS, FURTHER, METHODS, OFF_POLICY, ON_POLICY, RECIPE
from .table import Row

QUESTION = "Does the gap between on-policy and off-policy methods widen with the dimension?"


@dataclass(frozen=True)
class Trend:
    """The gap of on-policy methods less that of off-policy ones, each seed on its own: positive where off-policy is closer.

    on_policy, off_policy: their names. lowest, highest: at the lowest and the highest dimension; change: the second less the
    first. slope: for each tenfold dimension, of the line of least squares over log10 of all dimensions.
    """

    on_policy: str
    off_policy: str
    lowest: Interval
    highest: Interval
    change: Interval
    slope: Interval

    @property
    def widens(self) -> bool:
        """Whether the difference is shown to change with the dimension, and is larger at the end."""
        return self.slope.sign != 0 and abs(self.highest.mean) > abs(self.lowest.mean)


def differences(
    rows: Sequence[Row], on_policy: Iterable[str], off_policy: Iterable[str], column: str = "gap"
) -> dict[int, list[float]]:
    """{dimension: the mean over the on-policy methods less that over the off-policy ones, one a seed}, at the largest budget."""
    budget = max(row["budget"] for row in rows)
    value = {(row["method"], row["dim"], row["seed"]): row[column] for row in rows if row["budget"] == budget}
    dims, seeds = (sorted({key[place] for key in value}) for place in (1, 2))

    def mean(names: Iterable[str], dim: int, seed: int) -> float:
        return statistics.fmean(value[name, dim, seed] for name in names)

    sides = tuple(on_policy), tuple(off_policy)
    return {dim: [mean(sides[0], dim, seed) - mean(sides[1], dim, seed) for seed in seeds] for dim in dims}


def trend(rows: Sequence[Row], on_policy: Sequence[str], off_policy: Sequence[str], column: str = "gap") -> Trend:
    """Of the rows of one effective share of the prior."""
    by_dim = differences(rows, on_policy, off_policy, column)
    first, *_, last = by_dim.values()
    logs = [math.log10(dim) for dim in by_dim]
    slopes = [slope(logs, values) for values in zip(*by_dim.values(), strict=True)]
    change = [after - before for before, after in zip(first, last, strict=True)]
    return Trend(
        METHODS[on_policy[0]].label if len(on_policy) == 1 else "all on-policy methods",
        METHODS[off_policy[0]].label if len(off_policy) == 1 else "all off-policy methods",
        interval(first),
        interval(last),
        interval(change),
        interval(slopes),
    )


def meaning(found: Trend, dims: Sequence[int]) -> str:
    """The trend in a sentence."""
    ends = f"{found.lowest.mean:+.2f} nats at D = {dims[0]}, {found.highest.mean:+.2f} at D = {dims[-1]}"
    by = f"{_said(found.slope)} for each tenfold dimension"
    names = f"The gap of {found.on_policy}, less that of {found.off_policy}"
    if not found.slope.sign:
        return f"{names}: no trend is shown, since the interval of the slope holds zero ({ends}; {by})."
    how = "the difference widens" if found.widens else "the difference narrows or changes its sign"
    favored = "off-policy" if found.slope.sign > 0 else "on-policy"
    return f"{names}: {how} with the dimension, in favor of {favored} ({ends}; {by})."


def answer(rows: Sequence[Row], steps: int) -> str:
    """The answer in Markdown: the slopes with their intervals, a sentence for each, and what they do not say."""
    shares, dims = (sorted({row[name] for row in rows}) for name in ("ess", "dim"))
    seeds, budget = len({row["seed"] for row in rows}), max(row["budget"] for row in rows)
    lines = [
        f"# {QUESTION}",
        "",
        f"Random Gaussian mixtures in {', '.join(map(str, dims))} dimensions, {steps} steps, {seeds} seeds, {budget:,} energy"
        " calls a training. The gap of a method is EUBO - ELBO, the symmetrized KL between policy and target over paths, in nats."
        " A difference is the gap of on-policy methods less that of off-policy ones: positive where off-policy is closer to the"
        " target. Intervals are 95%, Student's t over the seeds, each on its own: of twenty slopes that are zero, one is not said"
        " to be.",
    ]
    for share in shares:
        lines += ["", f"## {share:g} of the prior effective", "", *_of_share([row for row in rows if row["ess"] == share], dims)]
    return "\n".join([*lines, "", _limits(rows, dims)]) + "\n"


def _of_share(rows: Sequence[Row], dims: Sequence[int]) -> list[str]:
    """The mean over all methods of each side first, then each pair."""
    sides = [(tuple(ON_POLICY), tuple(OFF_POLICY)), *(((on,), (off,)) for on in ON_POLICY for off in OFF_POLICY)]
    trends = [trend(rows, *pair) for pair in sides]
    shares = [trend(rows, *pair, column="gap_left").slope for pair in sides]
    pairs = trends[1:]
    to_on = sum(one.widens and one.slope.sign < 0 for one in pairs)
    to_off = sum(one.widens and one.slope.sign > 0 for one in pairs)
    unknown = sum(not one.slope.sign for one in pairs)
    heads = ["on-policy", "off-policy", "slope for each tenfold D", f"D = {dims[-1]} less D = {dims[0]}"]
    heads += [f"D = {dims[0]}", f"D = {dims[-1]}", "slope, in shares of the prior's gap"]
    lines = [
        f"**{meaning(trends[0], dims)}** Of {len(pairs)} pairs of methods the difference widens in favor of on-policy in {to_on}"
        f" and in favor of off-policy in {to_off}; the interval of the slope holds zero in {unknown}.",
        "",
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
    ]
    for one, share in zip(trends, shares, strict=True):
        cells = map(_said, (one.slope, one.change, one.lowest, one.highest, share))
        lines.append("| " + " | ".join([one.on_policy, one.off_policy, *cells]) + " |")
    return [*lines, "", *(f"- {meaning(one, dims)}" for one in pairs), "", *_others(rows, dims)]


def _others(rows: Sequence[Row], dims: Sequence[int]) -> list[str]:
    """What is neither side of the question, against RTB on-policy."""
    against = "rtb"
    lines = [
        f"Further methods: their gap less that of {METHODS[against].label}, in nats; negative where they are closer.",
        "",
        f"| | {' | '.join(f'D = {dim}' for dim in dims)} | slope for each tenfold D |",
        "|---" * (len(dims) + 2) + "|",
    ]
    for name in FURTHER | COMPARATORS | RECIPE:
        by_dim = differences(rows, [name], [against])
        cells = [_said(interval(values)) for values in by_dim.values()]
        lines.append("| " + " | ".join([METHODS[name].label, *cells, _said(trend(rows, [name], [against]).slope)]) + " |")
    return lines


def _limits(rows: Sequence[Row], dims: Sequence[int]) -> str:
    """What the nats do not leave out, and what the methods have in common."""
    prior = {dim: statistics.fmean(row["gap_prior"] for row in rows if row["dim"] == dim) for dim in (dims[0], dims[-1])}
    return (
        "The share of the prior that is effective is the same in all dimensions, but the prior's own gap is not:"
        f" {prior[dims[0]]:.1f} nats at D = {dims[0]} and {prior[dims[-1]]:.1f} at D = {dims[-1]}. Slopes in nats grow with it;"
        " those in shares of the prior's gap do not. All methods have the same number of updates, batch size and learning"
        " rate, which were not tuned for each, and none has a warm start or a temperature above the target's; but Trust-PCL over"
        " half paths spends half of its calls on the population of its soft value, and has half of the updates. The default"
        " recipe has both. Populations by their weights alone are in the tables: they are samples, not a sampler, and have no"
        " gap."
    )


def _said(value: Interval) -> str:
    return f"{value.mean:+.3g} ({value.low:+.3g} to {value.high:+.3g})"
