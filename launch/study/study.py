"""What a study is, and how one is carried out: runs that are kept one by one, then tables, a figure and the answer.

config.json    the study, its version and its settings: a folder of other ones is refused
runs/NAME.json the rows of one finished run, written at once or not at all
rows.csv       one row a run and measurement          table.csv, table.md   means over the seeds
figure.png, figure.pdf                                answer.md             what it comes to, in numbers and in words
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from ..._version import __version__
from ...finetune.runs.lock import RunLock
from ...finetune.runs.manifest import replace_file
from ...finetune.strict_json import strict_json
from .progress import moving_bar
from .side_by_side import perform_all
from .table import Row, as_csv, as_markdown, averaged

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from matplotlib.figure import Figure

    class Seeded(DataclassInstance, Protocol):
        """Settings of a study that is repeated over seeds."""

        @property
        def seeds(self) -> int: ...


S = TypeVar("S", bound="Seeded")
Size = Literal["quick", "default", "full"]


@dataclass(frozen=True, eq=False)
class Study:
    """Runs, and what is made of their rows.

    settings: all that the numbers depend on, plain values. runs: {name, which is a file's: its settings, which another process
    can be given}, in the order of the rows. perform: does one run; a function of a module. keys: the columns of a row that say
    what it is a measurement of, but for the seed; metrics: {column: how tables write it}, averaged over the seeds. answer,
    figure: made of all rows; the answer in Markdown.
    """

    name: str
    settings: dict[str, Any]
    runs: dict[str, Any]
    perform: Callable[[Any], list[Row]]
    keys: tuple[str, ...]
    metrics: dict[str, str]
    answer: Callable[[list[Row]], str]
    figure: Callable[[list[Row]], Figure]


def named(name: str, size: Size, seeds: int | None) -> Study:
    """The study of this name: its module's ``study_of`` on its ``SIZES``, with other ``seeds`` where they are given.

    Errors: ValueError for fewer than two seeds, which have no interval.
    """
    module = import_module(f".{name}", __package__)
    return module.study_of(with_seeds(module.SIZES[size], seeds))


def with_seeds(settings: S, seeds: int | None) -> S:
    """A study's settings with other ``seeds`` where they are given.

    Errors: ValueError for fewer than two seeds, which have no interval.
    """
    found = settings if seeds is None else replace(settings, seeds=seeds)
    if found.seeds < 2:
        raise ValueError(f"seeds is {found.seeds}; an interval takes 2 at least.")
    return found


def plain(settings: DataclassInstance) -> dict[str, Any]:
    """Settings as JSON gives them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}


def carry_out(study: Study, out: Path, jobs: int) -> str:
    """Do the runs that ``out`` does not hold yet, ``jobs`` side by side, and write what comes of all of them; returns the answer.

    Errors: ValueError, before anything is written, for a folder that is not this study's, and where another process writes it.
    """
    config = strict_json({"study": study.name, "version": __version__, "settings": study.settings}, indent=2) + "\n"
    refuse_foreign(out, config)
    (out / "runs").mkdir(parents=True, exist_ok=True)
    with RunLock(out):
        replace_file(out / "config.json", config)
        left = {name: run for name, run in study.runs.items() if not _file(out, name).exists()}
        with moving_bar(len(study.runs), len(study.runs) - len(left), f"study {study.name}") as bar:
            for name, rows, seconds in perform_all(study.perform, left, jobs):
                replace_file(_file(out, name), strict_json({"seconds": round(seconds, 1), "rows": rows}) + "\n")
                bar.set_postfix_str(name, refresh=False)
                bar.update(1)
        return _report(study, out)


def refuse_foreign(out: Path, config: str) -> None:
    """Errors: ValueError where ``out`` holds anything else than a study of this config."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    file = out / "config.json"
    if not file.is_file():
        raise ValueError(f"{out} holds no study; nothing was touched. Name another folder with --out.")
    try:
        there, here = json.loads(file.read_text()), json.loads(config)
        ours = {name: here[name] for name in ("study", "version")} | here["settings"]
        theirs = {name: there[name] for name in ("study", "version")} | there["settings"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is not one that a study has written; nothing was touched. Name another folder.") from None
    differing = [
        f"{name} is {theirs.get(name)} there and {ours.get(name)} here"
        for name in ours | theirs
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise ValueError(
            f"{out} holds another study: {'; '.join(differing)}. Nothing was touched; name another folder with --out, or give the"
            " settings of that one to go on with it."
        )


def finished(study: Study, out: Path) -> int:
    """How many runs of the study ``out`` holds."""
    return sum(_file(out, name).exists() for name in study.runs)


def _file(out: Path, name: str) -> Path:
    return out / "runs" / f"{name}.json"


def _report(study: Study, out: Path) -> str:
    """Tables, figure and answer from the files of all runs; returns the answer."""
    rows = [row for name in study.runs for row in json.loads(_file(out, name).read_text())["rows"]]
    means = averaged(rows, study.keys, tuple(study.metrics))
    replace_file(out / "rows.csv", as_csv(rows))
    replace_file(out / "table.csv", as_csv(means))
    replace_file(out / "table.md", as_markdown(means, study.keys, study.metrics))
    figure = study.figure(rows)
    for kind in ("png", "pdf"):
        temporary = out / f".figure.{kind}"
        figure.savefig(temporary, dpi=200)
        os.replace(temporary, out / f"figure.{kind}")
    answer = study.answer(rows)
    replace_file(out / "answer.md", answer)
    return answer
