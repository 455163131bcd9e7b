"""A sign of life while torch, diffusers and a prior are loaded, which takes seconds."""

from __future__ import annotations

import os
import sys


def say_loading(what: str) -> None:
    """One line on stderr, where a person watches it; from one of several processes."""
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print(f"loading torch and {what} \N{HORIZONTAL ELLIPSIS}", file=sys.stderr, flush=True)
