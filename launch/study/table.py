"""Rows as CSV, and their means over seeds as CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from .intervals import interval

Row = dict[str, Any]


def averaged(rows: Sequence[Row], keys: Sequence[str], metrics: Sequence[str]) -> list[Row]:
    """A row for each combination of the ``keys``: the number of its rows (seeds), and NAME, NAME_low and NAME_high of each
    metric: its mean and the 95% interval, None where a row has none. Sorted by the keys; the last one in the order of its first
    appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    means: list[Row] = []
    for values, group in sorted(groups.items(), key=lambda item: item[0][:-1]):
        mean: Row = dict(zip(keys, values, strict=True)) | {"seeds": len(group)}
        for name in metrics:
            values = [row[name] for row in group]
            found = None if None in values else interval(values)
            for part, value in ("", "mean"), ("_low", "low"), ("_high", "high"):
                mean[name + part] = None if found is None else getattr(found, value)
        means.append(mean)
    return means


def as_csv(rows: Sequence[Row]) -> str:
    """A header and a line for each row, numbers in full; without columns of lists."""
    text = io.StringIO()
    found = [{name: value for name, value in row.items() if not isinstance(value, list)} for row in rows]
    columns = list(dict.fromkeys(name for row in found for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def as_markdown(means: Sequence[Row], keys: Sequence[str], metrics: Mapping[str, str]) -> str:
    """A table for each combination of all ``keys`` but the last, which names its lines. Cells: mean (low to high).

    metrics: {column: its heading}.
    """
    *outer, last = keys
    lines: list[str] = [f"Means over {means[0]['seeds']} seeds, with 95% intervals (Student's t)."]
    before: tuple[Any, ...] | None = None
    for row in means:
        own = tuple(row[key] for key in outer)
        if own != before:
            before = own
            lines += ["", "## " + ", ".join(f"{key} {_written(value)}" for key, value in zip(outer, own, strict=True)), ""]
            lines += [f"| {last} | " + " | ".join(metrics.values()) + " |", "|---" * (len(metrics) + 1) + "|"]
        lines.append(f"| {row[last]} | " + " | ".join(_cell(row, name) for name in metrics) + " |")
    return "\n".join(lines) + "\n"


def _written(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _cell(row: Row, name: str) -> str:
    mean, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if mean is None:
        return "–"
    if mean >= 1000 or low == high:  # counts
        return f"{mean:,.0f}"
    return f"{mean:.3g} ({low:.3g} to {high:.3g})"
