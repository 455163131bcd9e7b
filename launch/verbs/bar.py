"""A bar for what takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, name: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; what it gives takes the number just done."""
    from tqdm import tqdm

    with tqdm(total=total, desc=name, dynamic_ncols=True, mininterval=0.5) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance
