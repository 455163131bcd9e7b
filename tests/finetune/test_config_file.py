"""A config in YAML: it comes back as it was, and what is wrong in it is named, with its place, before any work."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiltune.finetune.config.energy import EnergyConfig
from tiltune.finetune.config.policy import PolicyConfig
from tiltune.finetune.config.prior import PriorConfig
from tiltune.finetune.config.run import RunConfig, pretrained_recipe
from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.config.yaml_file import from_mapping, leaves, read_yaml, to_mapping, to_yaml


def read(tmp_path: Path, text: str, base: RunConfig | None = None) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return from_mapping(read_yaml(path), base or RunConfig(), "run.yaml")


CONFIGS = [
    RunConfig(),
    pretrained_recipe("some/folder", "a.py:b", "0.5*c.py:d(3, width=.5)"),
    RunConfig(task="digits", train=TrainConfig(learning_rate=1e-5, huber=None, tempering_ess=None, alpha=1 / 3)),
    RunConfig(
        prior=PriorConfig("a: b # c\n'd' ünïcode", steps=7, train_steps="2:5", labels=(0, 7), variance="fixed_small"),
        energy=EnergyConfig(("yes", "no:1", "null", "1e3"), cache=True),
        policy=PolicyConfig("lora", 2, ("to_q", "resnets.0.conv1"), True),
        train=TrainConfig(behavior={"on_policy": 0.1 + 0.2, "prior": 0.7}),
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_yaml_gives_the_config_back_to_the_last_bit(tmp_path: Path, config: RunConfig) -> None:
    # On a base that differs everywhere it can: what is printed must not lean on any default.
    other = RunConfig(
        prior=PriorConfig(steps=3, eta=0.5, noise_level=0.1, precision="bf16", channels_last=True),
        train=TrainConfig(objective="rtb", updates=1, seed=9, warm_start="none"),
        device="cpu",
        threads=3,
    )
    assert read(tmp_path, to_yaml(config), other) == config
    assert read(tmp_path, json.dumps(to_mapping(config)), other) == config  # JSON is YAML


def test_a_partial_file_changes_only_what_it_says(tmp_path: Path) -> None:
    base = pretrained_recipe("folder", "a.py:b")
    read_back = read(tmp_path, "train:\n  alpha: 2\n  learning_rate: 2e-4\nprior:\n  steps: 9\n", base)
    assert read_back == dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, alpha=2.0, learning_rate=2e-4),
        prior=dataclasses.replace(base.prior, steps=9),
    )
    assert read(tmp_path, "", base) == read(tmp_path, "train:\n", base) == base


@pytest.mark.parametrize(("text", "number"), [("2e-4", 2e-4), ("1", 1.0), (".5", 0.5), ("+.5e1", 5.0), ("1_000.5", 1000.5)])
def test_numbers_as_people_write_them(tmp_path: Path, text: str, number: float) -> None:
    alpha = read(tmp_path, f"train: {{alpha: {text}}}").train.alpha
    assert alpha == number
    assert type(alpha) is float


WRONG = [
    ("alpha: 0.3", "unknown key alpha; did you mean train.alpha"),
    ("trian: {alpha: 1}", "unknown key trian; did you mean train"),
    ("train: {learning_rat: 1}", "unknown key train.learning_rat; did you mean train.learning_rate"),
    ("prior: {rank: 4}", "unknown key prior.rank; did you mean policy.rank"),
    ("certificate: {qqq: 4}", "unknown key certificate.qqq; certificate has the keys size, seed, tolerance"),
    ("1: 2", "unknown key 1; the top level has the keys task, prior"),
    ("train: {alpha: warm}", "train.alpha is 'warm', a string; expected a number"),
    ("train: {alpha: '1'}", "train.alpha is '1', a string; expected a number"),
    ("train: {alpha: true}", "train.alpha is True, a boolean; expected a number"),
    ("train: {alpha: null}", "train.alpha is null; expected a number"),
    ("train: {updates: true}", "train.updates is True, a boolean; expected a whole number"),
    ("train: {updates: 2.0}", "train.updates is 2.0, a number; expected a whole number"),
    ("train: {huber: [1]}", "train.huber is [1], a list; expected a number or null"),
    ("train: {behavior: {on_policy: x}}", "expected a mapping of strings to numbers or null"),
    ("train: {behavior: [on_policy]}", "train.behavior is ['on_policy'], a list"),
    ("train: 5", "train is 5, a whole number; it is a section with the keys objective, alpha"),
    ("energy: {terms: a.py:b}", "energy.terms is 'a.py:b', a string; expected a list of strings"),
    ("energy: {terms: [1]}", "energy.terms is [1], a list; expected a list of strings"),
    ("energy: {cache: 1}", "energy.cache is 1, a whole number; expected true or false"),
    ("policy: {kind: lorra}", "policy.kind is 'lorra', a string; expected one of full, lora, residual"),
    ("prior: {variance: big}", "expected one of fixed_large, fixed_small or null"),
    ("task: 3", "task is 3, a whole number; expected a string or null"),
    ("train: {alpha: -.5}", "alpha is -0.5; the target p_prior"),
    ("train: {alpha: .nan}", "alpha is nan"),
    ("prior: {steps: 0}", "steps is 0"),
    ("task: digits\nprior: {source: x}", "brings its own prior, but 'x' is named too"),
    ("- 1\n- 2", "holds [1, 2], a list, not the sections of a config"),
    ("just words", "holds 'just words', a string, not the sections"),
    ("train: [", "is not YAML that can be used here: expected the node content, but found '<stream end>' in line 1, column 9"),
    ("train: {alpha: 1, alpha: 2}", "the key 'alpha' is there twice in line 1, column 19"),
    ("train: {}\ntrain: {}", "the key 'train' is there twice in line 2, column 1"),
    ("{[1, 2]: 3}", "unhashable key"),
    ("a: 1\n---\nb: 2", "another document"),
    ("a: " + "[" * 5000, "nested too deeply"),
    ("\x00", "not YAML"),
]


@pytest.mark.parametrize(("text", "says"), WRONG, ids=[says for _, says in WRONG])
def test_what_is_wrong_is_said_in_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert "run.yaml" in message
    assert "\n" not in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00x")
    for name, says in (("missing.yaml", "there is no file"), (".", "cannot be read"), ("binary.yaml", "cannot be read")):
        with pytest.raises(ValueError, match=says):
            read_yaml(tmp_path / name)


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    import yaml

    mark = tmp_path / "mark"
    text = f"task: !!python/object/apply:os.mkdir ['{mark}']"
    with pytest.raises(ValueError, match="could not determine a constructor"):
        read(tmp_path, text)
    assert not mark.exists()
    yaml.unsafe_load(text)  # control: what the text does where it is allowed to
    assert mark.exists()


def test_a_bomb_of_aliases_is_refused_in_a_short_message(tmp_path: Path) -> None:
    lines = ["a: &a [x, x]"] + [
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
    ]
    with pytest.raises(ValueError, match="unknown key") as caught:
        read(tmp_path, "\n".join(lines))
    assert len(str(caught.value)) < 500
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="task is") as caught:
        from_mapping({"task": read_yaml(path)["k"]}, RunConfig(), "bomb.yaml")
    assert len(str(caught.value)) < 1000


def test_the_yaml_keys_are_frozen() -> None:
    train = """objective alpha behavior updates batch_size learning_rate epochs clip step_share
    horizon log_z_learning_rate step_nats warm_start
    warm_start_updates warm_start_rows warm_start_learning_rate warm_start_step_nats soft_value_updates population_size
    population forward_rows tempering_ess huber max_energy noise_scale max_grad_norm ema_decay spike_factor max_skipped memory_mb
    max_kl max_invalid monitor_every checkpoint_every process_timeout seed"""
    sections: dict[str, str] = {
        "prior": "source steps chain dim seed eta variance noise noise_level train_steps labels scheduler prompts prompt_metadata"
        " negative_prompt guidance image_size precision channels_last",
        "energy": "terms cache workers timeout",
        "policy": "kind rank targets gradient_checkpointing",
        "train": train,
        "certificate": "size seed tolerance",
    }
    frozen = [
        "task",
        *(f"{section}.{name}" for section, names in sections.items() for name in names.split()),
        "device",
        "threads",
        "tracker",
    ]
    assert list(leaves()) == frozen


def test_reading_a_config_does_not_import_torch(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(RunConfig()))
    code = f"""
import sys
from pathlib import Path
from tiltune.finetune.runs import run, train
from tiltune.finetune.config.yaml_file import from_mapping, read_yaml
from tiltune.finetune.config.run import RunConfig
assert from_mapping(read_yaml(Path({str(path)!r})), RunConfig(), "") == RunConfig()
print(sorted({{"torch", "diffusers", "numpy", "tyro"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_hint_of_the_tree_can_be_checked() -> None:
    # A field of a type that the checks do not know would accept nothing, or fail with a KeyError of its own.
    from tiltune.finetune.config.yaml_file import _expected

    def hints(kind: Any) -> list[Any]:
        import typing

        found = []
        for hint in typing.get_type_hints(kind).values():
            found += hints(hint) if dataclasses.is_dataclass(hint) else [hint]
        return found

    assert all(_expected(hint) for hint in hints(RunConfig))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"train": {"bank_size": 5}}, "old.yaml: train.bank_size is called train.population_size now."),
        ({"prior": {"label": 3}}, "old.yaml: prior.label is called prior.labels, a list, now."),
    ],
)
def test_a_key_of_an_earlier_version_is_told_its_name(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        from_mapping(values, RunConfig(), "old.yaml")


@pytest.mark.parametrize("labels", [[0, 7], "all", None])
def test_labels_are_a_list_or_all(labels: Any) -> None:
    read = from_mapping({"prior": {"labels": labels}}, RunConfig(), "x.yaml")
    assert read.prior.labels == (tuple(labels) if isinstance(labels, list) else labels)
    assert from_mapping(to_mapping(read), RunConfig(), "again") == read
