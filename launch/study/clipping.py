"""What does clipping an update buy (arXiv 2509.01632, question 2)?

Several gradient steps on each batch make an on-policy training one of old trajectories. A clip bounds how far each step of a
trajectory may be pushed before a new rollout; a bound in nats shortens the optimizer's step, whatever pushes it. Arms: RTB,
which is right on any trajectories, without and with a clip, and PPO with the KL in its reward, which is the clipped
log-variance, at eight epochs and at two step sizes; and RTB at one epoch, where a clip does nothing. The bound in nats is off
but where it is named, for it would hide what the clip does.
"""

from __future__ import annotations

from typing import Any

from .comparison import Arm, Settings, comparison
from .study import Size, Study

QUESTION = "What does clipping an update buy?"
UNBOUNDED = 1e6  # nats
EPOCHS, RATES = (1, 8), (3e-3, 3e-2)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtb": ("RTB", {"objective": "rtb"}),
    "rtb_clipped": ("RTB, clipped", {"objective": "rtb", "clip": 0.2}),
    "ppo_kl": ("PPO with KL", {"objective": "ppo_kl"}),
    "rtb_bounded": ("RTB, at most 1 nat a step", {"objective": "rtb", "step_nats": 1.0}),
}
SIZES: dict[Size, Settings] = {
    "quick": Settings(dims=(2,), steps=20, updates=(6,), batch_size=40, seeds=2, samples=200),
    "default": Settings(updates=(10, 20)),
    "full": Settings(dims=(2, 10, 50), updates=(20, 80), samples=2000, seeds=10),
}


def arms() -> dict[str, Arm]:
    """Every method at every number of epochs and step size, compared with RTB at the same ones; RTB itself with one epoch."""
    found: dict[str, Arm] = {}
    for rate in RATES:
        for epochs in EPOCHS:
            for method, (label, changes) in METHODS.items():
                if epochs == 1 and method in ("rtb_clipped", "ppo_kl"):
                    continue  # in the first epoch nothing is clipped
                against = f"rtb-{epochs}-{rate:g}" if method != "rtb" else f"rtb-1-{rate:g}" if epochs > 1 else None
                setting = {"step_nats": UNBOUNDED, "epochs": epochs, "learning_rate": rate, **changes}
                name = f"{label}, {epochs} epoch{'s' if epochs > 1 else ''}, rate {rate:g}"
                found[f"{method}-{epochs}-{rate:g}"] = Arm(name, setting, against)
    return found


def study_of(settings: Settings) -> Study:
    """The study with these settings."""
    return comparison("clipping", QUESTION, arms(), settings)
