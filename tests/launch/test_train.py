"""The verbs on a stranger's prior: the same run from Python, YAML and flags, what comes out, and every bad input's sentence."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiltune.finetune.config.energy import EnergyConfig
from tiltune.finetune.config.prior import PriorConfig
from tiltune.finetune.config.run import RunConfig, pretrained_recipe
from tiltune.finetune.runs.run import open_run
from tiltune.finetune.runs.train import train
from tiltune.samplers.streams import seed_for


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def trained(tiltune: Callable[..., Any], here: Path, small: list[Any]) -> Path:
    """A finished run in my-run."""
    shown = tiltune("train", *small, "--energy", "my_energy.py:ink", "--out", "my-run")
    assert shown.status == 0, shown.err
    return here / "my-run"


# --- one run, three ways in ------------------------------------------------------------------------------------------


def test_python_yaml_and_flags_make_the_same_run_bit_for_bit(
    tiltune: Callable[..., Any], here: Path, prior: Path, small: list[Any]
) -> None:
    given = [*small, "--energy", "my_energy.py:ink", "0.5*my_energy.py:scaled(3)", "--alpha", 0.5, "--huber", None]
    shown = tiltune("train", *given, "--out", "flags")
    assert shown.status == 0, shown.err

    printed = tiltune("train", *given, "--print-config")
    assert printed.status == 0
    assert not printed.err
    (here / "printed.yaml").write_text(printed.out)
    assert tiltune("train", "--config", "printed.yaml", "--out", "printed").status == 0

    (here / "hand.yaml").write_text(
        f"prior: {{source: {prior}, steps: 3}}\n"
        "energy:\n  terms: ['my_energy.py:ink', '0.5*my_energy.py:scaled(3)']\n"
        "train: {alpha: .5, huber: null, updates: 2, batch_size: 4, learning_rate: 1e-5, warm_start_learning_rate: 1e-5,\n"
        "        population_size: 8, population: importance, warm_start_updates: 2, warm_start_rows: 4, soft_value_updates: 1}\n"
        "device: cpu\n"
    )
    assert tiltune("train", "--config=hand.yaml", "--out", "hand").status == 0

    base = pretrained_recipe()
    sizes = {"population_size": 8, "warm_start_updates": 2, "warm_start_rows": 4, "soft_value_updates": 1}
    training = replace(base.train, alpha=0.5, huber=None, updates=2, batch_size=4, learning_rate=1e-5, **sizes)
    training = replace(training, warm_start_learning_rate=1e-5, population="importance")
    config = RunConfig(
        prior=PriorConfig(str(prior), 3),
        energy=EnergyConfig(("my_energy.py:ink", "0.5*my_energy.py:scaled(3)")),
        train=training,
        device="cpu",
    )
    train(config, "python", progress=False)

    # And from the folder that any of them left.
    assert tiltune("train", "--config", "flags/config.yaml", "--out", "again").status == 0

    one = contents(here / "flags")
    for name in ("printed", "hand", "python", "again"):
        other = contents(here / name)
        assert set(other) == set(one)
        for file in one.keys() - {"run.json"}:
            assert other[file] == one[file], (name, file)
    # Control: a config that differs in one field makes another run.
    assert tiltune("train", *given, "--seed", 1, "--out", "other").status == 0
    assert contents(here / "other")["metrics.jsonl"] != one["metrics.jsonl"]


def test_flags_over_yaml_over_recipe(tiltune: Callable[..., Any], here: Path, prior: Path) -> None:
    import yaml

    (here / "run.yaml").write_text(f"prior: {{source: {prior}, steps: 7}}\ntrain: {{alpha: 2, seed: 5}}\n")
    shown = tiltune("train", "--config", "run.yaml", "--steps", 9, "--alpha", 3, "--print-config")
    config = yaml.safe_load(shown.out)
    assert (config["prior"]["steps"], config["train"]["alpha"]) == (9, 3.0)
    assert config["train"]["seed"] == 5
    assert config["train"]["objective"] == pretrained_recipe().train.objective
    assert not (here / "runs").exists()


def test_what_train_prints_and_writes(tiltune: Callable[..., Any], here: Path, small: list[Any], prior: Path) -> None:
    shown = tiltune("train", *small, "--energy", "my_energy.py:ink")
    assert shown.status == 0
    out = shown.out.splitlines()
    assert [line.split(":")[0] for line in out[:3]] == ["prior", "chain", "condition"]
    assert "K = 3" in out[1]
    assert str(prior) in out[0]
    assert out[-1] == f"next: tiltune evaluate runs/pipeline --energy {here}/my_energy.py:ink"
    assert re.match(r"warm start and 2 updates, \d+ energy calls", out[-3])
    assert "the prior" in out[-2]  # how much it helped
    assert "reinforce_kl" in shown.err  # the bar
    assert (here / "runs" / "pipeline" / "policy" / "policy.json").exists()


def test_a_window_of_trained_steps(tiltune: Callable[..., Any], here: Path, small: list[Any]) -> None:
    """The flag, the line that says so, and a policy that is the prior before the window, in the run as it is opened again."""
    from tiltune.samplers.rollout import rollout

    given = [*small, "--energy", "my_energy.py:ink", "--train-steps", "1:1"]
    shown = tiltune("train", *given, "--out", "window")
    assert shown.status == 0, shown.err
    assert "step 1 of 3 is trained; the others are the prior's own" in shown.out.splitlines()
    assert tiltune("train", "--config", "window/config.yaml", "--out", "again").status == 0
    assert contents(here / "again")["metrics.jsonl"] == contents(here / "window")["metrics.jsonl"]
    run = open_run(here / "window")
    assert run.prior.chain.trained == (1,)
    with torch.no_grad():
        for weight in run.policy.parameters():
            weight += 0.1
    moved, still = (rollout(run.prior, policy, 4, torch.Generator().manual_seed(0)) for policy in (run.policy, None))
    assert moved.step_log_ratio is not None and moved.step_log_ratio.shape == (1, 4)
    assert torch.equal(moved.states[:2], still.states[:2]) and not torch.equal(moved.states[2], still.states[2])
    # Control: another window is another run.
    assert tiltune("train", *small, "--energy", "my_energy.py:ink", "--out", "whole").status == 0
    assert contents(here / "whole")["metrics.jsonl"] != contents(here / "window")["metrics.jsonl"]


# --- bad input -------------------------------------------------------------------------------------------------------


def broken(here: Path, prior: Path, how: str) -> Path:
    """A copy of the prior with one thing wrong."""
    folder = here / how
    shutil.copytree(prior, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if how == "missing":
        weights.unlink()
    elif how == "corrupt":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "pickle":
        weights.unlink()
        torch.save({}, weights.with_suffix(".bin"))
    elif how == "no-scheduler":
        shutil.rmtree(folder / "scheduler")
    elif how == "unsupported":
        from diffusers import DPMSolverMultistepScheduler

        DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", "DPMSolverMultistepScheduler"]
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder


PRIORS = [
    ("missing", "safetensors"),
    ("corrupt", "diffusion_pytorch_model.safetensors"),
    ("pickle", "pickle"),
    ("no-scheduler", "scheduler"),
    ("unsupported", "DPMSolverMultistep"),
]
ENERGIES = [
    ("nowhere.py:ink", "there is no file"),
    ("my_energy.py:think", "did you mean ink"),
    ("my_energy.py", "names no function"),
    ("no.such.module:ink", "there is no module no"),
    ("syntax.py:ink", "SyntaxError on line 1 of syntax.py"),
    ("importing.py:ink", "NameError on line 2 of importing.py"),
    ("my_energy.py:stuck", "the scorer is down"),
    ("ink", "names no file"),
    ("my_energy.py:scaled(open)", "not a Python literal"),
]
FLAGS = [
    (["--alpha", "0"], "alpha > 0"),
    (["--steps", "0"], "steps is 0"),
    (["--steps", "5000"], "5000"),
    (["--train-steps", "40:49"], "holds step 49, which draws no noise"),
    (["--train-steps", "40:50"], "reaches beyond the chain"),
    (["--train-steps", "1"], "write FIRST:LAST"),
    (["--policy", "lora", "--targets", "nothing_like_it"], "nothing_like_it"),
    (["--rank", "0"], "rank is 0"),
    (["--labels", "3"], "unconditional"),
    (["--eta", "0.5"], "eta"),
    (["--threads", "0"], "threads is 0"),
    (["--certificate-size", "5"], "certificate size is 5"),
    (["--config", "nowhere.yaml"], "there is no file nowhere.yaml"),
    (["--config", "unknown.yaml"], "unknown key train.alhpa; did you mean train.alpha"),
    (["--config", "type.yaml"], "train.updates is 'many', a string; expected a whole number"),
    (["--config", "broken.yaml"], "is not YAML"),
    (["--energy", "my_energy.py:ink", "--energy", "my_energy.py:ink"], "--energy is given"),
]


def refused(shown: Any, says: str, here: Path) -> None:
    """Status 2, one sentence on stderr that says what is wrong, and no run."""
    assert shown.status == 2, shown
    lines = [line for line in shown.err.splitlines() if "it/s" not in line and "?it" not in line]
    if lines[0] == "Traceback of the energy (most recent call last):":  # the user's own lines, then their exception
        lines = lines[next(n for n, line in enumerate(lines) if line.startswith("tiltune ")) :]
    [line] = lines
    assert line.startswith("tiltune ")
    assert says in line
    assert not (here / "out").exists()
    assert not (here / "runs").exists()


@pytest.mark.parametrize(("how", "says"), PRIORS)
def test_priors_that_cannot_be_loaded(tiltune: Callable[..., Any], here: Path, prior: Path, how: str, says: str) -> None:
    folder = broken(here, prior, how)
    refused(tiltune("train", "--prior", folder, "--energy", "my_energy.py:ink", "--out", "out"), says, here)


@pytest.mark.parametrize(("energy", "says"), ENERGIES)
def test_energies_that_are_not_there(tiltune: Callable[..., Any], here: Path, small: list[Any], energy: str, says: str) -> None:
    (here / "syntax.py").write_text("def ink(x:\n")
    (here / "importing.py").write_text("\nundefined\n")
    refused(tiltune("train", *small, "--energy", energy, "--out", "out"), says, here)


@pytest.mark.parametrize(("wrong", "says"), FLAGS, ids=[" ".join(wrong) for wrong, _ in FLAGS])
def test_configs_that_cannot_be(tiltune: Callable[..., Any], here: Path, prior: Path, wrong: list[str], says: str) -> None:
    (here / "unknown.yaml").write_text("train: {alhpa: 1}")
    (here / "type.yaml").write_text("train: {updates: many}")
    (here / "broken.yaml").write_text("train: [")
    energy = [] if "--energy" in wrong else ["--energy", "my_energy.py:ink"]
    refused(tiltune("train", "--prior", prior, *energy, "--out", "out", *wrong), says, here)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ([], "nothing says what to fine-tune"),
        (["--prior", "nowhere"], "nowhere"),
        (["digitz"], "unknown task 'digitz'; choose one of digits"),
        (["digits", "--prior", "x"], "brings its own prior"),
        (["--alpha", "1", "digits"], "name the task first: tiltune train digits"),
    ],
)
def test_nothing_to_train(tiltune: Callable[..., Any], here: Path, wrong: list[str], says: str) -> None:
    energy = [] if "digits" in wrong else ["--energy", "my_energy.py:ink"]
    refused(tiltune("train", *wrong, *energy, "--out", "out"), says, here)


@pytest.mark.parametrize(("wrong", "says"), [("--alpha=warm", "warm"), ("--policy=lorra", "lorra"), ("--alhpa", "--alpha FLOAT")])
def test_flags_that_cannot_be_read_end_with_status_2(tiltune: Callable[..., Any], here: Path, wrong: str, says: str) -> None:
    shown = tiltune("train", wrong)
    assert shown.status == 2
    assert says in shown.err
    assert "Traceback" not in shown.err


def test_config_yaml_repeats_the_run_from_another_folder(
    tiltune: Callable[..., Any], trained: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    shown = tiltune("train", "--config", trained / "config.yaml", "--out", "again")
    assert shown.status == 0, shown.err
    for file in ("config.yaml", "metrics.jsonl", "policy/diffusion_pytorch_model.safetensors"):
        assert (elsewhere / "again" / file).read_bytes() == (trained / file).read_bytes()


def test_a_folder_that_holds_a_run_is_refused_untouched(tiltune: Callable[..., Any], trained: Path, small: list[Any]) -> None:
    before = contents(trained)
    shown = tiltune("train", *small, "--energy", "my_energy.py:ink", "--out", "my-run")
    assert shown.status == 2
    assert "my-run already holds a run" in shown.err
    assert "--overwrite" in shown.err
    # Nor does a bad energy cost the run that it was to replace.
    assert tiltune("train", *small, "--energy", "my_energy.py:stuck", "--out", "my-run", "--overwrite").status == 2
    assert contents(trained) == before


def test_bad_input_is_found_before_torch_is_imported(here: Path, prior: Path) -> None:
    (here / "occupied").mkdir()
    (here / "occupied" / "metrics.jsonl").touch()
    code = """
import sys
from tiltune.launch import cli
prior = sys.argv[1]
energy = ["--energy", "my_energy.py:ink"]
for arguments in (
    ["train", "no-such-task"],
    ["train", "--prior", prior, *energy, "--alpha", "-1"],
    ["train", "--prior", prior, *energy, "--config", "nowhere.yaml"],
    ["train", "--prior", prior, *energy, "--out", "occupied"],
    ["train", "--prior", prior, "--energy", "ink"],
    ["train", "--prior", prior],
    ["evaluate", "nowhere"],
    ["sample", "nowhere", "--n", "3"],
    ["sample", "occupied", "--n", "0"],
    ["export", "nowhere", "--out", "occupied"],
):
    assert cli.run(arguments) == 2, arguments
print(sorted({"torch", "diffusers", "numpy", "matplotlib"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code, str(prior)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert len(done.stderr.splitlines()) == 10


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_leaves_a_usable_run(tiltune: Callable[..., Any], here: Path, small: list[Any]) -> None:
    small[small.index("--updates") + 1] = 100_000
    arguments = [*map(str, small), "--energy", "my_energy.py:ink", "--out", "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tiltune", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = here / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") > 3:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: out holds the policy as it was then" in err
    assert "Traceback" not in err
    record = json.loads((here / "out" / "run.json").read_text())
    assert record["interrupted"] is True
    assert record["updates"] == metrics.read_text().count("reinforce_kl") >= 1
    shown = tiltune("sample", "out", "--n", 3)
    assert shown.status == 0, shown.err


# --- after the training ----------------------------------------------------------------------------------------------


def test_evaluate_writes_and_prints_the_certificate(tiltune: Callable[..., Any], trained: Path) -> None:
    shown = tiltune("evaluate", "my-run")
    assert shown.status == 2
    assert f"say it again: --energy {trained.parent}/my_energy.py:ink" in shown.err
    assert not (trained / "certificate.json").exists()

    shown = tiltune("evaluate", "my-run", "--energy", "my_energy.py:ink", "--size", 400)
    certificate = json.loads((trained / "certificate.json").read_text())
    assert shown.status == certificate["exit_status"] == 1  # two updates leave the prior, whose energies are far off
    assert certificate["verdict"] == "fail"
    assert certificate["energy"] == [f"{trained.parent}/my_energy.py:ink"]
    assert not [flag for flag in certificate["flags"] if "the energy here" in flag]
    assert f"verdict: fail: {certificate['reasons'][0]}" in shown.out
    assert f"(prior {certificate['prior']['gap']:.3f})" in shown.out
    assert shown.out.index("verdict:") < shown.out.index("DDIM eta=0")
    for text in ("ELBO", "EUBO", "deployed", "DDIM eta=0", "written to my-run"):
        assert text in shown.out
    assert (trained / "picture.png").stat().st_size > 10_000
    other = tiltune("evaluate", "my-run", "--energy", "my_energy.py:ink", "--size", 400, "--seed", 1)
    assert other.status == 1
    assert json.loads((trained / "certificate.json").read_text())["elbo"] != certificate["elbo"]


def test_a_preempted_evaluation_leaves_the_certificate_that_was_there(tiltune: Callable[..., Any], trained: Path) -> None:
    first = tiltune("evaluate", "my-run", "--energy", "my_energy.py:ink", "--size", 400)
    before = (trained / "certificate.json").read_bytes()
    shown = tiltune("evaluate", "my-run", "--energy", "my_energy.py:taken_away", "--size", 200)
    assert (first.status, shown.status) == (1, 76)
    assert "SIGTERM: nothing of this was saved; run the same command again." in shown.err
    assert (trained / "certificate.json").read_bytes() == before


def test_what_is_cut_after_the_verdict_leaves_certificate_and_picture(tiltune: Callable[..., Any], trained: Path) -> None:
    shown = tiltune("evaluate", "my-run", "--energy", "my_energy.py:taken_away_later", "--size", 400)
    assert shown.status == 75
    assert "SIGTERM: the verdict is written; what comes after it was left out" in shown.err
    certificate = json.loads((trained / "certificate.json").read_text())
    assert certificate["verdict"] == "fail" and "deployed" not in certificate
    assert f"verdict: fail: {certificate['reasons'][0]}" in shown.out
    assert (trained / "picture.png").stat().st_size > 10_000


def test_deployed_samplers_can_be_left_out(tiltune: Callable[..., Any], trained: Path) -> None:
    shown = tiltune("evaluate", "my-run", "--energy", "my_energy.py:ink", "--size", 400, "--no-deployment")
    certificate = json.loads((trained / "certificate.json").read_text())
    assert shown.status == certificate["exit_status"] == 1
    assert "deployed" not in certificate and "DDIM" not in shown.out
    assert certificate["certificate_energy_calls"] == 2 * 400 + 128 * 8


def test_tolerance_and_budget_are_flags_of_evaluate(tiltune: Callable[..., Any], trained: Path) -> None:
    evaluate = ("evaluate", "my-run", "--energy", "my_energy.py:ink", "--size", 100, "--no-deployment")
    shown = tiltune(*evaluate, "--tolerance", 0.9, "--until-decided", 400)
    certificate = json.loads((trained / "certificate.json").read_text())
    assert shown.status == certificate["exit_status"] == 3  # nothing is off by .9, but the target side is too thin to show it
    assert certificate["verdict_unknown_truth"]["tolerance"] == 0.9
    assert certificate["size"] == 400
    assert tiltune(*evaluate, "--until-decided", 50).status == 2


def test_a_training_that_is_preempted_before_it_saved_ends_with_76_and_starts_again(
    tiltune: Callable[..., Any], here: Path, small: list[Any]
) -> None:
    command = ["train", *small, "--out", "run"]
    nothing = tiltune(*command, "--energy", "my_energy.py:taken_away")
    assert nothing.status == 76 and "nothing of this was saved" in nothing.err
    assert not (here / "run").exists()
    assert tiltune(*command, "--energy", "my_energy.py:ink", "--resume", "auto").status == 0
    before = {file: file.read_bytes() for file in (here / "run").rglob("*") if file.is_file()}
    again = tiltune(*command, "--energy", "my_energy.py:ink", "--resume", "auto", "--process-timeout", 5)
    assert again.status == 0 and "is finished; nothing was trained" in again.out  # a job that starts again once more
    both = tiltune(*command, "--energy", "my_energy.py:ink", "--resume", "auto", "--overwrite")
    assert both.status == 2 and "ask for one of them" in both.err
    named = tiltune(*command, "--energy", "my_energy.py:ink", "--resume", here / "run")
    assert named.status == 2 and "is finished; there is nothing to resume" in named.err
    more = tiltune(*command, "--seed", 9, "--energy", "my_energy.py:ink", "--resume", "auto")
    assert more.status == 2 and "train.seed is 0 there and 9 here" in more.err
    assert {file: file.read_bytes() for file in (here / "run").rglob("*") if file.is_file()} == before
    other = tiltune(*command, "--energy", "my_energy.py:ink", "--resume", here / "nothing")
    assert other.status == 2


def test_sample(tiltune: Callable[..., Any], here: Path, trained: Path) -> None:
    from PIL import Image
    from safetensors import safe_open
    from safetensors.torch import load_file

    assert tiltune("sample", "my-run", "--n", 5).status == 0
    samples = load_file(trained / "samples.safetensors")["samples"]
    assert samples.shape == (5, 1, 4, 4)
    assert torch.equal(samples, open_run(trained).policy.sample(5, seed=seed_for("samples", 0)))
    with Image.open(trained / "samples.png") as picture:
        assert min(picture.size) > 50

    before = contents(trained)
    shown = tiltune("sample", "my-run", "--n", 5)
    assert shown.status == 2
    assert "samples.safetensors and my-run/samples.png exist; nothing was touched" in shown.err
    assert contents(trained) == before
    assert tiltune("sample", "my-run", "--n", 5, "--seed", 1, "--overwrite").status == 0
    assert not torch.equal(load_file(trained / "samples.safetensors")["samples"], samples)
    for wrong, says in (
        (["--n", 0], "at least one sample"),
        (["--energy", "my_energy.py:ink"], "without --exact it would change nothing"),
        (["--out", "x.npz"], "safetensors"),
        (["--exact", "--out", "x.safetensors"], "say it again: --energy"),
        (["--candidates", 4], "--candidates 4: 2 or more, for samples drawn with --exact"),
        (["--exact", "--candidates", 0], "--candidates 0: 2 or more"),
        (["--exact", "--energy", "my_energy.py:ink", "--proposals", 3, "--out", "x.safetensors"], "proposals"),
    ):
        shown = tiltune("sample", "my-run", *wrong)
        assert shown.status == 2, wrong
        assert says in shown.err
    with safe_open(trained / "samples.safetensors", "pt") as file:
        assert json.loads(file.metadata()["tiltune"])["seed"] == 1
    (trained / "soft_value.json").rename(here / "away.json")
    shown = tiltune(*("sample", "my-run", "--exact", "--candidates", 4), "--energy", "my_energy.py:ink", "--out", "x.safetensors")
    (here / "away.json").rename(trained / "soft_value.json")
    assert shown.status == 2 and "my-run has no soft value" in shown.err


def test_exact_samples_follow_the_energy_and_say_how_far_to_trust_them(
    tiltune: Callable[..., Any], here: Path, trained: Path
) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    # Seven of eight weights on one side: the policy, next to the prior, does not know, the weights do.
    (here / "half.py").write_text("import math\ndef half(x):\n    return math.log(7) * (x.flatten(1).mean(1) > 0).float()\n")
    shown = tiltune("sample", "my-run", "--n", 400, "--exact", "--energy", "half.py:half", "--out", "exact.safetensors")
    assert shown.status == 0, shown.err
    plain = tiltune("sample", "my-run", "--n", 400, "--out", "plain.safetensors")
    assert plain.status == 0

    def share(name: str) -> float:
        samples = load_file(here / name)["samples"]
        return (samples.flatten(1).mean(1) > 0).double().mean().item()

    prior_share = share("plain.safetensors")
    expected = prior_share / (prior_share + 7 * (1 - prior_share))
    assert abs(prior_share - expected) > 0.2  # what is tested must not hold without the weights
    assert abs(share("exact.safetensors") - expected) < 0.08  # 3.3 standard errors of two sets of 400
    assert "effective proposals:" in shown.out
    assert "Averages over them are as accurate as over" in shown.out
    assert f"flag: the energy here is half.py:half; the run was trained with {here}/my_energy.py:ink" in shown.out
    with safe_open(here / "exact.safetensors", "pt") as file:
        told = json.loads(file.metadata()["tiltune"])
    assert told["energy"] == [f"{here}/half.py:half"]
    assert len(told["flags"]) == 1
    assert (told["unique"], told["moved"]) == (400, 0)  # without copies there is nothing to move
    assert tiltune("sample", "my-run", "--sweeps", 2, "--out", "no.safetensors").status == 2
    few = tiltune(
        "sample", "my-run", "--n", 19, "--exact", "--proposals", 20, "--energy", "half.py:half", "--out", "few.safetensors"
    )
    assert "Too few to trust" in few.out and "19 of 19 were then changed by Metropolis moves that keep the law" in few.out
    assert len(load_file(here / "few.safetensors")["samples"].flatten(1).unique(dim=0)) == 19
    assert (here / "few.png").exists()


def test_export_and_its_refusals(tiltune: Callable[..., Any], here: Path, trained: Path) -> None:
    from diffusers import DDPMPipeline

    shown = tiltune("export", "my-run", "--out", "exported")
    assert shown.status == 0, shown.err
    assert "from_pretrained" in shown.out
    pipeline = DDPMPipeline.from_pretrained(here / "exported", use_safetensors=True, local_files_only=True)
    mine = open_run(trained).policy.denoiser.state_dict()
    for name, weight in pipeline.unet.state_dict().items():
        assert torch.equal(weight, mine[f"model.{name}"])
    before = contents(here / "exported")
    again = tiltune("export", "my-run", "--out", "exported")
    assert again.status == 2
    assert "nothing was touched" in again.err
    assert contents(here / "exported") == before
    assert tiltune("export", "my-run", "--format", "lora", "--out", "adapters").status == 2
    assert not (here / "adapters").exists()


@pytest.mark.parametrize("out", ["pipeline", "pipeline/run", "."])
def test_a_run_is_not_written_over_its_prior(
    tiltune: Callable[..., Any], here: Path, small: list[Any], prior: Path, out: str
) -> None:
    shutil.copytree(prior, here / "pipeline")
    before = contents(here)
    flags = ["--prior", "pipeline", *small[2:], "--energy", "my_energy.py:ink", "--out", out, "--overwrite"]
    shown = tiltune("train", *flags)
    assert shown.status == 2 and "lie one in the other; name another folder with --out" in shown.err
    assert contents(here) == before


def test_a_folder_that_cannot_be_written_is_found_before_any_work(
    tiltune: Callable[..., Any], here: Path, small: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "file").write_text("")
    under = tiltune("train", *small, "--energy", "my_energy.py:ink", "--out", "file/run")
    monkeypatch.setattr("os.access", lambda *_: False)
    closed = tiltune("train", *small, "--energy", "my_energy.py:ink", "--out", "new/run")
    for shown in (under, closed):
        assert shown.status == 2 and "is not a folder that you may write in" in shown.err and "prior:" not in shown.out


INTERRUPTED_IMPORT = """
import importlib.abc, signal, sys
from tiltune.launch import cli

class Stop(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "diffusers.loaders.peft":
            try:
                signal.raise_signal(NUMBER)
            except BaseException as error:
                raise RuntimeError("as a library says it") from error

sys.meta_path.insert(0, Stop())
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
raise SystemExit(cli.run(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 76)])
def test_a_stop_within_an_import_is_a_stop(here: Path, small: list[Any], environment: Any, number: int, status: int) -> None:
    """Python 3.11 makes a RuntimeError of what is raised in __set_name__, say, which is no reason to run a job again."""
    words = [
        sys.executable,
        "-c",
        INTERRUPTED_IMPORT.replace("NUMBER", str(int(number))),
        "train",
        *small,
        "--energy",
        "my_energy.py:ink",
    ]
    done = subprocess.run([*map(str, words), "--out", "run"], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == status, done.stderr[-2000:]
    assert not (here / "run").exists()
