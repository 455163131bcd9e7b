"""`tiltune bench`: an update over its floor, two passes against the naive graph, and the log-ratio's error in nats.

Everything is a ratio of two things measured in turn in one run, so that the numbers survive a busy machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DESCRIPTION = """Measure this machine: an on-policy update over its floor 2K·F + K·FB, the two-pass gradient against the naive
graph (time and peak memory at K = 20, 80, 320), and the log-ratio's error against float64.

example: tiltune bench --out bench.json
"""


@dataclass(frozen=True)
class Options:
    """What is measured, and where."""

    device: Literal["cpu", "cuda"] = "cpu"
    quick: bool = False
    """Fewer rounds and smaller batches: seconds, at the price of noisier ratios."""
    threads: int = 1
    """CPU threads of torch. More than one suffers badly on cores that are shared."""
    out: Path | None = None
    """A JSON file for all metrics."""


def main(argv: list[str]) -> int:
    """Parse, measure, print, write; returns the exit status."""
    import tyro

    options = tyro.cli(Options, args=argv, prog="tiltune bench", description=DESCRIPTION)

    from ..bench.report import measure

    results = measure(options.device, options.threads, options.quick)
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=2) + "\n")
        print(f"\nwrote {options.out}")
    return 0
