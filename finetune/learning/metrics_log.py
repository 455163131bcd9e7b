"""The metrics of a training: one JSON object a line, the bar, and whoever else wants them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..strict_json import strict_json

SHOWN = ("elbo", "eubo", "ess", "log_z", "alpha", "kl_to_prior")  # on the bar


class MetricsLog:
    """history: the lines so far. No clock is in them: the same config gives the same lines, to the last bit.

    file: receives them, or None. on_record: is given each of them with the number of steps before it. writes: whether this is
    the process that does so; bars are shown where ``progress`` wants them too.
    """

    def __init__(
        self, file: Path | None, on_record: Callable[[int, dict[str, Any]], None] | None, *, writes: bool, progress: bool
    ) -> None:
        self.history: list[dict[str, Any]] = []
        self._file, self._on_record, self._writes, self._progress = file, on_record, writes, progress

    def bar(self, total: int | None, name: str) -> Any:
        """A tqdm bar; without a total where nobody knows it."""
        from tqdm import tqdm

        quiet = not (self._progress and self._writes)
        return tqdm(total=total, desc=name, disable=quiet, dynamic_ncols=True, mininterval=0.5)

    def record(self, bar: Any, global_step: int, line: dict[str, Any]) -> None:
        self.history.append(line)
        shown = {key: f"{line[key]:.3g}" for key in SHOWN if key in line}
        bar.set_postfix(**shown, energy_calls=line["energy_calls"], refresh=False)
        if self._file is not None and self._writes:
            with self._file.open("a") as file:
                file.write(strict_json(line) + "\n")
        if self._on_record is not None and self._writes:
            self._on_record(global_step, line)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]
