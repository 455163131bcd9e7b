"""How far the policy moves while it trains, against closed forms; the budget of nats; what is said over several conditions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.finetune.test_trainer import make_config, make_task, small_policy
from tiltune.finetune.distributed.processes import Processes
from tiltune.finetune.learning.drift import Drift, over_budget
from tiltune.finetune.learning.trainer import Trainer
from tiltune.finetune.runs.verdicts import together


def test_kl_and_diversity_by_condition() -> None:
    """The second condition's samples are the prior's own at half of their size."""
    prior = torch.randn(80, 3, generator=torch.Generator().manual_seed(0))
    rows = [torch.arange(0, 80, 2), torch.arange(1, 80, 2)]
    ratio, scale = torch.zeros(80), torch.ones(80, 1)
    ratio[rows[0]], ratio[rows[1]], scale[rows[1]] = 0.25, 4.0, 0.5

    class Paths:
        terminal, groups = prior, rows

    class Population:
        prior_paths = Paths()

    alone = Processes(torch.device("cpu"), 1.0)
    drift: Any = Drift(alone)
    found = drift(scale * prior, ratio, rows, Population())
    assert [one["kl_to_prior"] for one in found] == [0.25, 4.0]
    assert [one["diversity"] for one in found] == pytest.approx([1.0, 0.5], rel=1e-4)
    assert math.isnan(Drift(alone)(prior, ratio, rows, None)[0]["diversity"])


def test_the_updates_end_at_their_budget() -> None:
    """The exact target is 1.2²/2 · 1.5 nats or so away: half a nat is passed on the way, and five are not."""

    def run(max_kl: float | None) -> list[dict[str, Any]]:
        task = make_task()
        config = make_config(objective="reinforce_kl", max_kl=max_kl, batch_size=512, monitor_every=1000)
        prior = task.prior()
        result = Trainer(prior, task.energy, config, policy=small_policy(prior), progress=False).train()
        return [line for line in result.history if line["phase"] == "reinforce_kl"]

    free, bounded, wide = run(None), run(0.5), run(5.0)
    assert len(free) == len(wide) == 60 and free == wide
    assert 0 < len(bounded) < 60 and bounded == free[: len(bounded)]
    certain = [line["kl_to_prior"] - 2.6 * line["kl_to_prior_se"] for line in bounded]
    assert certain[-1] > 0.5 >= max(certain[:-1])
    assert over_budget(bounded[-1], 0.5) and not over_budget(free[0], 5.0)
    sure, unsure = {"kl_to_prior": 3.0, "kl_to_prior_se": 0.1}, {"kl_to_prior": 3.0, "kl_to_prior_se": 0.5}
    said = over_budget({"kl_to_prior": 3.0, "conditions": {"a": unsure, "b": sure}}, 2.0)
    assert said is not None and "'b' is 3.00 ± 0.10 nats" in said


def test_median_and_worst_over_conditions() -> None:
    def certificate(gap: float, ess: float) -> dict[str, Any]:
        verdict = "pass" if gap < 1 else "inconclusive"
        same = {"energy_calls": 1, "certificate_energy_calls": 2, "kl_to_prior": 1.0, "kl_from_target": math.nan}
        return {"verdict": verdict, "gap": gap, "ess": ess, **same}

    found = together({"a": certificate(0.5, 0.9), "b": certificate(2.0, 0.3), "c": certificate(0.1, 0.5)}, ["d"])["summary"]
    assert found["gap"] == {"median": 0.5, "worst": 2.0, "of": "b"}
    assert found["ess"] == {"median": 0.5, "worst": 0.3, "of": "b"}
    assert math.isnan(found["kl_from_target"]["worst"]) and found["decided"] == 0.5 and found["pass"] == 0.5
