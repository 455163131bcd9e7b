"""What `tiltune audit` says, in words."""

from __future__ import annotations

import math
from typing import Any

COLLAPSED = 0.5  # of the target's mean distance between two samples, below which a policy is called collapsed
SIDES = {"prior": "base", "policy": "policy", "target": "tilt"}


def of_condition(found: dict[str, Any]) -> list[str]:
    """The figures of one prompt or label."""
    alpha = "none" if found["alpha"] == math.inf else f"{'below ' if found['beyond'] else ''}{found['alpha']:.3g}"
    title = [found["condition"]] if found["condition"] else []
    moved = f"{found['kl_to_prior']:.3f} ± {found['kl_to_prior_se']:.3f}"
    energies = " ".join(f"{found[f'energy_{side}']:.4g} ({said})" for side, said in SIDES.items())
    return [
        *title,
        f"KL(policy || base) {moved} nats, of which the tilt needs {found['least_kl']:.3f}   its own closest alpha {alpha}",
        f"mean energy {energies}",
        f"distance between two samples {found['diversity']:.2f} of the tilt's, {found['diversity_of_prior']:.2f} of the base's",
        f"gap {found['gap']:.3f} ± {found['gap_se']:.3f}   KL(tilt || policy) {found['kl_from_target']:.3f}   share of the tilt"
        f" that is drawn ten times too rarely {found['undercovered'] or 0:.3f}   {found['verdict']}",
    ]


def overall(found: dict[str, Any]) -> list[str]:
    """The answer, a sentence a line."""
    conditions, closest = found["conditions"], found["closest"]
    moved = sum(one["kl_to_prior"] for one in conditions) / len(conditions)
    if found["untouched"]:
        return ["It was never trained: at every state its output is the base's, to the last bit."]
    if not found["moved"]:
        return [f"It hardly moved: KL(policy || base) is {moved:.2g} nats, within its error of 0."]
    lines = [
        f"It moved: KL(policy || base) is {moved:.2f} nats in the mean over {len(conditions)} law{'s' * (len(conditions) > 1)}."
    ]
    least = sum(one["least_kl"] for one in conditions) / len(conditions)
    if closest["alpha"] == math.inf:
        lines.append("Its energies are not lower than the base's, so no temperature explains the move.")
    elif closest["beyond"]:
        lines += [
            "Its energies are lower than those of any tilt that the base's samples know; more rollouts (--size) reach lower.",
            f"The figures are at the lowest alpha that they know, {closest['alpha']:.3g}, of {closest['effective']:.0f} effective"
            " samples.",
        ]
    else:
        lines.append(
            f"It is closest to the tilt at alpha = {closest['alpha']:.3g}, which has its mean energy at {least:.2f} nats:"
            f" {moved - least:.2f} of its nats serve nothing."
        )
    spread = sum(one["diversity"] for one in conditions) / len(conditions)
    if spread < COLLAPSED:
        lines.append(f"It collapsed: two of its samples are {spread:.2f} times as far apart as two of the tilt.")
    words = {
        "pass": "It draws that tilt: no share is off by more than the tolerance.",
        "fail": "It does not draw that tilt.",
        "inconclusive": "Whether it draws that tilt is not decided by so many rollouts.",
    }
    if closest["alpha"] != math.inf:
        lines.append(words[found["verdict"]])
    return lines
