"""The mixture through every verb, and `tiltune 2d` as a short way through two of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tiltune.launch.verbs import two_d
from tiltune.tasks.metrics import known_truth

SIZES = ["--population-size", "500", "--warm-start-updates", "5", "--updates", "2", "--batch-size", "16"]
SMALL = [*SIZES, "--steps", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A whole `tiltune 2d` on a short chain, made quick by a small recipe; its verdict is not what is tested."""
    out = tmp_path_factory.mktemp("run") / "out"
    options = two_d.Options(chain="brownian", steps=4, out=out)
    small = two_d.recipe(options)
    small = replace(small, train=replace(small.train, population_size=500, warm_start_updates=5, updates=2, batch_size=16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_d, "recipe", lambda _: small)
        patch.setattr(known_truth, "W2_SETS", 10)  # of 40, most of the time
        status = two_d.single(options)
    return out, status


def test_2d_writes_what_it_promises(short_run: tuple[Path, int]) -> None:
    out, status = short_run
    certificate = json.loads((out / "certificate.json").read_text())
    promised = (
        "log_z log_z_true elbo eubo gap gap_reference ess ess_reference w2 w2_exact w2_ratio mode_tv mode_tv_exact"
        " energy_calls certificate_energy_calls seconds verdict reasons"
    )
    assert set(promised.split()) <= set(certificate)
    assert status == {"pass": 0, "fail": 1, "inconclusive": 3}[certificate["verdict"]]
    # A chain without a shipped reference reports its gap and is not judged by it.
    assert certificate["gap_reference"] is None
    assert certificate["flags"][-1] == "no reference at this alpha and number of steps: the gap is reported, not judged"
    # To probe the energy, the population, what is held out, the on-policy half of two batches of 16, and what judges two phases.
    assert certificate["energy_calls"] == 12 + 500 + 125 + 2 * 8 + 2 * 256
    assert certificate["certificate_energy_calls"] == 2 * 40_000  # a pinned start needs no start test
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["energy_calls"] == certificate["energy_calls"] - 256
    assert (out / "picture.png").stat().st_size > 10_000
    said = json.loads((out / "config.json").read_text())
    assert said["train"]["objective"] == "log_variance" and (said["chain"], said["steps"]) == ("brownian", 4)


def test_the_saved_policy_is_a_diffusers_model(short_run: tuple[Path, int]) -> None:
    from tiltune import MLPDenoiser

    out, _ = short_run
    assert (out / "policy" / "diffusion_pytorch_model.safetensors").exists()
    policy = MLPDenoiser.from_pretrained(out / "policy", use_safetensors=True, local_files_only=True)
    assert policy.config.dim == 2


def test_a_run_of_2d_is_evaluated_sampled_and_resumed_as_any_other(
    short_run: tuple[Path, int], tiltune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(known_truth, "W2_SETS", 10)  # as the run was judged
    out = tmp_path / "run"
    shutil.copytree(short_run[0], out)
    first = json.loads((out / "certificate.json").read_text())
    shown = tiltune("evaluate", out, "--size", 1000, "--no-deployment")
    fewer = json.loads((out / "certificate.json").read_text())
    assert shown.status == 3 and any("samples on each side" in reason for reason in fewer["reasons"])  # too few for the truth
    assert fewer["elbo"] != first["elbo"]  # control
    assert tiltune("evaluate", out).status == short_run[1]
    again = json.loads((out / "certificate.json").read_text())
    own = {"seed", "seconds", "train_seconds", "improvement", "objective", "chain", "log_z_trained", "deployed"}
    own.add("certificate_energy_calls")  # those of the deployed samplers are counted too
    assert {name for name in first if again.get(name) != first[name]} <= own
    assert again["judged_by"] == "the task mixture"
    assert tiltune("sample", out, "--n", 50, "--exact", "--out", tmp_path / "exact.safetensors").status == 0
    assert load_file(tmp_path / "exact.safetensors")["samples"].shape == (50, 2)
    before = (out / "metrics.jsonl").read_bytes()
    shown = tiltune("train", "--config", out / "config.yaml", "--out", out, "--resume", "auto")
    assert shown.status == 0 and "finished; nothing was trained" in shown.out, shown.err
    assert (out / "metrics.jsonl").read_bytes() == before
    shown = tiltune("export", out, "--out", tmp_path / "exported")
    assert shown.status == 2 and "put together by hand" in shown.err


def test_train_makes_the_run_that_2d_makes(short_run: tuple[Path, int], tiltune: Callable[..., Any], tmp_path: Path) -> None:
    shown = tiltune("train", "mixture", "--chain", "brownian", *SMALL, "--out", tmp_path / "a")
    assert shown.status == 0, shown.err
    assert shown.out.startswith("brownian, K = 4\n  start ")
    metrics = (short_run[0] / "metrics.jsonl").read_bytes()
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == metrics
    other = tiltune("train", "mixture", "--chain", "flow", *SMALL, "--out", tmp_path / "b")
    assert other.status == 0, other.err
    assert (tmp_path / "b" / "metrics.jsonl").read_bytes() != metrics  # control


def test_an_older_result_is_replaced_when_asked_and_refused_otherwise(tmp_path: Path) -> None:
    for name in two_d.COMPARISON:
        (tmp_path / name).write_text("{}")
    (tmp_path / "notes.txt").write_text("kept")
    options = two_d.Options(out=tmp_path)
    with pytest.raises(ValueError, match="already holds a run"):
        two_d.prepare(options)
    two_d.prepare(replace(options, overwrite=True))
    with pytest.raises(ValueError, match="closed form"):  # after which nothing is touched
        two_d.train(replace(options, alpha=20.0), two_d.recipe(replace(options, alpha=20.0)), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["certificate.json", "notes.txt", "picture.png"]


@pytest.mark.parametrize("compare", [False, True])
def test_a_folder_that_is_no_run_stays_as_it_is_whatever_is_asked_for(compare: bool, tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "mine.txt").write_text("kept")
    (tmp_path / "config.json").write_text("{}")
    options = two_d.Options(out=tmp_path, overwrite=True, compare=compare)
    with pytest.raises(ValueError, match="no run that could be overwritten"):
        (two_d.compare if compare else two_d.single)(options)
    assert (tmp_path / "policy" / "mine.txt").read_text() == "kept" and (tmp_path / "config.json").exists()


def test_a_comparison_at_a_wrong_temperature_leaves_the_run_that_is_there(short_run: tuple[Path, int], tmp_path: Path) -> None:
    shutil.copytree(short_run[0], tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="closed form"):
        two_d.compare(two_d.Options(out=tmp_path / "run", overwrite=True, compare=True, alpha=20.0))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
