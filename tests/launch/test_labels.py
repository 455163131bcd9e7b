"""The verbs on a class-conditional prior: many labels in one run, a certificate and samples of each."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tiltune.finetune.config.run import RunConfig
from tiltune.finetune.runs.evaluate import certify
from tiltune.finetune.runs.run import open_run
from tiltune.finetune.runs.train import train

FIGURES = {"residual_std", "elbo", "ess", "log_z", "kl_to_prior", "kl_to_prior_se", "diversity"}  # of a batch's rollouts


def ink(x: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
    return (1 + class_labels.to(x)) * x.flatten(1).mean(1)


ENERGY = f"import torch\n\n{inspect.getsource(ink)}"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny class-conditional model with random weights and its scheduler, saved by plain diffusers."""
    from diffusers import DDPMScheduler, UNet2DModel

    folder = tmp_path_factory.mktemp("labelled") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        sizes: dict[str, Any] = {"layers_per_block": 1, "block_out_channels": (8, 8), "norm_num_groups": 4, "num_class_embeds": 4}
        UNet2DModel(4, 1, 1, **sizes, **blocks).save_pretrained(folder)
        DDPMScheduler(clip_sample=False, variance_type="fixed_large").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flags(labelled: Path) -> list[Any]:
    sizes = [
        "--population-size",
        120,
        "--population",
        "importance",
        "--warm-start-updates",
        2,
        "--warm-start-rows",
        6,
        "--soft-value-updates",
        1,
    ]
    slow = ["--learning-rate", 1e-5, "--warm-start-learning-rate", 1e-5]
    return ["--prior", labelled, "--steps", 3, "--updates", 2, "--batch-size", 16, *sizes, *slow, "--device", "cpu"]


@pytest.fixture
def my_run(tiltune: Callable[..., Any], here: Path, flags: list[Any]) -> Path:
    """A finished run of the labels 0 and 3."""
    (here / "energy.py").write_text(ENERGY)
    shown = tiltune("train", *flags, "--labels", 0, 3, "--energy", "energy.py:ink", "--out", "my-run")
    assert shown.status == 0, shown.err
    assert "condition: label 0, label 3 of 0 to 3, without guidance" in shown.out + shown.err
    return here / "my-run"


def test_every_label_has_figures_a_certificate_and_samples_of_its_own(tiltune: Callable[..., Any], my_run: Path) -> None:
    names = ["label 0", "label 3"]
    last = json.loads((my_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert list(last["conditions"]) == names and set(last["conditions"]["label 3"]) == FIGURES
    assert list(json.loads((my_run / "run.json").read_text())["log_z_by_condition"]) == names

    shown = tiltune("evaluate", my_run, "--energy", "energy.py:ink", "--size", 200)
    certificate = json.loads((my_run / "certificate.json").read_text())
    assert list(certificate["conditions"]) == names and shown.status == certificate["exit_status"]
    first, second = (certificate["conditions"][name] for name in names)
    assert first["mean_energy"] != second["mean_energy"] and first["size"] == 200 and first["deployed"] and second["deployed"]
    # Of each label two sides, the common starts, and 200 of each of four deployed samplers.
    assert certificate["certificate_energy_calls"] == 2 * (2 * 200 + 128 * 8 + 200 * (len(first["deployed"]) - 2))
    assert shown.out.count("verdict: ") == 3 and all(f"{name}\n" in shown.out for name in names)
    assert (my_run / "pictures" / "label_0.png").exists() and (my_run / "pictures" / "label_3.png").exists()
    assert (my_run / "picture.png").exists()

    assert tiltune("sample", my_run, "--n", 5).status == 0
    drawn = load_file(my_run / "samples.safetensors")
    assert drawn["class_labels"].tolist() == [0, 3, 0, 3, 0] and drawn["samples"].shape == (5, 1, 4, 4)
    assert tiltune("sample", my_run, "--n", 3, "--labels", 3, "--out", "threes.safetensors").status == 0
    assert load_file("threes.safetensors")["class_labels"].tolist() == [3, 3, 3]
    shown = tiltune("sample", my_run, "--n", 5, "--exact", "--energy", "energy.py:ink", "--out", "exact.safetensors")
    assert shown.status == 0 and shown.out.count("effective proposals") == 2 and "label 3: effective" in shown.out
    assert load_file("exact.safetensors")["class_labels"].tolist() == [0, 3, 0, 3, 0]
    chosen = tiltune(
        *("sample", my_run, "--n", 5, "--exact", "--candidates", 3, "--energy", "energy.py:ink", "--out", "chosen.safetensors")
    )
    assert chosen.status == 0 and chosen.out.count("chose among candidates with strength") == 2, chosen.err
    with safe_open("chosen.safetensors", "pt") as file:
        told = json.loads(file.metadata()["tiltune"])
    assert all(0 <= one["strength"] <= 1 and one["energy_calls"] >= 1000 for one in told["conditions"].values())
    shown = tiltune("sample", my_run, "--labels", 1, "--out", "none.safetensors")
    assert shown.status == 2 and "--labels 1: the run was trained on the labels 0, 3" in shown.err


def test_a_label_of_many_is_judged_as_a_run_of_it_alone(tiltune: Callable[..., Any], my_run: Path, flags: list[Any]) -> None:
    """The same policy in a run of label 3 alone has, to the last digit, the certificate that the run of two gives it."""
    assert tiltune("train", *flags, "--labels", 3, "--energy", "energy.py:ink", "--out", "alone").status == 0
    both, alone = open_run(my_run), open_run("alone")
    for mine, theirs in zip(alone.policy.parameters(), both.policy.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    one = both.by_condition()[1]
    assert one.condition == "label 3" and one.config.prior.labels == (3,)
    first, second = (certify(run, ink, size=120, progress=False)[0] for run in (one, alone))
    for figure in ("elbo", "eubo", "log_z", "verdict", "reasons", "kl_per_step"):
        assert first[figure] == second[figure], figure
    assert set(one.history[-1]) == {"phase", "update", "alpha", *FIGURES}
    with pytest.raises(ValueError, match=r"this run has 2 conditions, .*by_condition"):
        certify(both, ink, size=120, progress=False)


@pytest.mark.slow
def test_the_digits_of_labels_are_tilted_toward_their_own(tiltune: Callable[..., Any], here: Path) -> None:
    """Unless an energy is said, in which case it is that one."""
    for energy, expected in (([], "own_class"), (["--energy", "classes(8)"], "classes(8)")):
        shown = tiltune("train", "digits", "--labels", 0, 3, *energy, "--print-config")
        assert shown.status == 0 and f"- {expected}\n" in shown.out and "labels:\n  - 0\n  - 3\n" in shown.out
    shown = tiltune("train", "digits", "--energy", "own_class", "--out", "x")
    assert shown.status == 2 and "samples of a class-conditional prior have class_labels (--labels)" in shown.err


def test_all_labels(tiltune: Callable[..., Any], here: Path, flags: list[Any]) -> None:
    (here / "energy.py").write_text(ENERGY)
    shown = tiltune("train", *flags, "--labels", "all", "--energy", "energy.py:ink", "--out", "all")
    assert shown.status == 0, shown.err
    run = open_run(here / "all")
    assert run.config.prior.labels == "all" and [one.condition for one in run.by_condition()] == [f"label {k}" for k in range(4)]


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ((), r"class-conditional: give labels from 0 to 3, or all of them \(none were given\)"),
        ((4,), r"\(4 was given\)"),
        ((1, 1), "labels holds 1 twice"),
        (("two",), "tuple.int"),
    ],
)
def test_labels_that_cannot_be(
    labels: tuple[Any, ...], says: str, tiltune: Callable[..., Any], here: Path, flags: list[Any]
) -> None:
    import re

    (here / "energy.py").write_text(ENERGY)
    given = ["--labels", *labels] if labels else []
    shown = tiltune("train", *flags, *given, "--energy", "energy.py:ink", "--out", "wrong")
    assert shown.status == 2 and re.search(says, " ".join(shown.err.split())), shown.err
    assert not (here / "wrong").exists()


@pytest.mark.slow
def test_resumed_it_is_the_same_run(labelled: Path, tmp_path: Path) -> None:
    """Interrupted in the middle of the updates and gone on with: metrics and weights are those of a run that nobody stopped."""
    from dataclasses import replace

    from tiltune.finetune.config.run import pretrained_recipe

    base = pretrained_recipe(str(labelled))
    sizes: dict[str, Any] = {
        "population_size": 80,
        "warm_start_updates": 2,
        "warm_start_rows": 6,
        "soft_value_updates": 1,
        "updates": 4,
    }
    config: RunConfig = replace(
        base,
        prior=replace(base.prior, steps=3, labels=(1, 2)),
        train=replace(base.train, batch_size=8, checkpoint_every=1, **sizes),
        device="cpu",
    )
    asked = []

    def energy(x: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        asked.append(len(x))
        if len(asked) == stop:
            raise KeyboardInterrupt
        return ink(x, class_labels)

    stop = -1
    whole = train(config, tmp_path / "whole", energy=energy, progress=False)
    stop, asked = len(asked) - 2, []
    train(config, tmp_path / "cut", energy=energy, progress=False)
    stop = -1
    again = train(config, tmp_path / "cut", energy=energy, progress=False, resume="auto")
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    for one, other in zip(again.policy.parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(one, other)
