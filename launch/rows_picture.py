"""The picture of a run of several conditions: a row each; prior, another run, policy and target in columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..samplers.policy import Policy
from ..samplers.streams import seed_for
from ..tasks.metrics.samples import on_cpu
from ..tasks.plots.curves import new_figure
from ..tasks.plots.images import sheet, target_samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..finetune.certificate.evidence import Evidence
    from ..finetune.runs.run import Run

EACH = 6  # pictures of a condition in a column


def rows_figure(judged: list[tuple[Run, dict[str, Any], Evidence]], other: Run | None = None) -> Figure:
    """A row for each condition, with its verdict. Prior, ``other`` and policy are drawn from the same noise, so that pictures at
    the same place show what training changed; those of the target are prior samples by weight."""
    rows = [_columns(one, evidence, None if other is None else other.only(row)) for row, (one, _, evidence) in enumerate(judged)]
    titles = list(rows[0])
    figure = new_figure(1.6 + 3.3 * len(titles), 0.3 + 0.62 * len(rows))
    panels = figure.subplots(len(rows), len(titles), squeeze=False)
    for row, (columns, (one, certificate, _)) in enumerate(zip(rows, judged, strict=True)):
        for column, title in enumerate(titles):
            axes = panels[row, column]
            axes.imshow(sheet(columns[title], EACH).numpy(), interpolation="nearest", aspect="equal")
            axes.set(xticks=[], yticks=[])
            for side in axes.spines.values():
                side.set_visible(False)
            if row == 0:
                axes.set_title(title, fontsize=9)
        name = (one.condition or "").replace("$", r"\$")  # matplotlib reads mathematics between two of them
        label = f"{name}\n{certificate['verdict']}, KL {certificate['kl_to_prior']:.1f}"
        panels[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7)
    return figure


def _columns(run: Run, evidence: Evidence, other: Run | None) -> dict[str, Tensor]:
    """{title: pictures} of one condition."""
    seed = seed_for("samples", 0)
    columns = {"Prior": Policy(run.prior, run.prior.denoiser).sample(EACH, seed=seed)}
    if other is not None:
        columns[other.folder.name] = other.policy.sample(EACH, seed=seed)
    columns["Policy"] = run.policy.sample(EACH, seed=seed)
    columns["Target: prior samples by weight"] = target_samples(on_cpu(evidence), EACH)
    return columns
