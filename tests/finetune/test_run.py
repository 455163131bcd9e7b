"""A run as a folder: what it holds, that it opens again, and that neither an error nor Ctrl-C costs anything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tiltune.finetune import evaluation
from tiltune.finetune import run as runs
from tiltune.finetune.certificate import Criterion
from tiltune.finetune.config import EnergyConfig, PolicyConfig, PriorConfig, RunConfig, TrainConfig
from tiltune.finetune.config_file import from_mapping, read_yaml
from tiltune.finetune.run_folder import ASIDE

ENERGY = """
import torch

def ink(x):
    return x.flatten(1).mean(1)

def nothing(x):
    return torch.zeros(len(x))
"""


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline, made and saved by plain diffusers."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    folder = tmp_path_factory.mktemp("prior") / "pipeline"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        unet = UNet2DModel(4, 1, 1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4, **blocks)
        DDPMPipeline(unet, DDPMScheduler(clip_sample=False, variance_type="fixed_large")).save_pretrained(folder)
    return folder


@pytest.fixture
def config(prior: Path, tmp_path: Path) -> RunConfig:
    (tmp_path / "my_energy.py").write_text(ENERGY)
    train = TrainConfig(behavior={"on_policy": 1.0}, warm_start="none", updates=2, batch_size=4, learning_rate=1e-5)
    return RunConfig(
        prior=PriorConfig(str(prior), steps=3),
        energy=EnergyConfig((f"{tmp_path}/my_energy.py:ink",)),
        train=train,
        device="cpu",
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Breaking:
    """Ink, until the given call, which raises."""

    def __init__(self, call: int, error: BaseException) -> None:
        self.left, self.error = call, error

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return x.flatten(1).mean(1)


def test_a_run_holds_what_it_is_made_of_and_opens_again(config: RunConfig, tmp_path: Path, capsys: Any) -> None:
    torch.set_num_threads(2)
    try:
        run = runs.train(config, tmp_path / "run", progress=True)
        assert torch.get_num_threads() == 2  # the run's own number was its own affair
    finally:
        torch.set_num_threads(1)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[:3]] == ["prior", "chain", "condition"]
    assert any("start" in line for line in printed[3:])
    assert set(contents(run.folder)) == {
        "config.yaml",
        "metrics.jsonl",
        "run.json",
        "policy/config.json",
        "policy/diffusion_pytorch_model.safetensors",
        "policy/policy.json",
    }
    assert from_mapping(read_yaml(run.folder / "config.yaml"), RunConfig(), "") == config
    assert (run.record["updates"], run.record["interrupted"], run.record["stopped"]) == (2, False, None)
    assert run.record["energy_calls"] == 4 + 2 * 4  # the probe, then two batches
    assert run.record["decisions"] == printed[:3]
    assert len(run.history) == 2

    again = runs.open_run(run.folder)
    assert again.config == run.config
    assert again.record == json.loads((run.folder / "run.json").read_text())
    torch.testing.assert_close(again.policy.sample(3, seed=1), run.policy.sample(3, seed=1), rtol=0, atol=0)
    untrained = runs.train(replace(config, train=replace(config.train, updates=0)), tmp_path / "prior", progress=False)
    assert not torch.equal(again.policy.sample(3, seed=1), untrained.policy.sample(3, seed=1))


def test_metrics_hold_nothing_that_another_run_would_not_repeat(config: RunConfig, tmp_path: Path) -> None:
    for kind in ("full", "lora"):
        one, two = (
            runs.train(replace(config, policy=PolicyConfig(kind, rank=2)), tmp_path / f"{kind}{n}", progress=False) for n in "12"
        )
        assert contents(one.folder / "policy") == contents(two.folder / "policy")
        assert contents(one.folder)["metrics.jsonl"] == contents(two.folder)["metrics.jsonl"]
    other = replace(config, train=replace(config.train, seed=1))
    assert (
        contents(runs.train(other, tmp_path / "3", progress=False).folder)["metrics.jsonl"]
        != contents(tmp_path / "full1")["metrics.jsonl"]
    )


def test_an_interrupted_run_is_a_run(config: RunConfig, tmp_path: Path) -> None:
    energy = Breaking(2, KeyboardInterrupt())  # the probe and one update
    run = runs.train(config, tmp_path / "run", energy=energy, progress=False)
    assert run.record["interrupted"] is True
    assert run.record["updates"] == 1
    opened = runs.open_run(run.folder)
    torch.testing.assert_close(opened.policy.sample(2), run.policy.sample(2), rtol=0, atol=0)
    figures, _ = evaluation.certify(opened, lambda x: x.flatten(1).mean(1), size=100, progress=False)
    assert any("interrupted" in flag for flag in figures["flags"])


def test_an_error_in_the_middle_keeps_what_was_trained(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="out of memory"):
        runs.train(config, tmp_path / "run", energy=Breaking(2, RuntimeError("out of memory")), progress=False)
    opened = runs.open_run(tmp_path / "run")
    assert opened.record["updates"] == 1
    assert "out of memory" in opened.record["stopped"]
    assert opened.policy.sample(2).isfinite().all()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")], ids=["interrupt", "error"])
def test_what_breaks_before_the_first_update_leaves_nothing_and_takes_nothing(
    config: RunConfig, tmp_path: Path, error: BaseException
) -> None:
    out = tmp_path / "runs" / "deep" / "run"
    with pytest.raises((KeyboardInterrupt, ValueError)):
        runs.train(config, out, energy=Breaking(0, error), progress=False)
    assert not (tmp_path / "runs").exists()

    runs.train(config, out, progress=False)
    (out / "certificate.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises((KeyboardInterrupt, ValueError)):
        runs.train(config, out, energy=Breaking(0, error), overwrite=True, progress=False)
    assert contents(out) == before
    assert not (out / ASIDE).exists()


def test_a_run_is_only_replaced_on_request_and_then_whole(config: RunConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    runs.train(config, out, progress=False)
    (out / "certificate.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(ValueError, match=r"already holds a run .*nothing was touched"):
        runs.train(config, out, progress=False)
    assert contents(out) == before
    runs.train(replace(config, train=replace(config.train, seed=1)), out, overwrite=True, progress=False)
    after = contents(out)
    assert "certificate.json" not in after  # it belonged to the run that is gone
    assert after["notes.txt"] == b"mine"
    assert after["metrics.jsonl"] != before["metrics.jsonl"]
    with pytest.raises(ValueError, match="is a file"):
        runs.train(config, out / "notes.txt", overwrite=True, progress=False)


def test_what_is_missing_is_said_before_any_work(config: RunConfig, tmp_path: Path) -> None:
    cases = [
        (replace(config, prior=PriorConfig()), "nothing says what to fine-tune"),
        (replace(config, energy=EnergyConfig()), "nothing says what to minimize"),
        (replace(config, energy=EnergyConfig(("ink",))), "names no file, and without a task"),
        (replace(config, energy=EnergyConfig(("a b",))), "cannot be read"),
        (replace(config, prior=PriorConfig(), task="digits"), "is of the task 'digits', but None is given"),
    ]
    for wrong, says in cases:
        with pytest.raises(ValueError, match=says):
            runs.train(wrong, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="is of the task None, but 'toy' is given"):
        runs.train(config, tmp_path / "run", task=SimpleNamespace(name="toy"), progress=False)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "run").exists()


def test_a_bank_that_does_not_fit_is_refused(config: RunConfig, tmp_path: Path) -> None:
    huge = replace(config.train, bank_size=10**12)
    needed = replace(config, train=replace(huge, behavior=None))
    with pytest.raises(ValueError, match=r"bank of 1,000,000,000,000 prior trajectories of 4 states takes 238,\d{3}\.\d GB"):
        runs.train(needed, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    runs.train(replace(config, train=huge), tmp_path / "run", progress=False)  # control: nothing needs it


def test_folders_that_hold_no_finished_run(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no run in"):
        runs.open_run(tmp_path / "nowhere")
    run = runs.train(config, tmp_path / "run", progress=False)
    text = (run.folder / "run.json").read_text()
    (run.folder / "run.json").write_text(text[:-20])
    with pytest.raises(ValueError, match=r"run.json is not JSON"):
        runs.open_run(run.folder)
    (run.folder / "run.json").unlink()
    with pytest.raises(ValueError, match="still training, or its process was killed"):
        runs.open_run(run.folder)
    (run.folder / "run.json").write_text(text)
    (run.folder / "config.yaml").write_text("train: {alpha: x}")
    with pytest.raises(ValueError, match=r"config.yaml: train.alpha is 'x'"):
        runs.open_run(run.folder)


@pytest.mark.parametrize(
    "term", ["{evil}:energy", "evil:energy", "tiltune.tasks.py:energy", "tiltune.tasks.mixture:import_module"]
)
def test_no_code_runs_because_a_folder_names_it(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    run = runs.train(config, tmp_path / "run", progress=False)
    mark, evil = tmp_path / "mark", tmp_path / "evil.py"
    evil.write_text(f"open({str(mark)!r}, 'w').close()\ndef energy(x):\n    return x.flatten(1).mean(1)\n")
    (tmp_path / "tiltune.tasks.py").write_text(evil.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    term = term.format(evil=evil)
    stored = run.folder / "config.yaml"
    stored.write_text(stored.read_text().replace(config.energy.terms[0], term))
    opened = runs.open_run(run.folder)
    assert opened.config.energy.terms == (term,)
    for act in (opened.energy, lambda: evaluation.certify(opened, size=100, progress=False)):
        with pytest.raises(ValueError, match="no code is run because a folder names it, so say it again: --energy"):
            act()
    assert not mark.exists()
    if "evil" in term:
        opened.energy([term])  # control: typed by a user, it is
        assert mark.exists()


def test_a_run_with_a_function_from_python_asks_for_it_again(config: RunConfig, tmp_path: Path) -> None:
    energy = Breaking(100, ValueError())
    run = runs.train(replace(config, energy=EnergyConfig(("not.used:here",))), tmp_path / "run", energy=energy, progress=False)
    assert run.record["energy"] is None
    assert runs.read_config(run.folder).energy.terms == ()
    with pytest.raises(ValueError, match=r"trained with a function of its own.*energy="):
        evaluation.certify(runs.open_run(run.folder), size=100, progress=False)


# --- the certificate -------------------------------------------------------------------------------------------------


def certified(config: RunConfig, out: Path, energy: Any, size: int, task: Any = None) -> dict[str, Any]:
    """The certificate of the untouched prior, for a given energy."""
    untouched = replace(config, train=replace(config.train, updates=0))
    run = runs.train(untouched, out, energy=energy, task=task, progress=False)
    figures, _ = evaluation.certify(run, energy, size=size, progress=False)
    evaluation.write_certificate(run, figures)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((out / "certificate.json").read_text(), parse_constant=refuse)


def test_the_three_verdicts(config: RunConfig, tmp_path: Path) -> None:
    # The prior is its own tilted law where the energy is flat, is not where it is steep, and too few rollouts show neither.
    flat = certified(config, tmp_path / "flat", lambda x: torch.zeros(len(x)), 1000)
    steep = certified(config, tmp_path / "steep", lambda x: 2 * (x.flatten(1).mean(1) > 0).float(), 1000)
    few = certified(config, tmp_path / "few", lambda x: 2 * (x.flatten(1).mean(1) > 0).float(), 100)
    assert [(one["verdict"], one["exit_status"]) for one in (flat, steep, few)] == [("pass", 0), ("fail", 1), ("inconclusive", 3)]
    assert flat["gap"] == pytest.approx(0, abs=1e-6)
    assert steep["gap"] > 0.3
    assert [row["sampler"] for row in flat["deployed"]][:2] == ["weighted prior", "trained chain"]
    assert len(flat["deployed"]) > 4
    # Both sides, 128 starts of 8 rollouts, and each deployed sampler.
    assert flat["certificate_energy_calls"] == 2 * 1000 + 128 * 8 + (len(flat["deployed"]) - 2) * 1000
    assert (flat["size"], flat["steps"], flat["alpha"], flat["energy_calls"]) == (1000, 3, 1.0, 4)


def test_a_certificate_repeats_and_another_seed_changes_it(config: RunConfig, tmp_path: Path) -> None:
    run = runs.train(config, tmp_path / "run", progress=False)
    energy = run.energy([f"{tmp_path}/my_energy.py:ink"])
    one, two = (evaluation.certify(run, energy, size=100, progress=False)[0] for _ in range(2))
    assert one == two
    assert evaluation.certify(run, energy, size=100, seed=1, progress=False)[0]["elbo"] != one["elbo"]
    with pytest.raises(ValueError, match="fewer than 100 rollouts"):
        evaluation.certify(run, energy, size=10, progress=False)


def test_a_task_judges_by_its_own_criteria(config: RunConfig, tmp_path: Path) -> None:
    from tiltune.samplers.pretrained import load_prior

    def flat(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x))

    def figures(evidence: Any, energy: Any, generator: Any) -> dict[str, float]:
        assert energy is flat
        return {"brightness": evidence.samples.mean().item()}

    task: Any = SimpleNamespace(
        name="toy",
        module="tiltune.tasks.mixture",
        load_prior=lambda asked: load_prior(config.prior.source or "", asked.steps),
        figures=figures,
        criteria=lambda figures: [Criterion("brightness", figures["brightness"], -100.0)],
    )
    toy = replace(config, task="toy", prior=PriorConfig(steps=3), train=replace(config.train, updates=0))
    run = runs.train(toy, tmp_path / "run", task=task, energy=flat, progress=False)
    with pytest.raises(ValueError, match="is of the task 'toy', but None is given"):
        runs.open_run(run.folder)
    judged, _ = evaluation.certify(runs.open_run(run.folder, task), flat, size=400, progress=False)
    assert judged["verdict"] == "fail"
    assert judged["reasons"][0].startswith("brightness is")
    assert judged["judged_by"] == "the task toy"
    assert judged["verdict_unknown_truth"]["verdict"] == "pass"  # what the two sides alone say

    def too_few(*_: Any) -> dict[str, float]:
        raise ValueError("two samples are too few")

    task.figures = too_few
    judged, _ = evaluation.certify(runs.open_run(run.folder, task), flat, size=100, progress=False)
    assert (judged["verdict"], judged["judged_by"]) == ("inconclusive", "its two sides")
    assert "two samples are too few" in judged["reasons"]
