"""Metrics to tensorboard, wandb or trackio, by accelerate's trackers: beside metrics.jsonl, and never in the way of a run."""

from __future__ import annotations

import queue
import threading
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

FOLDER = "tracker"
PATIENCE = 10.0  # seconds for what is still to be sent when a run ends


def refuse_missing(name: str | None) -> None:
    """Errors: ValueError where the package of the tracker ``name`` is not installed; it is not imported."""
    if name is not None and find_spec(name) is None:
        raise ValueError(f"the tracker {name} is not installed; install it with: pip install {name}")


class Tracker:
    """``with Tracker("wandb", folder, config) as tracker: tracker.log(step, record)``.

    A thread of its own makes all calls, since each may wait for a server that is down. Where one fails, or they are not done
    `PATIENCE` seconds after the block, one warning says so, and the tracker is left alone from there on.

    name: of one of accelerate's trackers. folder: the run's; what a tracker writes is in `FOLDER` there. config: plain values, in
    sections. Of several processes, one has a tracker.
    """

    def __init__(self, name: str, folder: Path, config: dict[str, Any]) -> None:
        self.name, self._folder, self._config = name, folder, config
        self._lines: queue.SimpleQueue[tuple[int, dict[str, Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._doing = "start"
        self._failure: str | None = None
        self._warned = False

    def __enter__(self) -> Tracker:
        self._thread.start()
        return self

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Hand over the numbers of a line of metrics.jsonl, as PHASE/NAME."""
        phase = record["phase"]
        numbers = {f"{phase}/{name}": value for name, value in _flat(record).items() if type(value) in (int, float)}
        self._lines.put((step, numbers))
        self._warn_once()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lines.put(None)
        try:
            self._thread.join(PATIENCE)
        except KeyboardInterrupt:  # the run is saved, so this asks for no more than an end to the waiting
            self._failure = self._failure or "the waiting for it was interrupted"
        if self._thread.is_alive():
            self._failure = self._failure or f"it was not done {PATIENCE:g} s after the run"
        self._warn_once()

    def _warn_once(self) -> None:
        """In the run's own thread: warnings of another one would mix with its bars."""
        if self._failure is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"the tracker {self.name} failed to {self._doing}, and the run does without it: {self._failure}.", stacklevel=3
            )

    def _work(self) -> None:
        try:
            self._track()
        except (Exception, SystemExit) as error:  # whatever it is: other people's code, and nothing that the run needs
            self._failure = f"{type(error).__name__}: {str(error).rstrip('.')}"

    def _track(self) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        own = self._folder / FOLDER
        own.mkdir(exist_ok=True)
        # What each is told beyond the name of its project.
        told = {"tensorboard": {"logging_dir": str(self._folder)}, "wandb": {"dir": str(own), "name": self._folder.name}}
        project = FOLDER if self.name == "tensorboard" else "tiltune"
        tracker: Any = LOGGER_TYPE_TO_CLASS[self.name](project, **told.get(self.name, {"name": self._folder.name}))
        tracker.start()
        tracker.store_init_configuration(
            {key: value if type(value) in (bool, int, float, str) else str(value) for key, value in _flat(self._config).items()}
        )
        while (line := self._lines.get()) is not None:
            self._doing = "log"
            tracker.log(line[1], step=line[0])
        self._doing = "finish"
        tracker.finish()


def _flat(values: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Nested dicts as one, with keys like "train/alpha"."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{place}{name}/") if isinstance(value, dict) else {f"{place}{name}": value}
    return found
