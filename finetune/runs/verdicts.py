"""The certificates of a run's conditions, put together: each condition has a law of its own, and so a verdict of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..certificate.criteria import EXIT_STATUS, SEVEREST, Verdict

# What is summarized over conditions; whether a large figure is the worse one.
SUMMARIZED = {"gap": True, "kl_to_prior": True, "kl_from_target": True, "ess": False}


def together(certificates: dict[str, dict[str, Any]], missing: Sequence[str] = ()) -> dict[str, Any]:
    """The certificate of a run of several conditions from {condition: certificate}: a fail where one fails, a pass where all of
    them pass, else inconclusive. They stand under "conditions"; the energy calls of the certificates are added up.

    "summary" has the share of conditions that are decided, and of gap, KL and ESS the median and the worst, with its condition.

    missing: conditions that are not judged yet, and so inconclusive.
    """
    verdicts: dict[str, Verdict] = {name: certificate["verdict"] for name, certificate in certificates.items()}
    verdicts |= dict.fromkeys(missing, "inconclusive")
    verdict = next(severe for severe in SEVEREST if severe in verdicts.values())
    decisive = [name for name, found in verdicts.items() if found == verdict]
    first = next(iter(certificates.values()))
    return {
        "verdict": verdict,
        "reasons": [
            f"{verdict} for {len(decisive)} of {len(verdicts)} conditions: {', '.join(decisive)}",
            *[f"{name} is not judged yet" for name in missing],
        ],
        "exit_status": EXIT_STATUS[verdict],
        "energy_calls": first["energy_calls"],
        "certificate_energy_calls": sum(certificate["certificate_energy_calls"] for certificate in certificates.values()),
        "summary": {
            "decided": sum(found != "inconclusive" for found in verdicts.values()) / len(verdicts),
            "pass": sum(found == "pass" for found in verdicts.values()) / len(verdicts),
            **{name: _summary({of: one[name] for of, one in certificates.items()}, large) for name, large in SUMMARIZED.items()},
        },
        "conditions": certificates,
    }


def _summary(values: dict[str, float], large_is_worse: bool) -> dict[str, Any]:
    """The median, and the worst with the name of its condition; what is no number is worst of all."""

    def badness(name: str) -> float:
        value = values[name]
        return math.inf if math.isnan(value) else value if large_is_worse else -value

    ranked = sorted(values, key=badness)
    middle = values[ranked[(len(ranked) - 1) // 2]], values[ranked[len(ranked) // 2]]
    return {"median": sum(middle) / 2, "worst": values[ranked[-1]], "of": ranked[-1]}
