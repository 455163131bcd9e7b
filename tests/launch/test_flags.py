"""The command line's names, frozen; every flag reaches exactly its own field of the config."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiltune.finetune.config.run import RunConfig, pretrained_recipe
from tiltune.finetune.config.yaml_file import leaves, to_mapping
from tiltune.launch import flags
from tiltune.launch.verbs import train

VALUES: dict[str, list[str]] = {
    "--device": ["cpu"],
    "--threads": ["3"],
    "--tracker": ["wandb"],
    "--prior": ["folder"],
    "--steps": ["7"],
    "--dim": ["5"],
    "--prior-seed": ["2"],
    "--eta": ["0.5"],
    "--variance": ["fixed_small"],
    "--noise": ["flow_grpo"],
    "--noise-level": ["0.5"],
    "--train-steps": ["1:2"],
    "--labels": ["2", "5"],
    "--scheduler": ["ddim"],
    "--prompts": ["a red apple", "a dog"],
    "--prompt-metadata": ["{}", "{}"],
    "--negative-prompt": ["fog"],
    "--guidance": ["3"],
    "--image-size": ["64"],
    "--precision": ["bf16"],
    "--channels-last": [],
    "--energy": ["a.py:b", "0.5*c.py:d(3)"],
    "--cache": [],
    "--energy-workers": ["2"],
    "--energy-timeout": ["5"],
    "--policy": ["residual"],
    "--rank": ["3"],
    "--targets": ["to_q", "to_k"],
    "--gradient-checkpointing": [],
    "--objective": ["rtb"],
    "--alpha": ["0.5"],
    "--behavior": ["on_policy", "0.5", "prior", "0.5"],
    "--chain": ["flow"],
    "--updates": ["3"],
    "--batch-size": ["5"],
    "--learning-rate": ["1e-3"],
    "--horizon": ["4"],
    "--epochs": ["3"],
    "--clip": ["0.1"],
    "--step-share": ["0.5"],
    "--log-z-learning-rate": ["0.5"],
    "--step-nats": ["0.5"],
    "--warm-start-step-nats": ["0.5"],
    "--warm-start": ["none"],
    "--warm-start-updates": ["3"],
    "--warm-start-rows": ["3"],
    "--warm-start-learning-rate": ["0.5"],
    "--soft-value-updates": ["3"],
    "--forward-rows": ["5"],
    "--population-size": ["7"],
    "--population": ["smc"],
    "--tempering-ess": ["0.5"],
    "--huber": ["5"],
    "--max-energy": ["5"],
    "--noise-scale": ["5"],
    "--ema-decay": ["0.5"],
    "--max-grad-norm": ["5"],
    "--memory-mb": ["5"],
    "--max-invalid": ["0.5"],
    "--max-kl": ["3"],
    "--monitor-every": ["5"],
    "--checkpoint-every": ["4"],
    "--process-timeout": ["30.0"],
    "--spike-factor": ["8.0"],
    "--max-skipped": ["4"],
    "--seed": ["5"],
    "--certificate-size": ["500"],
    "--certificate-seed": ["5"],
    "--certificate-tolerance": ["0.1"],
}


def config(*arguments: str) -> RunConfig:
    base = train.starting_point(list(arguments))
    options = flags.parse(flags.flags(base, train.Own, ("digits", "fashion")), list(arguments), "tiltune train", "")
    return flags.with_flags(base, options)


def flat(config: RunConfig) -> dict[str, Any]:
    values = to_mapping(config)
    return {leaf: values[leaf] if "." not in leaf else values[leaf.split(".")[0]][leaf.split(".")[1]] for leaf in leaves()}


def test_the_names_of_train_are_frozen(tiltune: Callable[..., Any]) -> None:
    shown = tiltune("train", "--help")
    assert shown.status == 0
    listed = set(re.findall(r"^│ (?:-h, )?(--[a-z-]+)", shown.out, re.MULTILINE))
    assert listed == {"--help", "--config", "--out", "--overwrite", "--resume", "--print-config", *VALUES}
    assert "[TASK]" in shown.out


@pytest.mark.parametrize(
    ("verb", "names"),
    [
        ("evaluate", "RUN --energy --size --seed --tolerance --until-decided --held-out --beside --deployment"),
        ("sample", "RUN --n --exact --proposals --candidates --sweeps --energy --labels --prompts --seed --out --overwrite"),
        ("export", "RUN --out --format"),
        (
            "audit",
            "--policy --energy --size --tolerance --seed --threads --out --prior --steps --chain --dim --prior-seed --eta"
            " --variance --noise --noise-level --train-steps --labels --scheduler --prompts --prompt-metadata"
            " --negative-prompt --guidance --image-size --precision --channels-last",
        ),
        ("tasks", ""),
        ("2d", "--objective --alpha --chain --steps --warm-start --seed --out --overwrite --compare --threads"),
        ("bench", "--device --quick --threads --out"),
        ("completion", "{bash,zsh,fish}"),
    ],
)
def test_the_names_of_the_other_verbs_are_frozen(tiltune: Callable[..., Any], verb: str, names: str) -> None:
    shown = tiltune(verb, "--help")
    assert shown.status == 0
    listed = re.findall(r"^│ (RUN|\{bash,zsh,fish\}|(?:-h, )?--[a-z-]+)", shown.out, re.MULTILINE)
    assert set(listed) == {"-h, --help", *names.split()}


def test_no_two_fields_share_a_flag() -> None:
    assert len(VALUES) == len(leaves()) - 1  # the task is positional
    spelled = {flags.RENAMED.get(leaf, leaf.rpartition(".")[2].replace("_", "-")) for leaf in leaves() if leaf != "task"}
    assert {f"--{name}" for name in spelled} == set(VALUES)


@pytest.mark.parametrize("flag", VALUES)
def test_a_flag_reaches_its_field_and_no_other(flag: str) -> None:
    before = flat(pretrained_recipe())
    prompts = ("--prompts", "prior.prompts", ["a red apple", "a dog"])
    needed: dict[str, tuple[str, str, Any]] = {
        "--targets": ("--policy", "policy.kind", "lora"),
        "--energy-timeout": ("--energy-workers", "energy.workers", 2),
        "--horizon": ("--objective", "train.objective", "trust_pcl"),
        "--clip": ("--objective", "train.objective", "ppo_kl"),
        "--max-kl": ("--updates", "train.updates", 2),
        **dict.fromkeys(("--prompt-metadata", "--negative-prompt", "--guidance"), prompts),
    }
    other, leaf, value = needed.get(flag, (None, "", None))
    said = value if isinstance(value, list) else (str(value),)
    after = flat(config(flag, *VALUES[flag], *([other, *said] if other else [])))
    if other:
        assert after.pop(leaf) == value
        before.pop(leaf)
    [changed] = [leaf for leaf in after if after[leaf] != before[leaf]]
    assert f"--{flags.RENAMED.get(changed, changed.rpartition('.')[2].replace('_', '-'))}" == flag


def test_a_flag_over_the_file_over_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "prior: {steps: 7, eta: .5}\ntrain: {alpha: 2, behavior: {prior: 1}}\nenergy: {terms: [a.py:b]}\npolicy: {rank: 3}\n"
    )
    made = config("--config", str(file), "--steps", "9", "--behavior", "on_policy", "1", "--energy", "c.py:d")
    assert (made.prior.steps, made.prior.eta, made.train.alpha, made.policy.rank) == (9, 0.5, 2.0, 3)
    assert made.train.behavior == {"on_policy": 1.0}  # replaced, not merged into
    assert made.energy.terms == ("c.py:d",)
    recipe = pretrained_recipe()
    assert made.train.batch_size == recipe.train.batch_size != RunConfig().train.batch_size


def test_a_task_is_the_starting_point() -> None:
    from tiltune.tasks.task import load_task

    assert config("digits") == load_task("digits").recipe()
    assert config("digits", "--seed", "3").train.seed == 3


def test_a_file_names_its_task(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("task: digits\ntrain: {seed: 3}\n")
    assert config("--config", str(file)) == config("digits", "--config", str(file)) == config("digits", "--seed", "3")
    with pytest.raises(ValueError, match="is a config of the task 'digits', but the task 'fashion' is asked for"):
        config("fashion", "--config", str(file))
    file.write_text("task: null\n")
    with pytest.raises(ValueError, match="is a config of the task None"):
        config("digits", "--config", str(file))


def test_a_flag_given_twice_is_refused(tmp_path: Path) -> None:
    # The last one alone would count, and the first energy be lost without a word.
    for twice in (["--energy", "a.py:b", "--energy", "c.py:d"], ["--batch-size=3", "--batch_size", "4"]):
        with pytest.raises(ValueError, match="is given 2 times; give it once, with all its values"):
            config(*twice)
    assert config("--energy", "a.py:b", "c.py:d").energy.terms == ("a.py:b", "c.py:d")
