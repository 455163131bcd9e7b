"""A sign of life while torch, diffusers and what was trained with them are loaded, which takes seconds."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading(what: str) -> Iterator[None]:
    """A line with the seconds, on a terminal's stderr, while the block loads ``what``; from one of several processes."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield
        return
    loaded, begun = threading.Event(), time.monotonic()

    def count() -> None:
        while True:
            passed = time.monotonic() - begun
            print(f"\rloading {what} \N{HORIZONTAL ELLIPSIS} {passed:.0f} s", end="", file=sys.stderr, flush=True)
            if loaded.wait(0.5):
                return

    clock = threading.Thread(target=count, daemon=True)
    clock.start()
    try:
        yield
    finally:
        loaded.set()
        clock.join()
        print(file=sys.stderr)
