"""Where should trajectories come from, at equal energy calls: coverage, gap and W2 (arXiv 2509.01632, question 1)?

Log-variance is right on any trajectories, and learns nothing beside the policy that could start otherwise in one arm. Each arm
spends the same energy calls on its source: rollouts of the policy, the same with inflated noise, prior paths, weighted prior
paths drawn whole or noised back, half of each batch from the policy, or the policy's rollouts of the last updates once more.
"""

from __future__ import annotations

from .comparison import Arm, Settings, comparison
from .methods import importance_size
from .study import Size, Study

QUESTION = "Where should trajectories come from, at equal energy calls?"
SIZES: dict[Size, Settings] = {
    "quick": Settings(dims=(2,), steps=20, updates=(10,), seeds=2, samples=300),
    "default": Settings(updates=(40,)),
    "full": Settings(dims=(2, 10, 50), updates=(160,), samples=2000, seeds=10),
}


def arms(settings: Settings) -> dict[str, Arm]:
    """Each with as many energy calls as on-policy updates of this batch size."""
    updates, batch = settings.updates[-1], settings.batch_size
    calls = updates * batch  # without the probe, which all have
    whole, half = importance_size(calls), importance_size(calls // 2)
    population = {"objective": "log_variance", "population": "importance"}
    return {
        "on_policy": Arm("on-policy", {"objective": "log_variance"}),
        "inflated": Arm("inflated noise", {"objective": "log_variance", "behavior": {"inflated": 1.0}}, "on_policy"),
        "replay": Arm(
            "on-policy, and as many replayed",
            {"objective": "log_variance", "behavior": {"on_policy": 0.5, "replay": 0.5}, "batch_size": 2 * batch},
            "on_policy",
        ),
        "prior": Arm("prior", {"objective": "log_variance", "behavior": {"prior": 1.0}}, "on_policy"),
        "tilted_prior": Arm(
            "tilted prior", {**population, "behavior": {"tilted_prior": 1.0}, "population_size": whole}, "on_policy"
        ),
        "noised_back": Arm(
            "noised back", {**population, "behavior": {"noised_back": 1.0}, "population_size": whole}, "on_policy"
        ),
        "half": Arm(
            "half on-policy, half tilted prior",
            {**population, "behavior": {"on_policy": 0.5, "tilted_prior": 0.5}, "population_size": half},
            "on_policy",
        ),
    }


def study_of(settings: Settings) -> Study:
    """The study with these settings."""
    return comparison("behaviors", QUESTION, arms(settings), settings)
