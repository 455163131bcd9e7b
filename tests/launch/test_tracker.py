"""`--tracker`: metrics for others to look at, and nothing that goes wrong there reaches the run."""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking

from tiltune.finetune.config.prior import PriorConfig
from tiltune.finetune.config.run import RunConfig
from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.runs import tracker as trackers
from tiltune.finetune.runs.train import train

CALLS = ("__init__", "start", "store_init_configuration", "log", "finish")


class Fake:
    """A tracker as accelerate has them, which remembers what it was told; ``breaks`` raises in the call of that name."""

    def __init__(self, project: str, **options: Any) -> None:
        self.heard: list[tuple[int | None, dict[str, Any]]] = []
        self.config: dict[str, Any] = {}
        self.finished = False
        self.options = {"project": project, **options}
        made.append(self)
        self.call("__init__")

    def call(self, name: str) -> None:
        assert threading.current_thread() is not threading.main_thread()
        if action := breaks.get(name):
            action()

    def start(self) -> None:
        self.call("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.call("store_init_configuration")
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.call("log")
        self.heard.append((step, values))

    def finish(self) -> None:
        self.call("finish")
        self.finished = True


made: list[Fake] = []
breaks: dict[str, Callable[[], Any]] = {}


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    made.clear()
    breaks.clear()


@pytest.fixture(scope="module")
def config(prior: Path) -> RunConfig:
    sizes = TrainConfig(
        population_size=8, warm_start_updates=2, warm_start_rows=4, updates=3, batch_size=4, monitor_every=1, checkpoint_every=1
    )
    return RunConfig(prior=PriorConfig(str(prior), steps=3), train=sizes, device="cpu", tracker="wandb")


def ink(x: Any) -> Any:
    return x.flatten(1).mean(1)


def metrics(folder: Path) -> bytes:
    return (folder / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def plain(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The metrics of the same run without a tracker."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(replace(config, tracker=None), folder, energy=ink, progress=False)
    return metrics(folder)


def refuse() -> None:
    raise ConnectionError("the server is down.")


def test_a_tracker_hears_every_line_and_the_config(config: RunConfig, plain: bytes, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(config, tmp_path / "run", energy=ink, progress=False)
    assert metrics(tmp_path / "run") == plain
    (fake,) = made
    lines = [json.loads(line) for line in metrics(tmp_path / "run").splitlines()]
    assert [step for step, _ in fake.heard] == [0, 1, 2, 3, 4][-len(lines) :] and fake.finished
    for line, (_, values) in zip(lines, fake.heard, strict=True):
        assert values[f"{line['phase']}/loss"] == line["loss"] and all(type(value) in (int, float) for value in values.values())
    assert fake.config["train/batch_size"] == 4 and fake.config["train/behavior"] == "None"
    assert fake.options == {"project": "tiltune", "dir": str(tmp_path / "run" / "tracker"), "name": "run"}


@pytest.mark.parametrize("call", CALLS)
def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(
    call: str, config: RunConfig, plain: bytes, tmp_path: Path
) -> None:
    breaks[call] = refuse
    with pytest.warns(UserWarning, match="the tracker wandb failed") as said:
        ended = train(config, tmp_path / "run", energy=ink, progress=False)
    (warning,) = [str(one.message) for one in said if "tracker" in str(one.message)]
    doing = call if call in ("log", "finish") else "start"
    assert warning == (f"the tracker wandb failed to {doing}, and the run does without it: ConnectionError: the server is down.")
    assert ended.record["updates"] == 3 and ended.record["stopped"] is None and not ended.record["interrupted"]
    assert metrics(tmp_path / "run") == plain


@pytest.mark.parametrize("call", ["start", "finish"])
def test_a_tracker_that_hangs_is_left_behind(call: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    over = threading.Event()
    breaks[call] = over.wait
    monkeypatch.setattr(trackers, "PATIENCE", 0.3)
    started = time.monotonic()
    with (
        pytest.warns(UserWarning, match=f"failed to {call}.*not done 0.3 s after"),
        trackers.Tracker("wandb", tmp_path, {}) as it,
    ):
        it.log(0, {"phase": "tlm", "loss": 1.0})
    over.set()
    assert time.monotonic() - started < 5


def test_a_missing_package_is_said_before_any_work(
    tiltune: Callable[..., Any], small: list[Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    shown = tiltune("train", *small, "--energy", "my_energy.py:ink", "--tracker", "trackio", "--out", "run")
    assert (shown.status, len(shown.err.splitlines())) == (2, 1)
    assert "pip install trackio" in shown.err
    assert not (here / "run").exists()
    assert tiltune("train", *small, "--energy", "my_energy.py:ink", "--tracker", "paper", "--out", "run").status == 2


def test_a_run_is_resumed_with_another_tracker_or_none(config: RunConfig, tmp_path: Path) -> None:
    calls: list[int] = []

    def stuck(x: Any) -> Any:
        calls.append(len(x))
        if len(calls) == 7:
            raise RuntimeError("the scorer is gone")
        return ink(x)

    with pytest.raises(ValueError, match="the scorer is gone"):
        train(config, tmp_path / "run", energy=stuck, progress=False)
    train(replace(config, tracker=None), tmp_path / "run", energy=ink, resume="auto", progress=False)
    train(config, tmp_path / "whole", energy=ink, progress=False)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert [fake.finished for fake in made] == [True, True]
