"""Means over seeds with their 95% intervals, and slopes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95
LARGEST = 700.0  # of a logarithm whose exponential is a number


@dataclass(frozen=True)
class Interval:
    """A mean and its two-sided 95% interval; infinite where there is one value alone."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where all of the interval is above or below zero, and 0 where it holds zero."""
        return int(self.low > 0) - int(self.high < 0)

    def exp(self) -> Interval:
        """Of an interval of logarithms: the geometric mean and its interval."""
        return Interval(*(math.exp(min(value, LARGEST)) for value in (self.mean, self.low, self.high)))

    def said(self, digits: int = 3) -> str:
        return f"{self.mean:.{digits}g} ({self.low:.{digits}g} to {self.high:.{digits}g})"


def interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of independent values (one a seed)."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf)
    from scipy.stats import t

    half = float(t.ppf(0.5 * (1 + LEVEL), len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line of least squares."""
    return statistics.linear_regression(x, y).slope
