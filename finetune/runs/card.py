"""The model card of an exported policy: what it was trained from, toward what, and how close its certificate says it came."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .run import Run

FIGURES = {
    "verdict": "verdict",
    "elbo": "ELBO",
    "log_z_forward": "log Z",
    "eubo": "EUBO",
    "gap": "gap, KL both ways",
    "kl_to_prior": "KL(policy \\|\\| prior)",
    "kl_from_target": "KL(target \\|\\| policy)",
    "ess": "effective share",
    "mean_energy": "mean energy",
}


def model_card(run: Run) -> str:
    """Markdown: base, energy, alpha, objective, seed, and what certificate.json says of each condition, where there is one."""
    config, record = run.config, run.record
    rows = {
        "base": _base(run),
        "chain": f"{run.prior.chain.name}, K = {run.prior.chain.num_steps}",
        "energy": " + ".join(map(_unplaced, record.get("energy") or ())) or "a function without a name",
        "alpha": f"{config.train.alpha:g}: the target is p_prior(x) · exp(-E(x)/alpha)",
        "objective": config.train.objective,
        "energy calls": f"{record['energy_calls']:,}",
        "seed": str(config.train.seed),
    }
    if config.prior.prompts:
        rows["prompts"] = "; ".join(config.prior.prompts)
        rows["guidance"] = f"{run.prior.denoiser.guidance:g}"
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    source = run.config.prior.source
    known = [] if source is None or os.path.isdir(source) else [f"base_model: {json.dumps(source)}"]  # of a hub alone
    matter = "\n".join(["---", *known, "library_name: diffusers", "tags: [tiltune]", "---"])  # what a hub reads
    title = f"# {_base(run)}, tilted by tiltune"
    return "\n\n".join([matter, title, f"| | |\n|---|---|\n{table}", _certificate(run.folder)])


def _unplaced(term: str) -> str:
    """An energy's name without the folder of its file."""
    scale, times, name = term.rpartition("*") if "*" in term.split(":")[0] else ("", "", term)
    return f"{scale}{times}{os.path.basename(name.split(':')[0])}:{name.split(':', 1)[1]}" if ":" in name else term


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _base(run: Run) -> str:
    """The hub id, the folder's name, or the task: not a path of this machine."""
    if run.config.prior.source is None:
        return f"the prior of tiltune's task {run.config.task}"
    return Path(run.config.prior.source).name if os.path.isdir(run.config.prior.source) else run.config.prior.source


def _certificate(folder: Path) -> str:
    path = folder / "certificate.json"
    if not path.exists():
        return "No certificate was made: nobody measured how close it came to its target."
    found: dict[str, Any] = json.loads(path.read_text())
    each = found.get("conditions") or {"": found}
    head = f"| | {' | '.join(FIGURES.values())} |\n|---|{'---|' * len(FIGURES)}"
    rows = [f"| {_cell(name)} | {' | '.join(_shown(one.get(key)) for key in FIGURES)} |" for name, one in each.items()]
    flags = sorted({flag for one in each.values() for flag in one.get("flags", ())})
    said = [f"Certificate: **{found['verdict']}** ({'; '.join(found['reasons'])}).", "", head, *rows]
    return "\n".join([*said, *(["", *(f"- {flag}" for flag in flags)] if flags else [])])


def _shown(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.3g}"
