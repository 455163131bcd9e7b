"""What `tiltune 2d` prints: a certificate in a few lines, and a table of several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def summary(certificate: dict[str, Any], out: Path) -> str:
    """The verdict in one line, and the metrics behind it."""

    def beside(name: str, reference: str) -> str:
        other = certificate[reference]
        return f"{certificate[name]:.3f}" + ("" if other is None else f" (reference {other:.3f})")

    lines = [
        f"W2 {certificate['w2']:.2f} (two exact sets {certificate['w2_exact']:.2f})   mode TV {certificate['mode_tv']:.3f}"
        f" (exact {certificate['mode_tv_exact']:.3f})   worst mode spread off by {certificate['mode_spread_error']:.1%}",
        f"ELBO {certificate['elbo']:.3f} ≤ log Z {certificate['log_z']:.3f} (chain {certificate['log_z_true']:.3f}) ≤ EUBO"
        f" {certificate['eubo']:.3f}   gap {beside('gap', 'gap_reference')}   ESS {beside('ess', 'ess_reference')}",
        f"{certificate['energy_calls']:,} energy calls in training, {certificate['certificate_energy_calls']:,} in the"
        f" certificate, {certificate['seconds']:.0f} s; written to {out}",
        *training_lines(certificate["improvement"]),
        *[f"flag: {flag}" for flag in certificate["flags"]],
        f"verdict: {certificate['verdict']}: {'; '.join(certificate['reasons'])}",
    ]
    return "\n".join(lines)


def training_lines(improvement: dict[str, Any] | None) -> list[str]:
    """How much closer than the prior the training saw itself, and where the updates were not what it ended at."""
    if improvement is None:
        return []
    at_warm_start = improvement["reached"] == "the warm start"
    undone = " The updates came no closer than the warm start, which the policy is of." if at_warm_start else ""
    return [f"training: {improvement['sentence']}{undone}"]


def comparison(runs: dict[str, tuple[Tensor, dict[str, Any]]]) -> str:
    """A table of certificates, one row a run."""
    lines = [f"{'':<27}{'W2 ratio':>9}{'mode TV':>9}{'log Z':>8}{'ELBO':>8}{'EUBO':>8}{'ESS':>6}  {'policy of':<16}verdict"]
    for name, (_, c) in runs.items():
        lines.append(
            f"{name:<27}{c['w2_ratio']:>9.2f}{c['mode_tv']:>9.3f}{c['log_z']:>8.3f}{c['elbo']:>8.2f}{c['eubo']:>8.2f}"
            f"{c['ess']:>6.2f}  {c['improvement']['reached'] if c['improvement'] else '':<16}{c['verdict']}"
        )
    return "\n".join(lines)
