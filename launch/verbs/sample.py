"""`tiltune sample`: draw from a run's policy, or, with the energy's help, exact samples of the tilted prior."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...finetune.runs.bar import progress_bar
from .. import flags
from .tasks import open_with_task

if TYPE_CHECKING:
    from ...samplers.condition import Condition
    from ...samplers.prior import Prior

DESCRIPTION = """Draw samples from a run's policy and write them to --out as safetensors, with a picture of them beside it
where they are images. --exact proposes with the policy and resamples by the weights, so that the samples follow
p_prior(x) · exp(-E(x)/alpha) whatever the policy, as the number of proposals grows; it prints the effective number of
proposals, which says how far to trust that. Exit status: 0 written, 2 bad input, 70 an unexpected error, after its traceback.

example: tiltune sample my-run --n 64

example: tiltune sample my-run --n 500 --exact --out exact.safetensors

example: tiltune sample my-text-run --n 8 --prompts "a red apple" --out apples.safetensors
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
    candidates: int = 1
    """For --exact: next states at each step from which the run's soft value chooses one, 16 say. More of the proposals count
    where the chain has few steps, at no further energy calls and no further evaluations of prior and policy. 1: none."""
    sweeps: int | None = None
    """For --exact: sweeps of moves after the resampling, which make different samples of copies, each of 8 energy calls a sample;
    3 where there are copies, else 0, where not given."""
    energy: tuple[str, ...] = ()
    """For --exact: the energy of the training, to be said again where it is code of your own."""
    labels: tuple[int, ...] = ()
    """Of these class labels alone, for a run of several; all of the run's, in turn, where not given."""
    prompts: tuple[str, ...] = ()
    """Of these prompts, in turn, which the run need not have seen, or of those in a file; the run's own where not given."""
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
    if options.prompts:
        run = run.on_prompts(options.prompts)
    import torch
    from safetensors.torch import save

    from ...finetune.runs.energies import absolute_term
    from ...finetune.runs.evaluate import energy_flags
    from ...samplers.streams import seed_for
    from ..pictures import is_images, sample_figure
    from .exact import draw_exact, trust

    told: dict[str, Any] = {
        "run": str(options.run),
        "exact": options.exact,
        "seed": options.seed,
        "alpha": run.config.train.alpha,
    }
    condition = wanted(run.prior, options)
    if options.exact:
        drawn = draw_exact(
            run,
            condition,
            options.n,
            proposals=options.proposals,
            sweeps=options.sweeps,
            candidates=options.candidates,
            terms=options.energy,
            seed=options.seed,
        )
        samples = torch.cat([one.samples for one in drawn])
        if condition is not None:  # in the order of the conditions again
            samples = samples[condition.group.argsort(stable=True).argsort()]
        terms = options.energy or run.config.energy.terms
        flagged = energy_flags(run, terms)
        told |= drawn[0].told() if condition is None else {"conditions": {one.name: one.told() for one in drawn}}
        told |= {"energy": [absolute_term(term) for term in terms], "flags": flagged}
        print(*[trust(one) for one in drawn], *[f"flag: {flag}" for flag in flagged], sep="\n")
    else:
        with progress_bar(options.n, "samples") as advance:
            seed = seed_for("samples", options.seed)
            samples = run.policy.sample(options.n, seed=seed, condition=condition, on_progress=advance)
    tensors = {"samples": samples}
    if condition is not None:
        context = condition.context()
        tensors |= {name: column for name, column in context.items() if isinstance(column, torch.Tensor)}
        told |= {"prompts": context["prompts"]} if "prompts" in context else {}
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
    if options.proposals is not None and not options.exact:
        raise ValueError(
            "--proposals is the number of rollouts that --exact draws from; without --exact it would change nothing."
        )
    if options.sweeps is not None and not (options.exact and options.sweeps >= 0):
        raise ValueError(f"--sweeps {options.sweeps}: a number of sweeps, 0 or more, for samples drawn with --exact.")
    if options.candidates != 1 and not (options.exact and options.candidates >= 2):
        raise ValueError(f"--candidates {options.candidates}: 2 or more, for samples drawn with --exact.")
    if options.candidates != 1 and options.prompts:
        raise ValueError("--candidates chooses by what the run learned of its own prompts; leave it out with --prompts.")
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


def wanted(prior: Prior, options: Options) -> Condition | None:
    """The condition of each sample: the chosen labels in turn; None for an unconditional prior.

    Errors: ValueError for labels that the run was not trained on.
    """
    import torch

    from ...samplers.condition import Condition

    table = prior.condition_table
    known = table.tensors["class_labels"].tolist() if table is not None and "class_labels" in table.tensors else []
    unknown = [label for label in options.labels if label not in known]
    if unknown:
        trained = f"was trained on the labels {', '.join(map(str, known))}" if known else "has no labels"
        raise ValueError(f"--labels {unknown[0]}: the run {trained}.")
    if not known:
        return prior.condition(options.n)
    assert table is not None
    rows = torch.tensor([known.index(label) for label in options.labels or known], device=prior.device)
    return Condition(table, rows[torch.arange(options.n, device=prior.device) % len(rows)])
