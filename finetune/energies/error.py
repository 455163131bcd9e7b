"""What went wrong in an energy: one sentence that names the user's function, and the traceback of the user's own lines.

Imports no torch, since names of energies are read without it.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OURS = tuple(f"{ROOT / folder}{os.sep}" for folder in ("samplers", "finetune", "tasks", "launch"))
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


class EnergyError(ValueError):
    """An energy that returned something other than B finite-or-+inf floats, that raised, or that could not be loaded.

    trace: the lines of the user's code that led to an exception, as Python prints them, and the exception; "" where there was
    none. ``__cause__`` is the exception itself, or a `WorkerTraceback` where it was raised in another process.
    """

    def __init__(self, sentence: str, trace: str = "") -> None:
        super().__init__(sentence)
        self.trace = trace

    def pack(self) -> bytes:
        """The sentence and the traceback, for another process."""
        return json.dumps([str(self), self.trace]).encode()

    @classmethod
    def unpack(cls, packed: bytes) -> EnergyError:
        """What `pack` made, to be raised: its ``__cause__`` shows the traceback, since no exception is sent as a pickle."""
        sentence, trace = json.loads(packed)
        error = cls(sentence, trace)
        error.__cause__ = WorkerTraceback(trace) if trace else None
        return error


class WorkerTraceback(Exception):
    """The traceback of an energy that raised in a worker process, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def energy_name(energy: Any) -> str:
    """What messages call an energy: the user's function, or the class of the object, and its file: ``left of rectangles.py``."""
    while isinstance(energy, functools.partial):
        energy = energy.func
    name = getattr(energy, "__name__", type(energy).__name__)
    if name == "<lambda>":
        name = f"lambda on line {energy.__code__.co_firstlineno}"
    file = _file_of(energy)
    return name if file is None else f"{name} of {file}"


def term_title(label: str, energy: Any) -> str:
    """The same for a term of a sum, by the label under which it is logged."""
    file = _file_of(energy)
    return label if file is None or file in label else f"{label} of {file}"


def user_trace(error: BaseException) -> str:
    """The lines of the user's code that led to ``error``, and its own; "" where only Tiltune's are in its traceback."""
    frames = _frames(error)
    if not frames and not isinstance(error, SyntaxError):
        return ""
    head = "Traceback of the energy (most recent call last):\n"
    return head + "".join(traceback.format_list(frames) + traceback.format_exception_only(error)).rstrip()


def user_line(error: BaseException) -> str:
    """`` on line 7 of mine.py``: the last of these lines, or "" where there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" on line {error.lineno} of {Path(error.filename).name}"
    frames = _frames(error)
    return f" on line {frames[-1].lineno} of {Path(frames[-1].filename).name}" if frames else ""


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The user's in the traceback; the last three of libraries, where it has none of the user's."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
    return [frame for frame in frames if not _is_library(frame.filename)] or frames[-3:]


def _file_of(energy: Any) -> str | None:
    """The name of the file that defines it; None for Tiltune's own adapters, and for what was typed into an interpreter."""
    file = getattr(sys.modules.get(getattr(energy, "__module__", None) or ""), "__file__", None)
    if file is None:  # a module that nobody registered
        file = getattr(getattr(energy, "__code__", None), "co_filename", "")
    return Path(file).name if Path(file).is_file() and not _is_ours(file) else None


def _is_ours(file: str) -> bool:
    return file.startswith(OURS)


def _is_library(file: str) -> bool:
    return file.startswith((*LIBRARIES, "<frozen")) or "site-packages" in file
