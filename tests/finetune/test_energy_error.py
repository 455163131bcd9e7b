"""A failing energy: the user's own lines, from wherever it ran; the exception as the cause; the user's name for it."""

from __future__ import annotations

import functools
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tiltune.finetune.energies.cache import CachedEnergy
from tiltune.finetune.energies.energy import EnergyMeter, from_reward
from tiltune.finetune.energies.error import EnergyError, WorkerTraceback, energy_name
from tiltune.finetune.energies.likelihoods import from_classifier
from tiltune.finetune.energies.names import combine, load_energy
from tiltune.finetune.energies.weighted_sum import WeightedSum
from tiltune.finetune.energies.workers.pool import EnergyPool

X = torch.zeros(4, 3)
FILE = """
import torch
table = {}

def look_up(x):
    return table["weights"] * x.sum(1)

def left(x):
    return look_up(x)

def fine(x):
    return x.sum(1)

def near(level):
    return lambda x: x @ torch.ones(level)

def leaves(x):
    raise SystemExit(3)

class Scorer:
    def __call__(self, x):
        raise ValueError("first line\\nsecond line")

scorer = Scorer()

def invalid(x):
    return x.sum(1) * float("nan")

def graph(x):
    return x @ torch.ones(3, requires_grad=True)
"""
LINES = [
    "line 9, in left",
    "return look_up(x)",
    "line 6, in look_up",
    'return table["weights"] * x.sum(1)',
    "KeyError: 'weights'",
]


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(FILE)
    return str(tmp_path / "mine.py")


def failure(energy: Any) -> EnergyError:
    with pytest.raises(EnergyError) as caught:
        EnergyMeter(energy)(X)
    return caught.value


@pytest.mark.parametrize(
    "make",
    [
        lambda file: load_energy(f"{file}:left"),
        lambda file: combine([f"{file}:fine", f"2*{file}:left"]),
        lambda file: CachedEnergy(combine([f"{file}:left"])),
        lambda file: EnergyPool(load_energy(f"{file}:left"), 2),
        lambda file: CachedEnergy(EnergyPool(combine([f"{file}:fine", f"{file}:left"]), 1)),
    ],
    ids=["itself", "sum", "cache", "threads", "cached threads of a sum"],
)
def test_the_users_lines_and_nothing_else_are_shown_and_the_cause_is_kept(make: Any, file: str) -> None:
    error = failure(make(file))
    assert str(error).startswith("energy left of mine.py raised KeyError on line 6 of mine.py: 'weights' (input: (")
    for line in LINES:
        assert line in error.trace
    assert error.trace.count("  File ") == 2 and "energy.py" not in error.trace.replace(file, "")
    assert isinstance(error.__cause__, KeyError)
    frames = traceback.extract_tb(error.__cause__.__traceback__)
    assert [(frame.filename, frame.lineno) for frame in frames][-2:] == [(file, 9), (file, 6)]


def test_a_worker_process_sends_the_lines(file: str) -> None:
    with EnergyPool([f"{file}:fine", f"2*{file}:left"], 2) as pool:
        error = failure(CachedEnergy(pool))
    assert str(error).startswith("energy left of mine.py raised KeyError on line 6 of mine.py: 'weights'")
    assert all(line in error.trace for line in LINES) and error.trace.count("  File ") == 2
    assert isinstance(error.__cause__, WorkerTraceback)
    assert all(line in "".join(traceback.format_exception(error)) for line in LINES)  # what Python shows, uncaught


def test_a_worker_that_cannot_load_the_energy_says_where(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import math\n\n\nlog = math.log(0)\n")
    with pytest.raises(EnergyError, match=r"raised ValueError on line 4 of broken.py") as alone:
        load_energy(f"{tmp_path}/broken.py:log")
    with pytest.raises(EnergyError, match=r"raised ValueError on line 4 of broken.py") as worker:
        EnergyPool([f"{tmp_path}/broken.py:log"], 1).open()
    for error in (alone.value, worker.value):
        assert "log = math.log(0)" in error.trace and "ValueError: math domain error" in error.trace
    assert isinstance(alone.value.__cause__, ValueError)


def test_an_exit_in_an_energy_is_no_verdict(file: str) -> None:
    error = failure(load_energy(f"{file}:leaves"))
    assert "energy leaves of mine.py raised SystemExit on line 18 of mine.py: 3" in str(error)
    with EnergyPool([f"{file}:leaves"], 1) as pool:
        assert "raised SystemExit on line 18" in str(failure(pool))


def test_a_sentence_stays_one_line_and_the_traceback_keeps_them(file: str) -> None:
    error = failure(load_energy(f"{file}:scorer"))
    assert "energy Scorer of mine.py raised ValueError on line 22 of mine.py: first line second line (" in str(error)
    assert "ValueError: first line\nsecond line" in error.trace


def test_where_a_library_raises_the_users_call_is_shown(file: str) -> None:
    error = failure(combine([f"{file}:near(2)"]))
    assert str(error).startswith("energy near(2) of mine.py raised RuntimeError on line 15 of mine.py")
    assert error.trace.count("  File ") == 1
    within = failure(from_classifier(nn.Sequential(nn.Linear(5, 2)), 0))  # no line of the user's: the library's last ones
    assert 1 <= within.trace.count("  File ") <= 3 and "linear.py" in within.trace


def test_what_tiltune_says_of_an_answer_has_no_traceback() -> None:
    assert failure(from_reward(lambda images, prompts, metadata: [1.0], images="raw")).trace == ""
    assert failure(lambda x: 3.0).trace == ""


@pytest.mark.parametrize("kind", ["invalid", "graph"])
def test_no_message_names_a_wrapper(kind: str, file: str) -> None:
    makes = [combine([f"{file}:{kind}"]), CachedEnergy(combine([f"{file}:{kind}"])), EnergyPool([f"{file}:{kind}"], 1)]
    for energy in (*makes, functools.partial(load_energy(f"{file}:{kind}"))):
        with pytest.raises(EnergyError, match=rf"^energy {kind} of mine.py returned"):
            EnergyMeter(energy, max_invalid=0.0)(X)
        if isinstance(energy, EnergyPool):
            energy.close()
    both = WeightedSum({"a": (1.0, load_energy(f"{file}:fine")), "b": (1.0, load_energy(f"{file}:invalid"))})
    with pytest.raises(EnergyError, match=r"^energy a of mine.py \+ b of mine.py returned NaN"):
        EnergyMeter(both, max_invalid=0.0)(X)


def test_names() -> None:
    def own(x: Tensor) -> Tensor:
        return x

    class Scorer:
        def score(self, x: Tensor) -> Tensor:
            return x

    here = "of test_energy_error.py"
    assert energy_name(own) == f"own {here}"
    assert energy_name(torch.no_grad()(own)) == f"own {here}"
    assert energy_name(functools.partial(functools.partial(own))) == f"own {here}"
    assert energy_name(Scorer().score) == f"score {here}"
    assert energy_name(Scorer()) == f"Scorer {here}"
    assert energy_name(from_reward(own)) == f"from_reward(own {here})"
    assert energy_name(CachedEnergy(own)) == f"own {here}"
    unregistered: dict[str, Any] = {"__name__": "nowhere"}
    exec(compile("def own(x): ...", __file__, "exec"), unregistered)
    assert energy_name(unregistered["own"]) == f"own {here}"
    assert energy_name(eval("lambda x: x", {"__name__": "typed"})) == "lambda on line 1"


ANSWERS: list[tuple[Any, str]] = [
    ([0.0] * 4, r"a list of 4, .*return torch\.as_tensor\(values, dtype=x\.dtype, device=x\.device\)\.$"),
    ((0.0,) * 4, r"a tuple of 4, .*return torch\.as_tensor\(values,"),
    ([torch.zeros(())] * 4, r"a list of 4, .*return torch\.stack\(\[one\.reshape\(\(\)\) for one in values\]\)"),
    ([torch.zeros(2)] * 4, r"a list of 4, .*reduce each entry to one number"),
    ([0.0] * 3, r"a list of 3, .*compute one number a sample"),
    (np.zeros(4), r"a numpy array of shape \(4,\), .*return torch\.as_tensor\(values,"),
    (np.zeros((4, 1)), r"a numpy array of shape \(4, 1\), .*torch\.as_tensor\(values\[:, 0\]"),
    (np.float32(1), r"a float32, .*x\.flatten\(1\)\.mean\(1\), without \.item\(\)"),
    (1, r"a int, .*x\.flatten\(1\)\.mean\(1\)"),
    (None, r"returned None, .*its last line should return the energies"),
    ({"clip": 1}, r"a dict, .*return one of its entries \(clip\)"),
    (([0.0] * 4, {}), r"a tuple of 2, .*from_reward\(reward, images=\.\.\.\)"),
    (torch.zeros(()), r"shape \(\) for 4 samples.*one number for the whole batch does not do: .*x\.flatten\(1\)\.mean\(1\)"),
    (torch.zeros(4, 1), r"shape \(4, 1\) .*return values\.squeeze\(1\)"),
    (torch.zeros(1, 4), r"shape \(1, 4\) .*return values\.squeeze\(0\)"),
    (torch.zeros(4, 1, 1, 1), r"return values\.flatten\(\)"),
    (torch.zeros(4, 3, 8, 8), r"several numbers there: .*values\.flatten\(1\)\.sum\(1\)"),
    (torch.zeros(3), r"shape \(3,\) .*leave no sample out"),
    (torch.zeros(2, 3), r"the first dimension is that of the samples"),
    (torch.zeros(4, dtype=torch.long), r"torch\.int64.*return values\.to\(x\.dtype\)"),
    (torch.zeros(4, dtype=torch.bool), r"torch\.bool.*return values\.to\(x\.dtype\)"),
    (torch.zeros(4, dtype=torch.complex64), r"complex numbers have no order"),
    (torch.zeros(4, requires_grad=True), r"requires grad.*@torch\.no_grad\(\) or return value\.detach\(\)"),
]


@pytest.mark.parametrize(("answer", "message"), ANSWERS, ids=range(len(ANSWERS)))
def test_what_is_no_answer_is_met_with_what_to_write(answer: Any, message: str) -> None:
    said = str(failure(lambda x: answer))
    with pytest.raises(EnergyError, match=message):
        raise EnergyError(said)
    assert "\n" not in said and said.endswith(".")


@pytest.mark.parametrize(
    "written",
    [
        "torch.as_tensor(values, dtype=x.dtype, device=x.device)",
        "torch.as_tensor(np.array(values)[:, None][:, 0], dtype=x.dtype, device=x.device)",
        "torch.stack([one.reshape(()) for one in map(torch.tensor, values)])",
        "torch.tensor(values)[:, None].squeeze(1)",
        "torch.tensor([True, False] * 2).to(x.dtype)",
        "x.flatten(1).mean(1)",
        "torch.ones(4, requires_grad=True).detach()",
    ],
)
def test_what_is_proposed_is_an_answer(written: str) -> None:
    EnergyMeter(lambda x: eval(written, {"x": x, "values": [1.0, 2.0, 3.0, 4.0], "torch": torch, "np": np}))(X)
