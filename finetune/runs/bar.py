"""A progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, title: str, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """On stderr; yields a function that receives the number of items just finished."""
    from tqdm import tqdm

    with tqdm(total=total, desc=title, dynamic_ncols=True, disable=not shown) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance
