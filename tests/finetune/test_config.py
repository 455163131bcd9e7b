"""The configuration refuses what no run can have, before any work, and needs no torch to do it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest

from tiltune.finetune.config.certificate import CertificateConfig
from tiltune.finetune.config.energy import EnergyConfig
from tiltune.finetune.config.policy import PolicyConfig
from tiltune.finetune.config.prior import PriorConfig
from tiltune.finetune.config.run import RunConfig, pretrained_recipe
from tiltune.finetune.config.train import BEHAVIOR_NAMES, ObjectiveName, TrainConfig
from tiltune.finetune.learning.behaviors import BEHAVIORS
from tiltune.finetune.learning.objective_table import OBJECTIVES

REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"alpha": 0.0}, "alpha is 0.0.*alpha > 0"),
    ({"alpha": -1.0}, "alpha is -1.0"),
    ({"alpha": math.nan}, "alpha is nan"),
    ({"alpha": math.inf}, "alpha is inf"),
    ({"objective": "ppo"}, "unknown objective 'ppo'; choose one of rtb"),
    ({"batch_size": 0}, "batch_size is 0; it must be positive"),
    ({"batch_size": 1}, "at least 2"),
    ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ({"learning_rate": math.nan}, "learning_rate is nan"),
    ({"log_z_learning_rate": -0.1}, "log_z_learning_rate"),
    ({"population_size": 0}, "population_size is 0"),
    ({"population_size": 1, "soft_value_updates": 3}, "two halves of the population"),
    ({"max_energy": -1.0}, "max_energy is -1.0"),
    ({"memory_mb": 0.0}, "memory_mb is 0.0"),
    ({"updates": -1}, "updates is -1"),
    ({"warm_start_updates": -1}, "warm_start_updates is -1"),
    ({"warm_start": "rtb"}, "warm_start is 'rtb'"),
    ({"noise_scale": 0.5}, "noise_scale is 0.5"),
    ({"tempering_ess": 0.0}, "tempering_ess is 0.0"),
    ({"tempering_ess": 1.0}, "tempering_ess is 1.0"),
    ({"huber": 0.0}, "huber is 0.0"),
    ({"behavior": {"off_policy": 1.0}}, "unknown behavior 'off_policy'"),
    ({"behavior": {"on_policy": 1.0, "prior": 0.0}}, "share of behavior prior is 0.0; leave it out"),
    ({"behavior": {"on_policy": 1.5, "prior": -0.5}}, "share of behavior prior is -0.5"),
    ({"behavior": {"on_policy": 0.5, "prior": 0.4}}, "sum to 0.9; they must sum to 1"),
    ({"behavior": {}}, "sum to 0"),
    (
        {"objective": "reinforce_kl", "behavior": {"on_policy": 0.5, "noised_back": 0.5}},
        "reinforce_kl cannot use noised_back.*rtb, log_variance or trust_pcl",
    ),
    ({"objective": "tlm", "behavior": {"on_policy": 1.0}}, "tlm maximizes the likelihood.*noised_back"),
    ({"objective": "tlm", "behavior": {"noised_back": 0.5, "prior": 0.5}}, "fits the wrong law"),
]


@pytest.mark.parametrize(("values", "message"), REFUSALS, ids=[str(values) for values, _ in REFUSALS])
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)


@pytest.mark.parametrize("objective", get_args(ObjectiveName))
def test_every_objective_has_default_behaviors_it_is_right_on(objective: Any) -> None:
    config = TrainConfig(objective=objective, warm_start="none", tempering_ess=None)
    assert sum(config.shares.values()) == pytest.approx(1.0)
    assert set(config.shares) <= OBJECTIVES[objective].behaviors


@pytest.mark.parametrize("behavior", BEHAVIOR_NAMES)
@pytest.mark.parametrize("objective", get_args(ObjectiveName))
def test_config_and_objectives_agree_on_every_pair(objective: Any, behavior: str) -> None:
    allowed = behavior in OBJECTIVES[objective].behaviors
    shares = {"replay": 0.5, "on_policy": 0.5} if behavior == "replay" else {behavior: 1.0}  # somebody has to draw
    try:
        # Comparators start from the prior, at one alpha.
        TrainConfig(objective=objective, behavior=shares, warm_start="none", tempering_ess=None)
    except ValueError:
        assert not allowed
    else:
        assert allowed


def test_the_names_are_the_same_everywhere() -> None:
    assert set(get_args(ObjectiveName)) == set(OBJECTIVES)
    assert set(BEHAVIOR_NAMES) == set(BEHAVIORS)
    for name in ("rtb", "log_variance", "trust_pcl"):  # these need no behavior density, so any trajectories will do
        assert OBJECTIVES[name].behaviors == set(BEHAVIORS)


def test_on_policy_comes_first_whatever_the_order_given() -> None:
    config = TrainConfig(behavior={"prior": 0.25, "noised_back": 0.25, "on_policy": 0.5})
    assert list(config.shares) == ["on_policy", "prior", "noised_back"]


def test_a_config_survives_json() -> None:
    config = TrainConfig(objective="rtb", alpha=0.25)
    values = json.loads(json.dumps(config.to_dict()))
    assert TrainConfig(**values).to_dict() == config.to_dict()
    assert set(values) == {field.name for field in fields(TrainConfig)}


def test_importing_the_config_does_not_import_torch() -> None:
    code = (
        "import sys, tiltune; from tiltune.finetune.config.train import TrainConfig; TrainConfig();"
        " print(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the tree of a whole run -----------------------------------------------------------------------------------------

RUN_REFUSALS: list[tuple[Any, dict[str, Any], str]] = [
    (PriorConfig, {"steps": 0}, "steps is 0"),
    (PriorConfig, {"eta": -0.5}, "eta is -0.5"),
    (PriorConfig, {"eta": math.nan}, "eta is nan"),
    (PriorConfig, {"noise_level": 0.0}, "noise_level is 0.0"),
    (PriorConfig, {"labels": (3, -1)}, "labels holds -1"),
    (PriorConfig, {"labels": (3, 1, 3)}, "labels holds 3 twice"),
    (PriorConfig, {"labels": ()}, "labels is an empty list"),
    (PriorConfig, {"labels": "some"}, "labels is 'some'"),
    (PriorConfig, {"train_steps": "3"}, "train_steps is '3'; write FIRST:LAST"),
    (PriorConfig, {"train_steps": "3:2"}, "train_steps 3:2 holds no step"),
    (PriorConfig, {"steps": 5, "train_steps": "3:5"}, "whose 5 steps are 0 to 4"),
    (PriorConfig, {"variance": "large"}, "variance is 'large'; choose one of fixed_large, fixed_small"),
    (PriorConfig, {"noise": "none"}, "noise is 'none'; choose one of memoryless, flow_grpo"),
    (PriorConfig, {"precision": "int8"}, "precision is 'int8'; choose one of float32, bf16, fp16"),
    (EnergyConfig, {"terms": "a.py:b"}, "it is a tuple of terms"),
    (EnergyConfig, {"terms": ("a.py:b", " ")}, "an energy term is empty"),
    (PolicyConfig, {"kind": "lorra"}, "kind is 'lorra'; choose one of full, lora, residual"),
    (PolicyConfig, {"rank": 0}, "rank is 0"),
    (PolicyConfig, {"targets": ("to_q",)}, "the policy is 'full'; choose 'lora', or leave targets out"),
    (CertificateConfig, {"size": 99}, "fewer than 100"),
    (CertificateConfig, {"seed": -1}, "must not be negative"),
    (RunConfig, {"device": "tpu"}, "device is 'tpu'; choose one of auto, cpu, cuda"),
    (RunConfig, {"threads": 0}, "threads is 0"),
    (RunConfig, {"task": "digits", "prior": PriorConfig("x")}, "brings its own prior, but 'x' is named too"),
]


@pytest.mark.parametrize(("kind", "values", "message"), RUN_REFUSALS, ids=[f"{k.__name__} {v}" for k, v, _ in RUN_REFUSALS])
def test_parts_of_a_run_are_refused_when_built(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_the_recipe_for_a_strangers_prior_is_a_whole_config() -> None:
    config = pretrained_recipe("folder", "a.py:b", "c.py:d")
    assert (config.prior.source, config.energy.terms) == ("folder", ("a.py:b", "c.py:d"))
    assert config.train.shares == {"on_policy": 1.0}  # stored paths of a small population are soon learned by heart
    assert pretrained_recipe() == RunConfig(train=config.train)


def test_every_field_says_what_it_is_for_or_needs_no_words() -> None:
    # The texts below the fields are the command line's help.
    import ast

    import tiltune.finetune.config as package

    silent, seen = set(), 0
    for file in Path(package.__path__[0]).glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                seen += 1
                for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                    if isinstance(field, ast.AnnAssign) and not isinstance(after, ast.Expr):
                        silent.add(ast.unparse(field.target))
    assert seen == 6
    sections = {"prior", "energy", "policy", "train", "certificate"}
    assert silent - sections <= {"warm_start_updates", "warm_start_learning_rate", "max_grad_norm", "seed"}
