"""Which baseline serves an on-policy training best (arXiv 2509.01632, section 3: log Z of RTB is one)?

All arms have the same gradient in the mean, REINFORCE of the reward -E - alpha Λ, and differ in what they subtract from it:
nothing, a log Z that is learned, that of the others, or beside it what a soft value expects at each step. Log-variance is the
control: its gradient is that of the others' mean. Residuals have no limit here (huber), which would be one more difference.
The soft value is learned from a population, whose energy calls the others do not have: the table states them.
"""

from __future__ import annotations

from .comparison import Arm, Settings, comparison
from .study import Size, Study

QUESTION = "Which baseline serves an on-policy training best?"
ARMS = {
    "leave_one_out": Arm("leave-one-out (REINFORCE-KL)", {"huber": None, "objective": "reinforce_kl"}),
    "none": Arm(
        "none (RTB with log Z fixed at 0)", {"huber": None, "objective": "rtb", "log_z_learning_rate": 1e-12}, "leave_one_out"
    ),
    "learned": Arm("learned log Z (RTB), from 0, rate .3", {"huber": None, "objective": "rtb"}, "leave_one_out"),
    "slow": Arm(
        "learned log Z (RTB), from 0, rate .02", {"huber": None, "objective": "rtb", "log_z_learning_rate": 0.02}, "leave_one_out"
    ),
    "batch": Arm("log-variance, the same gradient (control)", {"huber": None, "objective": "log_variance"}, "leave_one_out"),
    "soft_value": Arm(
        "soft value of each step, and leave-one-out",
        {
            "huber": None,
            "objective": "reinforce_kl",
            "soft_value_updates": 600,
            "population_size": 4000,
            "population": "importance",
        },
        "leave_one_out",
    ),
}
SIZES: dict[Size, Settings] = {
    "quick": Settings(dims=(2,), steps=20, updates=(5, 10), seeds=2, samples=300),
    "default": Settings(),
    "full": Settings(dims=(2, 10, 50), updates=(20, 80, 320), samples=2000, seeds=10),
}


def study_of(settings: Settings) -> Study:
    """The study with these settings."""
    return comparison("baselines", QUESTION, ARMS, settings)
