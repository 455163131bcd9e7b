"""What `tiltune audit` says, in words."""

from __future__ import annotations

import math
from typing import Any

COLLAPSED = 0.5  # of the tilt's mean distance between two samples, below which a policy is called collapsed
SIDES = {"prior": "base", "policy": "policy", "target": "tilt"}
VERDICTS = {
    "pass": "It draws that tilt: no share is off by more than the tolerance.",
    "fail": "It does not draw that tilt.",
    "inconclusive": "Whether it draws that tilt is not decided by so many rollouts.",
}


def of_condition(found: dict[str, Any]) -> list[str]:
    """The figures of one prompt or label."""
    alpha = "none" if found["alpha"] == math.inf else f"{'below ' if found['beyond'] else ''}{found['alpha']:.3g}"
    title = [found["condition"]] if found["condition"] else []
    moved = f"{found['kl_to_prior']:.3f} ± {found['kl_to_prior_se']:.3f}"
    energies = " ".join(f"{found[f'energy_{side}']:.4g} ({said})" for side, said in SIDES.items())
    rarely = "not known" if found["undercovered"] is None else f"{found['undercovered']:.3f}"
    return [
        *title,
        f"KL(policy || base) {moved} nats; by itself it is closest to alpha {alpha}, whose tilt needs {found['least_kl']:.3f}",
        f"mean energy {energies}",
        f"distance between two samples {found['diversity']:.2f} of the tilt's, {found['diversity_of_prior']:.2f} of the base's",
        f"gap {found['gap']:.3f} ± {found['gap_se']:.3f}   KL(tilt || policy) {found['kl_from_target']:.3f}   share of the tilt"
        f" that is drawn ten times too rarely {rarely}   {found['verdict']}",
    ]


def overall(found: dict[str, Any]) -> list[str]:
    """The answer, a sentence a line."""
    conditions, closest = found["conditions"], found["closest"]
    moved = sum(one["kl_to_prior"] for one in conditions) / len(conditions)
    if found["untouched"]:
        return ["It was never trained: at every state of every rollout its output is the base's, to the last bit."]
    if not found["moved"]:
        return [f"It hardly moved: KL(policy || base) is {moved:.2g} nats, within its error of 0."]
    among = f" in the mean over {len(conditions)} prompts or labels" if len(conditions) > 1 else ""
    lines = [f"It moved: KL(policy || base) is {moved:.2f} nats{among}."]
    if closest["alpha"] == math.inf:
        return [*lines, "Its energies are not lower than the base's, so no temperature explains the move."]
    if closest["beyond"]:
        lines += [
            "Its energies are lower than those of any tilt that the base's samples know; more rollouts (--size) reach lower.",
            f"The figures are at the lowest alpha that they know, {closest['alpha']:.3g}, of {closest['effective']:.0f} effective"
            " samples.",
        ]
    else:
        needed = sum(one["kl_from_common"] for one in conditions) / len(conditions)
        lines.append(
            f"It is closest to the tilt at alpha = {closest['alpha']:.3g}, which has its mean energy at {needed:.2f} nats:"
            f" {moved - needed:.2f} of its nats were not needed for that energy."
        )
    worst = min(conditions, key=lambda one: one["diversity"])
    if worst["diversity"] < COLLAPSED:
        of = f" of {worst['condition']!r}" if worst["condition"] else ""
        lines.append(f"It collapsed: two samples{of} are {worst['diversity']:.2f} times as far apart as two of the tilt.")
    if found["remembers"]:
        lines.append("The samples remember their start, which base and policy share: the tilt of paths is not that of samples.")
    return [*lines, VERDICTS[found["verdict"]]]
