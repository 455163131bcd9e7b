"""A bar that moves while runs take their time: its clock goes on between two of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

EVERY = 1.0  # seconds


@contextmanager
def moving_bar(total: int, done: int, title: str) -> Iterator[Any]:
    """A tqdm bar on stderr that begins at ``done``: runs, the time they took, and the time left."""
    ended = threading.Event()
    with tqdm(total=total, initial=done, desc=title, unit="run", dynamic_ncols=True, smoothing=0.1) as bar:

        def refresh() -> None:
            while not ended.wait(EVERY):
                bar.refresh()

        clock = threading.Thread(target=refresh, daemon=True)
        clock.start()
        try:
            yield bar
        finally:
            ended.set()
            clock.join()
