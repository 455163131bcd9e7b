"""One line of what `tiltune doctor` reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    text: str
    wrong: str | None = None
    """What is wrong, why that matters and what to do; None where all is well."""
