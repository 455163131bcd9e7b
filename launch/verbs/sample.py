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
    """Policy rollouts for --exact; ten a sample, and at least 1000, where not given."""
    energy: tuple[str, ...] = ()
    """For --exact: the energy of the training, to be said again where it is code of your own."""
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
    if options.exact:
        drawn = resample(run, options)
        samples = drawn.samples
        terms = options.energy or run.config.energy.terms
        flagged = energy_flags(run, terms)
        told |= {"proposals": len(drawn.log_weight), "ess": drawn.ess, "unique": drawn.unique}
        told |= {"energy": [absolute_term(term) for term in terms], "flags": flagged}
        print(trust(drawn), *[f"flag: {flag}" for flag in flagged], sep="\n")
    else:
        with progress_bar(options.n, "samples") as advance:
            samples = run.policy.sample(options.n, seed=seed_for("samples", options.seed), on_progress=advance)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")  # never in place: who has the old file mapped would see it change
    partial.write_bytes(save({"samples": samples.contiguous().cpu()}, metadata={"tiltune": json.dumps(told)}))
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


def resample(run: Run, options: Options) -> Resampled:
    """Exact samples, as far as the weights carry."""
    from ...finetune.energies.energy import EnergyMeter
    from ...samplers.resampling import importance_resample
    from ...samplers.streams import stream

    alpha, meter = run.config.train.alpha, EnergyMeter(run.energy(options.energy))
    proposals = options.proposals if options.proposals is not None else max(10 * options.n, 1000)
    generator = stream("resampling", options.seed, run.prior.device)

    def log_potential(data: Tensor) -> Tensor:
        return -meter(data, **run.prior.context(len(data))) / alpha

    with progress_bar(proposals, "proposals") as advance:
        return importance_resample(run.policy, log_potential, options.n, generator, proposals=proposals, on_progress=advance)


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
