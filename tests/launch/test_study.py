"""A tiny study of dimensions, end to end: budgets to the call, interruptions, foreign folders, intervals, the answer."""

from __future__ import annotations

import csv
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.distributed.signals import Preempted
from tiltune.launch.study import dimension, methods, study, training
from tiltune.launch.study.dimension_answer import differences, meaning, trend
from tiltune.launch.study.intervals import interval, slope
from tiltune.launch.study.methods import LABELS, METHODS, OFF_POLICY, ON_POLICY, WEIGHTED
from tiltune.launch.study.problem import measure, problem_of
from tiltune.launch.study.side_by_side import perform_all
from tiltune.samplers.make_policy import make_policy
from tiltune.tasks import tilted_mixture
from tiltune.tasks.plots.curves import new_figure

TINY = dimension.Settings(dims=(1, 3), ess=(0.3,), steps=4, batch_size=200, updates=(4,), samples=200, seeds=2)
REPORT = ("rows.csv", "table.csv", "table.md", "answer.md")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that nothing disturbed."""
    out = tmp_path_factory.mktemp("study") / "whole"
    study.carry_out(dimension.study_of(TINY), out, 1)
    return out


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "rows.csv").open()))


def test_a_study_leaves_rows_tables_a_figure_and_an_answer(whole: Path) -> None:
    rows = rows_of(whole)
    assert len(rows) == 2 * 2 * (1 + len(LABELS))
    assert {row["method"] for row in rows} == {"prior", *LABELS} and {row["dim"] for row in rows} == {"1", "3"}
    for row in rows:
        assert 0 <= float(row["component_tv"]) <= 1
        assert row["ess_share"] == "" if row["method"] == "smc" else 0 < float(row["ess_share"]) < 2
        if row["method"] in WEIGHTED:
            assert row["gap"] == row["gap_left"] == ""  # samples have no law over paths
            continue
        assert float(row["eubo"]) - float(row["elbo"]) == pytest.approx(float(row["gap"]))
        assert float(row["gap_exact"]) < float(row["gap_prior"])
    means = list(csv.DictReader((whole / "table.csv").open()))
    own = [float(row["gap"]) for row in rows if (row["dim"], row["method"]) == ("3", "rtb_prior")]
    [mean] = [row for row in means if (row["dim"], row["method"]) == ("3", "rtb_prior")]
    assert float(mean["gap"]) == pytest.approx(statistics.fmean(own)) and mean["seeds"] == "2"
    assert (whole / "figure.png").read_bytes().startswith(b"\x89PNG") and (whole / "figure.pdf").read_bytes().startswith(b"%PDF")
    assert (whole / "figure.png").stat().st_size > 50_000
    answer = (whole / "answer.md").read_text()
    assert "The gap of all on-policy methods, less that of all off-policy methods:" in answer and "D = 3 less D = 1" in answer
    assert all(f"| {METHODS[name].label} |" in answer for name in ("ppo_kl", "trust_pcl", "ddpo", "recipe"))
    assert "| snis | " in (whole / "table.md").read_text() and "| – |" in (whole / "table.md").read_text()
    assert not [path.name for path in whole.iterdir() if path.name.startswith(".")]


def test_equal_budgets_are_equal_to_the_call(whole: Path) -> None:
    budget = methods.PROBE + 200 * 4
    for row in rows_of(whole):
        calls = int(row["calls"])
        if row["method"] == "prior":
            assert calls == int(row["budget"]) == int(row["network_evaluations"]) == 0
            continue
        assert int(row["budget"]) == budget
        if row["method"] in ("rtb_climbed", "smc"):
            assert 0.5 * budget < calls <= budget
        elif row["method"] == "recipe":  # a warm start that came no closer than the prior is not judged
            assert calls in (budget, budget - methods.JUDGED)
        else:
            assert calls == budget, row["method"]
        assert int(row["network_evaluations"]) > 4 * 200 * (2 if row["method"] in WEIGHTED else 4)


def test_what_is_measured_depends_on_the_method_and_the_seed(whole: Path) -> None:
    rows = rows_of(whole)
    for column in ("gap", "component_tv"):
        known = [row[column] for row in rows if row[column]]
        assert len(set(known)) == len(known)
    assert len({row["log_z"] for row in rows}) == 4


class Stopped(Exception):
    pass


def broken(error: BaseException, after: int) -> Callable[[dimension.Run], list[dict[str, Any]]]:
    """`perform` that breaks off in the run behind so many."""
    left = iter(range(after))

    def perform(run: dimension.Run) -> list[dict[str, Any]]:
        if next(left, None) is None:
            raise error
        return dimension.perform(run)

    return perform


def test_a_study_that_was_stopped_goes_on_and_comes_to_the_same(whole: Path, tmp_path: Path) -> None:
    out, tiny = tmp_path / "stopped", dimension.study_of(TINY)
    tiny = replace(tiny, figure=lambda rows: new_figure(1, 1))  # quicker than its own
    left = [name for name in tiny.runs if name.endswith(("-rtb", "-prior"))][1:5]
    shutil.copytree(whole / "runs", out / "runs")
    shutil.copy(whole / "config.json", out)
    for name in left:
        (out / "runs" / f"{name}.json").unlink()
    kept = {path.name: path.read_bytes() for path in (out / "runs").iterdir()}
    with pytest.raises(KeyboardInterrupt):
        study.carry_out(replace(tiny, perform=broken(KeyboardInterrupt(), 1)), out, 1)
    assert study.finished(tiny, out) == len(kept) + 1 and not (out / "rows.csv").exists()
    study.carry_out(tiny, out, 1)
    for name in REPORT:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert all((out / "runs" / name).read_bytes() == content for name, content in kept.items())
    # A finished one does no run again.
    study.carry_out(replace(tiny, perform=broken(AssertionError(), 0)), out, 1)
    assert (out / "rows.csv").read_bytes() == (whole / "rows.csv").read_bytes()


def test_a_training_that_was_interrupted_is_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run = next(run for run in dimension.study_of(TINY).runs.values() if run.method == "rtb")

    def press(*_: Any) -> dict[str, float]:
        raise Preempted("SIGTERM")

    monkeypatch.setattr(training, "measure", press)
    with pytest.raises(Preempted):  # the trainer itself would keep what is trained
        dimension.perform(run)


def test_other_folders_are_refused_untouched(whole: Path, tmp_path: Path) -> None:
    def refused(out: Path, settings: dimension.Settings, said: str) -> None:
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match=said):
            study.carry_out(dimension.study_of(settings), out, 1)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    refused(whole, replace(TINY, seeds=3), "seeds is 2 there and 3 here")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("kept")
    refused(foreign, TINY, "holds no study")
    (foreign / "config.json").write_text('{"task": "mixture"}')
    refused(foreign, TINY, "is not one that a study has written")
    older = tmp_path / "older"
    older.mkdir()
    config = json.loads((whole / "config.json").read_text())
    (older / "config.json").write_text(json.dumps(config | {"version": "0.1"}))
    refused(older, TINY, "version is 0.1 there")


def test_runs_side_by_side_are_those_of_one_process() -> None:
    runs = {f"run{number}": ({"number": number},) for number in range(4)}
    alone, beside = ({name: rows for name, rows, _ in perform_all(list, runs, jobs)} for jobs in (1, 2))
    assert alone == beside == {f"run{number}": [{"number": number}] for number in range(4)}
    with pytest.raises(ValueError, match="the run bad: invalid literal"):
        list(perform_all(int, {"bad": "rows"}, 1))  # pyright: ignore[reportArgumentType]


def test_intervals_against_a_case_by_hand() -> None:
    """1, 2, 4: mean 7/3, variance 7/3; t of two degrees of freedom at 97.5% is 4.30265."""
    found = interval([1.0, 2.0, 4.0])
    half = 4.30265 * math.sqrt(7 / 3 / 3)
    assert found.mean == pytest.approx(7 / 3)
    assert (found.low, found.high) == pytest.approx((7 / 3 - half, 7 / 3 + half), rel=1e-5)
    assert found.sign == 0 and interval([1.0, 1.1, 1.2]).sign == 1 and interval([-1.0, -1.1, -1.2]).sign == -1
    assert interval([3.0]).low == -math.inf and interval([3.0]).sign == 0
    assert slope([0.0, 1.0, 2.0], [1.0, 3.0, 5.5]) == pytest.approx(2.25)


def planted(by_dim: float, at_two: float, noise: float = 0.0) -> Iterator[dict[str, Any]]:
    """Rows whose on-policy gap is ``at_two`` nats above the off-policy one at D = 2, and ``by_dim`` more for each tenfold D."""
    for seed in range(5):
        for dim in (2, 20, 200):
            for name in METHODS:
                ahead = at_two + by_dim * math.log10(dim / 2) + noise * (-1) ** seed * math.log10(dim / 2)
                gap = 1.0 + 0.01 * seed + (ahead if name in ON_POLICY else 0.0)
                yield {"method": name, "dim": dim, "seed": seed, "budget": 9, "gap": gap, "gap_left": gap}


def test_a_planted_trend_is_found_and_none_where_there_is_none() -> None:
    on, off = tuple(ON_POLICY), tuple(OFF_POLICY)
    rows = list(planted(-0.7, -0.1))
    found = trend(rows, on, off)
    assert found.slope.mean == pytest.approx(-0.7) and found.change.mean == pytest.approx(-1.4) and found.widens
    assert "widens with the dimension, in favor of on-policy" in meaning(found, (2, 200))
    assert differences(rows, on, off)[200] == pytest.approx([-1.5] * 5)
    assert "in favor of off-policy" in meaning(trend(list(planted(0.7, 0.1)), on, off), (2, 200))
    narrowing = trend(list(planted(-0.7, 2.0)), on, off)
    assert not narrowing.widens and "narrows" in meaning(narrowing, (2, 200))
    nothing = trend(list(planted(0.1, 0.5, noise=1.0)), on, off)
    assert nothing.slope.sign == 0 and "holds zero" in meaning(nothing, (2, 200))


def test_the_exact_denoiser_measures_as_such_and_the_prior_as_where_all_begins() -> None:
    problem = problem_of(3, 0.3, 0, 30, 1000)
    reference = tilted_mixture.reference(tilted_mixture.PriorConfig(steps=30, dim=3), problem.energy, 1.0)
    assert reference is not None
    exact, prior = measure(problem, reference), measure(problem, make_policy(problem.prior))
    assert exact["gap"] == pytest.approx(problem.gap_exact, abs=0.05) and exact["ess_share"] == pytest.approx(1, abs=0.05)
    assert exact["component_tv"] < 0.05 < prior["component_tv"]
    assert prior["gap"] == pytest.approx(problem.gap_prior, rel=0.15) and prior["gap"] > 4 * exact["gap"]
    assert prior["ess_share"] == pytest.approx(0.3, abs=0.08)


def test_the_compared_methods_differ_in_nothing_but_what_they_are_compared_in() -> None:
    problem = problem_of(1, 0.3, 0, 6, 200)
    compared = {name: methods.train_config(METHODS[name], problem, 4, 200) for name in ON_POLICY | OFF_POLICY}
    for config in compared.values():
        same = TrainConfig(behavior=None, objective="rtb")
        cleared = replace(config, behavior=None, objective="rtb", population="auto", population_size=same.population_size)
        assert cleared == replace(compared["rtb"], behavior=None, population="auto", population_size=same.population_size)
        assert config.warm_start == "none" and config.tempering_ess is None
    with pytest.raises(ValueError, match="take one call more"):
        methods.importance_size(804)


def test_the_verb_refuses_what_is_no_study(tiltune: Callable[..., Any], tmp_path: Path) -> None:
    shown = tiltune("study", "--help")
    assert shown.status == 0 and "example: tiltune study dimension" in shown.out
    for arguments, said in (
        (["alchemy"], "dimension"),
        (["dimension", "--quick", "--full"], "two sizes"),
        (["dimension", "--seeds", "1"], "takes 2 at least"),
        (["dimension", "--jobs", "0"], "at least one training"),
    ):
        shown = tiltune("study", *arguments, "--out", tmp_path / "study")
        assert shown.status == 2 and said in shown.err + shown.out, arguments
    assert not list(tmp_path.iterdir())


def test_the_verb_goes_on_after_ctrl_c(tiltune: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, status in ((KeyboardInterrupt(), 130), (Preempted("SIGTERM"), 75)):
        tiny = replace(dimension.study_of(TINY), perform=broken(error, 1))
        monkeypatch.setattr(study, "named", lambda name, size, seeds, tiny=tiny: tiny)
        shown = tiltune("study", "dimension", "--jobs", "1", "--out", tmp_path / "study")
        assert shown.status == status and "runs are kept" in shown.err
    assert len(list((tmp_path / "study" / "runs").iterdir())) == 2
    monkeypatch.setattr(study, "named", lambda name, size, seeds: replace(tiny, perform=broken(Preempted("SIGTERM"), 0)))
    assert tiltune("study", "dimension", "--jobs", "1", "--out", tmp_path / "study").status == 76
