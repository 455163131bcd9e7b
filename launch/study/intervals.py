"""Means over seeds with their 95% intervals, and slopes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


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


def interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of independent values (one a seed)."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def t_quantile(degrees: int) -> float:
    """t for which a Student variable of so many degrees of freedom is within ±t with the probability `LEVEL`."""
    low, high = 0.0, 0.5 * math.pi  # of atan(t / √degrees)
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _within(middle, degrees) < LEVEL else (low, middle)
    return math.sqrt(degrees) * math.tan(high)


def _within(angle: float, degrees: int) -> float:
    """The probability of |T| < √degrees · tan(angle), a finite sum (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    cosine, term, total = math.cos(angle), 1.0, 0.0
    odd = degrees % 2
    if odd:
        term = cosine
    for number in range((degrees - odd) // 2):
        total += term
        numerator = 2 * number + 1 + odd
        term *= cosine**2 * numerator / (numerator + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line of least squares."""
    return statistics.linear_regression(x, y).slope
