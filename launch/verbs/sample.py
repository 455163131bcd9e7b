"""`tiltune sample`: draw from a run's policy, or, with the energy's help, exact samples of the tilted prior."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import flags
from .tasks import open_with_task

if TYPE_CHECKING:
    from torch import Tensor

    from ...finetune.runs.run import Run
    from ...samplers.condition import Condition
    from ...samplers.policy import Policy
    from ...samplers.prior import Prior
    from ...samplers.resampling import Resampled

DESCRIPTION = """Draw samples from a run's policy and write them to --out as safetensors, with a picture of them beside it
where they are images. --exact proposes with the policy and resamples by the weights, so that the samples follow
p_prior(x) · exp(-E(x)/alpha) whatever the policy, as the number of proposals grows; it prints the effective number of
proposals, which says how far to trust that. Exit status: 0 written, 2 bad input, 70 an unexpected error, after its traceback.

example: tiltune sample my-run --n 64

example: tiltune sample my-run --n 500 --exact --out exact.safetensors
"""


@dataclass(frozen=True)
class Options:
    """What `tiltune sample` takes."""

    run: flags.RunFolder
    """Folder of the run."""
    n: int = 64
    """Number of samples."""
    exact: bool = False
    """Resample policy rollouts by their weights toward the tilted prior."""
    proposals: int | None = None
    """Policy rollouts for --exact, of each label; ten a sample, and at least 1000, where not given."""
    energy: tuple[str, ...] = ()
    """For --exact: the energy of the training, to be said again where it is code of your own."""
    labels: tuple[int, ...] = ()
    """Of these class labels alone, for a run of several; all of the run's, in turn, where not given."""
    seed: int = 0
    out: Path | None = None
    """A .safetensors file; samples.safetensors in the run's folder where not given."""
    overwrite: bool = False
    """Replace --out and its picture."""


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit status."""
    options = flags.parse(Options, argv, "tiltune sample", DESCRIPTION)
    out, picture = targets(options)
    run = open_with_task(options.run)
    import torch
    from safetensors.torch import save

    from ...finetune.runs.energies import absolute_term
    from ...finetune.runs.evaluate import energy_flags
    from ...samplers.streams import seed_for
    from ..pictures import is_images, sample_figure

    told: dict[str, Any] = {
        "run": str(options.run),
        "exact": options.exact,
        "seed": options.seed,
        "alpha": run.config.train.alpha,
    }
    condition = wanted(run.prior, options)
    if options.exact:
        drawn = resample(run, options, condition)
        samples = torch.cat([one.samples for _, one in drawn])
        condition = None if condition is None else condition.select(condition.group.argsort(stable=True))
        terms = options.energy or run.config.energy.terms
        flagged = energy_flags(run, terms)
        told |= {name: sum(getattr(one, name) for _, one in drawn) for name in ("proposals", "ess", "unique")}
        told |= {"energy": [absolute_term(term) for term in terms], "flags": flagged}
        lines = [f"{name}: {trust(one)}" if name else trust(one) for name, one in drawn]
        print(*lines, *[f"flag: {flag}" for flag in flagged], sep="\n")
    else:
        with progress_bar(options.n, "samples") as advance:
            seed = seed_for("samples", options.seed)
            samples = run.policy.sample(options.n, seed=seed, condition=condition, on_progress=advance)
    tensors = {"samples": samples} if condition is None else {"samples": samples, **condition.network_inputs()}
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")  # never in place: who has the old file mapped would see it change
    partial.write_bytes(
        save({name: one.contiguous().cpu() for name, one in tensors.items()}, metadata={"tiltune": json.dumps(told)})
    )
    partial.replace(out)
    print(f"{len(samples)} samples of shape {tuple(samples.shape[1:])}; written to {out}")
    if is_images(samples):
        sample_figure(samples).savefig(picture)
        print(f"picture: {picture}")
    return 0


def targets(options: Options) -> tuple[Path, Path]:
    """The file and its picture.

    Errors: ValueError for a number of samples that cannot be, or a file that is there already.
    """
    if options.n < 1:
        raise ValueError(f"--n {options.n}: draw at least one sample.")
    if options.energy and not options.exact:
        raise ValueError("--energy weights the proposals of --exact; without --exact it would change nothing.")
    out = options.run / "samples.safetensors" if options.out is None else options.out
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: samples are written as safetensors; give the file that ending.")
    picture = out.with_suffix(".png")
    found = [str(path) for path in (out, picture) if path.exists()]
    if found and not options.overwrite:
        raise ValueError(f"{' and '.join(found)} exist; nothing was touched. Name another file with --out, or add --overwrite.")
    return out, picture


@contextmanager
def progress_bar(total: int, name: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; what it gives takes the number just done."""
    from tqdm import tqdm

    with tqdm(total=total, desc=name, dynamic_ncols=True, mininterval=0.5) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


def wanted(prior: Prior, options: Options) -> Condition | None:
    """The condition of each sample: the chosen labels in turn; None for an unconditional prior.

    Errors: ValueError for labels that the run was not trained on.
    """
    import torch

    from ...samplers.condition import Condition

    table = prior.condition_table
    known = [] if table is None else table.tensors["class_labels"].tolist()
    unknown = [label for label in options.labels if label not in known]
    if unknown:
        trained = f"was trained on the labels {', '.join(map(str, known))}" if known else "has no labels"
        raise ValueError(f"--labels {unknown[0]}: the run {trained}.")
    if table is None:
        return None
    rows = torch.tensor([known.index(label) for label in options.labels or known], device=prior.device)
    return Condition(table, rows[torch.arange(options.n, device=prior.device) % len(rows)])


def resample(run: Run, options: Options, condition: Condition | None) -> list[tuple[str, Resampled]]:
    """Exact samples of each condition (of "" where there are none), as far as the weights carry; in the order of the table."""
    from ...finetune.energies.energy import EnergyMeter
    from ...samplers.condition import members
    from ...samplers.resampling import importance_resample
    from ...samplers.streams import stream

    alpha, meter = run.config.train.alpha, EnergyMeter(run.energy(options.energy))
    generator = stream("resampling", options.seed, run.prior.device)
    if condition is None:
        parts = [("", run.policy, options.n)]
    else:
        sizes = [len(index) for index in members(condition.group, len(condition.table))]
        parts = [(condition.table.names[row], run.policy.only(row), size) for row, size in enumerate(sizes) if size]

    def one(policy: Policy, count: int) -> Resampled:
        def log_potential(data: Tensor) -> Tensor:
            own = policy.prior.condition(len(data))
            return -meter(data, **({} if own is None else own.context())) / alpha

        proposals = options.proposals if options.proposals is not None else max(10 * count, 1000)
        with progress_bar(proposals, "proposals") as advance:
            return importance_resample(policy, log_potential, count, generator, proposals=proposals, on_progress=advance)

    return [(name, one(policy, count)) for name, policy, count in parts]


def trust(drawn: Resampled) -> str:
    """The effective number of proposals, and what it means, in a sentence."""
    from ...finetune.certificate.criteria import MAX_PARETO_K
    from ...finetune.estimators import pareto_k

    proposals, count, tail = len(drawn.log_weight), len(drawn.samples), pareto_k(drawn.log_weight)
    head = f"effective proposals: {drawn.ess:.0f} of {proposals}, {drawn.unique} different ones among the {count} samples."
    if drawn.ess < 100 or tail > MAX_PARETO_K:
        why = f"the heaviest of them carries {drawn.largest_weight:.0%} of the weight, Pareto-k {tail:.2f}"
        return f"{head} Too few to trust ({why}): raise --proposals, or train further."
    return (
        f"{head} Averages over them are as accurate as over {min(drawn.ess, count):.0f} independent exact samples; what the"
        " policy never proposes stays missing, which `tiltune evaluate` looks for."
    )
