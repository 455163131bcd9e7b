"""A progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def counting_bar(total: int | None, title: str, shown: bool = True) -> Any:
    """A tqdm bar on stderr, of whoever moves it; without a total where nobody knows it."""
    from tqdm import tqdm

    return tqdm(total=total, desc=title, dynamic_ncols=True, disable=not shown)


@contextmanager
def progress_bar(total: int, title: str, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """On stderr; yields a function that receives the number of items just finished."""
    with counting_bar(total, title, shown) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance
