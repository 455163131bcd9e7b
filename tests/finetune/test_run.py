"""A run as a folder: what it holds, that it opens again, and that neither an error nor Ctrl-C costs anything."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tiltune.finetune.certificate.criteria import Criterion, judge_weighted
from tiltune.finetune.config.energy import EnergyConfig
from tiltune.finetune.config.policy import PolicyConfig
from tiltune.finetune.config.prior import PriorConfig
from tiltune.finetune.config.run import RunConfig
from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.config.yaml_file import from_mapping, read_yaml
from tiltune.finetune.runs import evaluate as evaluation
from tiltune.finetune.runs.build import device_of
from tiltune.finetune.runs.energies import absolute_term
from tiltune.finetune.runs.folder import ASIDE, MOVING, new_run
from tiltune.finetune.runs.run import open_run, read_config
from tiltune.finetune.runs.train import train
from tiltune.samplers.policy import Policy

ENERGY = """
import torch

def ink(x):
    return x.flatten(1).mean(1)

def nothing(x):
    return torch.zeros(len(x))
"""


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
        run = train(config, tmp_path / "run", progress=True)
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
    assert run.record["energy_calls"] == 12 + 2 * 4  # the probe, then two batches
    assert run.record["decisions"] == printed[: len(run.record["decisions"])]
    assert len(run.history) == 2

    again = open_run(run.folder)
    assert again.config == run.config
    assert again.record == json.loads((run.folder / "run.json").read_text())
    torch.testing.assert_close(again.policy.sample(3, seed=1), run.policy.sample(3, seed=1), rtol=0, atol=0)
    untrained = train(replace(config, train=replace(config.train, updates=0)), tmp_path / "prior", progress=False)
    assert not torch.equal(again.policy.sample(3, seed=1), untrained.policy.sample(3, seed=1))


def test_metrics_hold_nothing_that_another_run_would_not_repeat(config: RunConfig, tmp_path: Path) -> None:
    for kind in ("full", "lora"):
        one, two = (
            train(replace(config, policy=PolicyConfig(kind, rank=2)), tmp_path / f"{kind}{n}", progress=False) for n in "12"
        )
        assert contents(one.folder / "policy") == contents(two.folder / "policy")
        assert contents(one.folder)["metrics.jsonl"] == contents(two.folder)["metrics.jsonl"]
    other = replace(config, train=replace(config.train, seed=1))
    assert (
        contents(train(other, tmp_path / "3", progress=False).folder)["metrics.jsonl"]
        != contents(tmp_path / "full1")["metrics.jsonl"]
    )


def test_an_interrupted_run_is_a_run(config: RunConfig, tmp_path: Path) -> None:
    energy = Breaking(5, KeyboardInterrupt())  # the probe, four calls, and one update
    run = train(config, tmp_path / "run", energy=energy, progress=False)
    assert run.record["interrupted"] is True
    assert run.record["updates"] == 1
    opened = open_run(run.folder)
    torch.testing.assert_close(opened.policy.sample(2), run.policy.sample(2), rtol=0, atol=0)
    metrics, _ = evaluation.certify(opened, lambda x: x.flatten(1).mean(1), size=100, progress=False)
    assert any("interrupted" in flag for flag in metrics["flags"])


def test_an_error_in_the_middle_keeps_what_was_trained(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="out of memory"):
        train(config, tmp_path / "run", energy=Breaking(5, RuntimeError("out of memory")), progress=False)
    opened = open_run(tmp_path / "run")
    assert opened.record["updates"] == 1
    assert "out of memory" in opened.record["stopped"]
    assert opened.policy.sample(2).isfinite().all()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")], ids=["interrupt", "error"])
def test_what_breaks_before_the_first_update_leaves_nothing_and_takes_nothing(
    config: RunConfig, tmp_path: Path, error: BaseException
) -> None:
    out = tmp_path / "runs" / "deep" / "run"
    with pytest.raises((KeyboardInterrupt, ValueError)):
        train(config, out, energy=Breaking(0, error), progress=False)
    assert not (tmp_path / "runs").exists()

    train(config, out, progress=False)
    (out / "certificate.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises((KeyboardInterrupt, ValueError)):
        train(config, out, energy=Breaking(0, error), overwrite=True, progress=False)
    assert contents(out) == before
    assert not (out / ASIDE).exists()


def test_a_run_is_only_replaced_on_request_and_then_whole(config: RunConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config, out, progress=False)
    (out / "certificate.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(ValueError, match=r"already holds a run .*nothing was touched"):
        train(config, out, progress=False)
    assert contents(out) == before
    train(replace(config, train=replace(config.train, seed=1)), out, overwrite=True, progress=False)
    after = contents(out)
    assert "certificate.json" not in after  # it belonged to the run that is gone
    assert after["notes.txt"] == b"mine"
    assert after["metrics.jsonl"] != before["metrics.jsonl"]
    with pytest.raises(ValueError, match="is a file"):
        train(config, out / "notes.txt", overwrite=True, progress=False)


def test_overwrite_moves_a_run_back_that_a_killed_process_left_aside(config: RunConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config, out, progress=False)
    before = contents(out)

    def kill(*moved: str, to: str) -> None:
        (out / to).mkdir()
        for name in moved:
            (out / name).rename(out / to / name)

    def fail() -> None:
        with pytest.raises(ValueError, match="broken"):
            train(config, out, energy=Breaking(0, RuntimeError("broken")), overwrite=True, progress=False)
        assert contents(out) == before

    kill("config.yaml", "metrics.jsonl", "policy", "run.json", to=ASIDE)  # before anything new was written
    with pytest.raises(ValueError, match=r"already holds a run \(\.replaced\); nothing was touched"):
        train(config, out, progress=False)
    fail()
    kill("config.yaml", "metrics.jsonl", "policy", "run.json", to=ASIDE)  # in the middle of the new training
    (out / "config.yaml").write_text("{}")
    (out / "metrics.jsonl").write_text("new")
    fail()
    kill("config.yaml", to=MOVING)  # on the way there or back, with the rest in the folder
    fail()
    kill(to=ASIDE)  # control: a finished run is not replaced by what it replaced
    (out / ASIDE / "config.yaml").write_text("old")
    fail()
    assert not (out / ASIDE).exists()
    assert not (out / MOVING).exists()


def test_overwrite_takes_nothing_that_is_no_run(config: RunConfig, tmp_path: Path) -> None:
    for name, files in {
        "without": {"policy": "mine"},
        "foreign": {"config.yaml": "learning_rate: 1\n", "metrics.jsonl": ""},
        "written by hand": {"config.yaml": "train: {alpha: 2}\n"},
        "empty": {"config.yaml": ""},
        "no YAML": {"config.yaml": "train: ["},
    }.items():
        out = tmp_path / name
        out.mkdir()
        for file, text in files.items():
            (out / file).write_text(text)
        before = contents(out)
        with pytest.raises(ValueError, match=r"but no run that could be overwritten: .*\. Nothing was touched"):
            train(config, out, overwrite=True, progress=False)
        assert contents(out) == before


def test_ctrl_c_while_saving_waits_until_all_is_saved(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Policy.save

    def interrupted(policy: Policy, folder: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save(policy, folder)

    monkeypatch.setattr(Policy, "save", interrupted)
    # A test run in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        train(config, tmp_path / "run", energy=Breaking(5, KeyboardInterrupt()), progress=False)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    opened = open_run(tmp_path / "run")
    assert (opened.record["updates"], opened.record["interrupted"]) == (1, True)


def test_what_fails_while_saving_takes_neither_run(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    train(config, out, progress=False)
    before = contents(out)

    def full(policy: Policy, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    other = replace(config, train=replace(config.train, seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(Policy, "save", full)
        with pytest.raises(OSError, match="No space left"):
            train(other, out, overwrite=True, progress=False)
        assert (out / "metrics.jsonl").read_bytes() != before["metrics.jsonl"]  # the new training's
        assert contents(out / ASIDE) == before
        with pytest.raises(OSError, match="No space left"):  # control: where nothing was trained, all is as it was
            train(replace(other, train=replace(other.train, updates=0)), out, overwrite=True, progress=False)
    assert contents(out) == before


def test_a_finished_run_is_not_rolled_back(tmp_path: Path) -> None:
    def finish() -> None:
        with new_run(tmp_path / "run", lambda: False):
            (tmp_path / "run" / "run.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finish()
    assert (tmp_path / "run" / "run.json").exists()


def test_energy_files_are_spelled_out(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    terms = ("my_energy.py:ink", "-0.5 * ./my_energy.py:nothing", "tiltune.tasks.mixture:energy(3)", "wanted")
    spelled = (f"{tmp_path}/my_energy.py:ink", f"-0.5 * {tmp_path}/my_energy.py:nothing", *terms[2:])
    assert tuple(map(absolute_term, terms)) == spelled
    assert tuple(map(absolute_term, spelled)) == spelled
    run = train(replace(config, energy=EnergyConfig(terms[:2])), tmp_path / "run", progress=False)
    assert read_config(run.folder).energy.terms == run.config.energy.terms == spelled[:2]
    odd = tmp_path / "a:b"  # no term can spell this place; as it was, it works here
    odd.mkdir()
    monkeypatch.chdir(odd)
    assert absolute_term("my_energy.py:ink") == "my_energy.py:ink"


def test_mps_is_no_device(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for cuda, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        assert device_of(replace(config, device="auto")) == device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="the device is 'cuda', but torch sees none here"):
        device_of(replace(config, device="cuda"))


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
            train(wrong, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="is of the task None, but 'toy' is given"):
        train(config, tmp_path / "run", task=SimpleNamespace(name="toy"), progress=False)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "run").exists()


def test_a_population_that_does_not_fit_is_refused(config: RunConfig, tmp_path: Path) -> None:
    huge = replace(config.train, population_size=10**12)
    needed = replace(config, train=replace(huge, behavior=None))
    with pytest.raises(ValueError, match=r"prior samples, 1,000,000,000,000 trajectories of 4 states, take 238,\d{3}\.\d GB"):
        train(needed, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    train(replace(config, train=huge), tmp_path / "run", progress=False)  # control: nothing needs it


def test_folders_that_hold_no_finished_run(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no run in"):
        open_run(tmp_path / "nowhere")
    run = train(config, tmp_path / "run", progress=False)
    text = (run.folder / "run.json").read_text()
    (run.folder / "run.json").write_text(text[:-20])
    with pytest.raises(ValueError, match=r"run.json is not JSON"):
        open_run(run.folder)
    (run.folder / "run.json").unlink()
    with pytest.raises(ValueError, match="still training, or its process was killed"):
        open_run(run.folder)
    (run.folder / "run.json").write_text(text)
    (run.folder / "config.yaml").write_text("train: {alpha: x}")
    with pytest.raises(ValueError, match=r"config.yaml: train.alpha is 'x'"):
        open_run(run.folder)


@pytest.mark.parametrize(
    "term",
    [
        "{evil}:energy",
        "evil:energy",
        "{evil.parent}/run/../evil.py:energy",
        "tiltune.tasks/../../evil.py:energy",
        "tiltune.tasks.py:energy",
        "tiltune.tasks.mixture:import_module",
    ],
)
def test_no_code_runs_because_a_folder_names_it(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    run = train(config, tmp_path / "run", progress=False)
    mark, evil = tmp_path / "mark", tmp_path / "evil.py"
    evil.write_text(f"open({str(mark)!r}, 'w').close()\ndef energy(x):\n    return x.flatten(1).mean(1)\n")
    (tmp_path / "tiltune.tasks.py").write_text(evil.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    term = term.format(evil=evil)
    stored = run.folder / "config.yaml"
    stored.write_text(stored.read_text().replace(config.energy.terms[0], term))
    opened = open_run(run.folder)
    assert opened.config.energy.terms == (term,)
    for act in (opened.energy, lambda: evaluation.certify(opened, size=100, progress=False)):
        with pytest.raises(ValueError, match="no code is run because a folder names it, so say it again: --energy"):
            act()
    assert not mark.exists()
    if "evil" in term and "tasks" not in term:
        opened.energy([term])  # control: typed by a user, it is
        assert mark.exists()


def test_a_run_with_a_function_from_python_asks_for_it_again(config: RunConfig, tmp_path: Path) -> None:
    energy = Breaking(100, ValueError())
    run = train(replace(config, energy=EnergyConfig(("not.used:here",))), tmp_path / "run", energy=energy, progress=False)
    assert run.record["energy"] is None
    assert read_config(run.folder).energy.terms == ()
    with pytest.raises(ValueError, match=r"trained with a function of its own.*energy="):
        evaluation.certify(open_run(run.folder), size=100, progress=False)


# --- the certificate -------------------------------------------------------------------------------------------------


def certified(config: RunConfig, out: Path, energy: Any, size: int, task: Any = None) -> dict[str, Any]:
    """The certificate of the untouched prior, for a given energy."""
    untouched = replace(config, train=replace(config.train, updates=0))
    run = train(untouched, out, energy=energy, task=task, progress=False)
    metrics, evidence = evaluation.certify(run, energy, size=size, progress=False)
    assert "deployed" not in metrics
    evaluation.write_certificate(run, evaluation.measure_deployment(run, metrics, evidence, energy, progress=False))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((out / "certificate.json").read_text(), parse_constant=refuse)


def test_the_three_verdicts(config: RunConfig, tmp_path: Path) -> None:
    # The prior is its own tilted law where the energy is flat, is not where it is steep, and too few rollouts show nothing small.
    flat = certified(config, tmp_path / "flat", lambda x: torch.zeros(len(x)), 1000)
    steep = certified(config, tmp_path / "steep", lambda x: 2 * (x.flatten(1).mean(1) > 0).float(), 1000)
    few = certified(config, tmp_path / "few", lambda x: torch.zeros(len(x)), 100)
    assert [(one["verdict"], one["exit_status"]) for one in (flat, steep, few)] == [("pass", 0), ("fail", 1), ("inconclusive", 3)]
    assert flat["gap"] == pytest.approx(0, abs=1e-6)
    assert steep["gap"] > 0.3
    assert [row["sampler"] for row in flat["deployed"]][:2] == ["weighted prior", "trained chain"]
    assert len(flat["deployed"]) > 4
    # Both sides, 128 starts of 8 rollouts, and each deployed sampler.
    assert flat["certificate_energy_calls"] == 2 * 1000 + 128 * 8 + (len(flat["deployed"]) - 2) * 1000
    # The untouched prior is as far from the target as itself.
    assert steep["gap_share_of_prior"] == pytest.approx(1, abs=0.3)
    assert steep["prior"]["cell_tv"] > 0.1 > flat["prior"]["cell_tv"]
    assert (flat["size"], flat["steps"], flat["alpha"], flat["energy_calls"]) == (1000, 3, 1.0, 12)


def test_a_certificate_repeats_and_another_seed_changes_it(config: RunConfig, tmp_path: Path) -> None:
    run = train(config, tmp_path / "run", progress=False)
    energy = run.energy([f"{tmp_path}/my_energy.py:ink"])
    one, two = (evaluation.certify(run, energy, size=100, progress=False)[0] for _ in range(2))
    assert one == two
    assert evaluation.certify(run, energy, size=100, seed=1, progress=False)[0]["elbo"] != one["elbo"]
    with pytest.raises(ValueError, match="fewer than 100 rollouts"):
        evaluation.certify(run, energy, size=10, progress=False)


def test_a_certificate_names_the_energy_that_judged(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(config, tmp_path / "run", progress=False)
    monkeypatch.chdir(tmp_path)

    def judged(*terms: str) -> tuple[Any, list[str]]:
        metrics, _ = evaluation.certify(run, run.energy(terms), terms=terms, size=100, progress=False)
        return metrics["energy"], [flag for flag in metrics["flags"] if "the energy here" in flag]

    ink = f"{tmp_path}/my_energy.py:ink"
    assert judged("my_energy.py:ink") == ([ink], [])
    assert judged("2*my_energy.py:ink") == (
        [f"2*{ink}"],
        [f"the energy here is 2*my_energy.py:ink; the run was trained with {ink}"],
    )
    assert not evaluation.energy_flags(run, ["1.0*./my_energy.py:ink"])
    assert evaluation.energy_flags(run, ["my_energy.py:ink", "my_energy.py:nothing"])
    metrics, _ = evaluation.certify(run, lambda x: x.flatten(1).mean(1), size=100, progress=False)
    assert metrics["energy"] is None
    assert f"the energy here is a function of its own; the run was trained with {ink}" in metrics["flags"]


def test_every_wait_of_a_certificate_has_a_bar_that_ends_at_its_total(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tqdm

    bars: list[Any] = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            bars.append(self)

    run = train(replace(config, train=replace(config.train, population="importance")), tmp_path / "run", progress=False)
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    energy = run.energy([f"{tmp_path}/my_energy.py:ink"])
    metrics, evidence = evaluation.certify(run, energy, size=100, progress=True)
    metrics = evaluation.measure_deployment(run, metrics, evidence, energy, progress=True)
    assert [bar.desc for bar in bars] == ["certificate", "judging", "deployed samplers"]
    assert all(bar.n == bar.total > 0 for bar in bars)
    assert bars[0].total + bars[2].total == metrics["certificate_energy_calls"]


def test_an_undecided_certificate_draws_on_to_its_budget(config: RunConfig, tmp_path: Path) -> None:
    """The untouched prior and a flat energy: 120 rollouts show too little, the 300 effective ones that it asks for pass."""
    run = train(replace(config, train=replace(config.train, updates=0)), tmp_path / "run", progress=False)

    def flat(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x))

    once, _ = evaluation.certify(run, flat, size=120, progress=False)
    assert (once["verdict"], once["size"]) == ("inconclusive", 120) and 120 < once["rollouts_to_decide"] < 2000
    more, evidence = evaluation.certify(run, flat, size=120, until_decided=2000, progress=False)
    assert more["verdict"] == "pass" and 300 <= more["size"] <= 2000
    assert len(evidence.samples) == len(evidence.prior_samples) == more["size"]
    assert more["certificate_energy_calls"] == 2 * more["size"] + 128 * 8  # common starts are drawn once
    short, _ = evaluation.certify(run, flat, size=120, until_decided=200, progress=False)
    assert (short["verdict"], short["size"]) == ("inconclusive", 200)
    with pytest.raises(ValueError, match="until_decided is 50, fewer than the 120 rollouts"):
        evaluation.certify(run, flat, size=120, until_decided=50, progress=False)
    with pytest.raises(ValueError, match=r"certificate tolerance is 2.*between 0 and 1"):
        evaluation.certify(run, flat, tolerance=2, progress=False)


def test_a_task_judges_by_its_own_criteria(config: RunConfig, tmp_path: Path) -> None:
    from tiltune.samplers.loading.pretrained import load_prior

    def flat(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x))

    def metrics(asked: PriorConfig, evidence: Any, energy: Any, generator: Any) -> dict[str, float]:
        assert energy is flat and asked.steps == 3
        return {"brightness": evidence.samples.mean().item()}

    task: Any = SimpleNamespace(
        name="toy",
        module="tiltune.tasks.mixture",
        load_prior=lambda asked: load_prior(config.prior.source or "", asked.steps),
        reference=None,
        refuse=None,
        metrics=metrics,
        judge=lambda metrics: judge_weighted([Criterion("brightness", metrics["brightness"], -100.0)], metrics),
    )
    toy = replace(config, task="toy", prior=PriorConfig(steps=3), train=replace(config.train, updates=0))
    run = train(toy, tmp_path / "run", task=task, energy=flat, progress=False)
    with pytest.raises(ValueError, match="is of the task 'toy', but None is given"):
        open_run(run.folder)
    judged, _ = evaluation.certify(open_run(run.folder, task), flat, size=400, progress=False)
    assert judged["verdict"] == "fail"
    assert judged["reasons"][0].startswith("brightness is")
    assert judged["judged_by"] == "the task toy"
    assert judged["verdict_unknown_truth"]["verdict"] == "pass"  # what the two sides alone say

    def too_few(*_: Any) -> dict[str, float]:
        raise ValueError("two samples are too few")

    task.metrics = too_few
    judged, _ = evaluation.certify(open_run(run.folder, task), flat, size=100, progress=False)
    assert (judged["verdict"], judged["judged_by"]) == ("inconclusive", "its two sides")
    assert "two samples are too few" in judged["reasons"]


def test_a_gross_miss_fails_a_task_whose_target_side_is_thin(config: RunConfig, tmp_path: Path) -> None:
    """100 rollouts are too few for the task's own criteria, which are met; that the prior is far off is shown all the same."""
    from tiltune.samplers.loading.pretrained import load_prior

    task: Any = SimpleNamespace(
        name="toy",
        module="tiltune.tasks.mixture",
        load_prior=lambda asked: load_prior(config.prior.source or "", asked.steps),
        reference=None,
        refuse=None,
        metrics=lambda *_: {},
        judge=lambda metrics: judge_weighted([Criterion("nothing", 0.0, 1.0)], metrics),
    )
    toy = replace(config, task="toy", prior=PriorConfig(steps=3), train=replace(config.train, updates=0))

    def steep(x: torch.Tensor) -> torch.Tensor:
        return 4 * (x.flatten(1).mean(1) > 0).float()

    run = train(toy, tmp_path / "run", task=task, energy=steep, progress=False)
    judged, _ = evaluation.certify(run, steep, size=100, progress=False)
    assert (judged["verdict"], judged["judged_by"]) == ("fail", "the task toy")
    assert judged["target_ess"] < 100 and judged["verdict_unknown_truth"]["lower"] > 0.15
    assert judged["reasons"][0].startswith("shares of") and any("fewer than 300" in reason for reason in judged["reasons"])
    flat, _ = evaluation.certify(run, lambda x: torch.zeros(len(x)), size=100, progress=False)
    assert flat["verdict"] == "inconclusive" and flat["rollouts_to_decide"] == 400  # control: 300 effective, and a tenth more
