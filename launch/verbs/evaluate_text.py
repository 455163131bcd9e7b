"""What `tiltune evaluate` prints of a certificate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any


def verdict_line(certificate: dict[str, Any]) -> str:
    """The verdict and its reasons."""
    return f"verdict: {certificate['verdict']}: {'; '.join(certificate['reasons'])}"


def summary(certificate: dict[str, Any], folder: Path) -> str:
    """The verdict in one line, and the metrics behind it."""

    def shown(name: str, digits: int = 3) -> str:
        return f"{certificate[name]:.{digits}f} ± {certificate[f'{name}_se']:.{digits}f}"

    lines = [
        f"ELBO {shown('elbo')} ≤ log Z {shown('log_z')} (target side {shown('log_z_forward')}) ≤ EUBO {shown('eubo')}",
        f"gap {shown('gap')}   ESS {certificate['ess']:.3f}   target side {certificate['target_ess']:.0f} effective of"
        f" {certificate['size']}   Pareto-k {certificate['pareto_k']:.2f}",
        prior_line(certificate),
        *task_lines(certificate),
        f"{certificate['energy_calls']:,} energy calls in training, {certificate['certificate_energy_calls']:,} in the"
        f" certificate; written to {folder}",
        *[f"flag: {flag}" for flag in certificate["flags"] if flag not in certificate["reasons"]],
        verdict_line(certificate),
    ]
    return "\n".join(lines)


def summary_lines(certificate: dict[str, Any]) -> list[str]:
    """Median and worst of all conditions."""
    found = certificate["summary"]
    named = {"gap": "gap", "kl_to_prior": "KL(policy || prior)", "kl_from_target": "KL(target || policy)", "ess": "ESS"}
    shown = [
        f"{said} {found[name]['median']:.3f}, worst {found[name]['worst']:.3f} ({found[name]['of']})"
        for name, said in named.items()
    ]
    return [f"decided {found['decided']:.0%}, pass {found['pass']:.0%}   median and worst: {'   '.join(shown)}"]


def prior_line(certificate: dict[str, Any]) -> str:
    """What the training changed: mean energy, gap and cell difference of the policy, and of the prior it started from."""
    prior, compared = certificate["prior"], certificate["verdict_unknown_truth"]
    moved = f"KL(policy || prior) {certificate['kl_to_prior']:.3f}"
    gap = f"gap {certificate['gap']:.3f} (prior {prior['gap']:.3f})"
    energy = f"mean energy {certificate['mean_energy']:.3f} (prior {prior['mean_energy']:.3f})"
    cells = f"   cell TV {compared['cell_tv']:.3f} (prior {prior['cell_tv']:.3f})" if "cell_tv" in compared else ""
    return f"{energy}   {gap}   {moved}{cells}"


def task_lines(certificate: dict[str, Any]) -> list[str]:
    """What a task knows of its samples, and the same of samples resampled by weight; empty without a task's metrics."""
    lines = []
    for title, metrics in (("policy", certificate), ("reweighted, as by sample --exact", certificate.get("exact", {}))):
        shown = [
            f"{name.replace('_', ' ')} {metrics[name]:.3f}"
            + (f" ({metrics[f'{name}_reference']:.3f})" if f"{name}_reference" in metrics else "")
            for name in ("share", "diversity", "residual", "component_tv", "energy_tv", "w2_ratio")
            if name in metrics
        ]
        if shown:
            lines.append(f"{title}: {'   '.join(shown)}")
    return lines


def deployed(rows: list[dict[str, Any]]) -> list[str]:
    """A table of what plain diffusers loops around the policy give; empty where there is no scheduler to deploy."""
    if len(rows) < 3:
        return []

    def against(row: dict[str, Any], side: str) -> str:
        distance, null = row[f"{side}_cell_tv"], row[f"{side}_cell_tv_null"]
        return f"{'':>15}" if distance is None else f"{distance:>8.3f} ({null:.3f})"

    lines = [f"{'deployed':<34}{'steps':>6}{'energy':>10}{'cell TV: chain':>16}{'target':>16}    (by chance)"]
    for row in rows:
        energy = math.nan if row["energy"] is None else row["energy"]
        lines.append(f"{row['sampler']:<34}{row['steps']:>6}{energy:>10.3f} {against(row, 'chain')} {against(row, 'target')}")
    return lines
