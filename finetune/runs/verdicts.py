"""The certificates of a run's conditions, put together: each condition has a law of its own, and so a verdict of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..certificate.criteria import EXIT_STATUS, Verdict

SEVEREST: tuple[Verdict, ...] = ("fail", "inconclusive", "pass")


def together(certificates: dict[str, dict[str, Any]], missing: Sequence[str] = ()) -> dict[str, Any]:
    """The certificate of a run of several conditions from {condition: certificate}: a fail where one fails, a pass where all of
    them pass, else inconclusive. They stand under "conditions"; the energy calls of the certificates are added up.

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
        "conditions": certificates,
    }
