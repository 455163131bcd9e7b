"""A run as a folder, once it has a policy: `open_run` loads what `train` has left, for `certify`, samples and exports.

    config.yaml     the whole `RunConfig`: the same training again, bit for bit
    metrics.jsonl   one JSON object a line
    policy/         what was trained, as diffusers or peft save it
    soft_value.*    the learned soft value, of a run that has one: it chooses among candidates for `sample --exact`
    run.json        what the loader decided, versions, seconds, how the training ended (`record`)
    certificate.json, picture.png, samples.safetensors, samples.png      once they are asked for

Imports no torch by itself, so that a mistake in the config or the folder is found at once.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.run import RunConfig
from ..config.yaml_file import from_mapping, read_yaml
from .build import load_prior, prompts_of
from .energies import is_shipped, load_energies
from .prompts import from_file
from .resolve import refuse_other_task
from .task import Task

if TYPE_CHECKING:
    from ...samplers.policy import Policy
    from ...samplers.prior import Prior
    from ..energies.energy import Energy
    from ..learning.soft_value import SoftValue

SOFT_VALUE = "soft_value"  # the name of its files


@dataclass(frozen=True, eq=False)
class Run:
    """A trained policy with the prior it started from and the config that made it. record: what run.json holds. condition: the
    name of the only one that this run is of (`only`), None where it is the whole run."""

    folder: Path
    config: RunConfig
    prior: Prior
    policy: Policy
    record: dict[str, Any]
    task: Task | None = None
    condition: str | None = None

    @cached_property
    def soft_value(self) -> SoftValue:
        """What the run has learned of the worth of states.

        Errors: ValueError where it has learned none, or its files are damaged.
        """
        from ..learning.soft_value import SoftValue
        from .state_file import read_state

        if not (self.folder / f"{SOFT_VALUE}.json").exists():
            raise ValueError(
                f"{self.folder} has no soft value to choose candidates by; a training with --soft-value-updates 1500 leaves one."
            )
        prior = self.prior
        state = read_state(self.folder, SOFT_VALUE)
        return SoftValue.from_state_dict(state, prior.shape, prior.chain.last_trained + 1, prior.device)

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; of one condition those that have metrics of its own, and nothing of the others."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        if self.condition is None:
            return lines
        kept = ("phase", "update", "alpha")
        own = [line for line in lines if self.condition in line.get("conditions", {})]
        return [{name: line[name] for name in kept if name in line} | line["conditions"][self.condition] for line in own]

    def by_condition(self) -> list[Run]:
        """A run for each condition of the prior, each of which has a law of its own; the run itself where there is one law."""
        if self.prior.num_conditions == 1:
            return [self]
        return [self.only(row) for row in range(self.prior.num_conditions)]

    def only(self, row: int) -> Run:
        """The run of the prior's condition ``row`` alone, as if no other had been trained beside it."""
        policy = self.policy.only(row)
        table = policy.prior.condition_table
        assert table is not None
        config = self.config
        if "class_labels" in table.tensors:
            labels = tuple(table.tensors["class_labels"].tolist())
            config = replace(config, prior=replace(config.prior, labels=labels))
        elif config.prior.prompts is not None:
            metadata = config.prior.prompt_metadata[row : row + 1]
            config = replace(config, prior=replace(config.prior, prompts=table.names, prompt_metadata=metadata))
        return replace(self, config=config, prior=policy.prior, policy=policy, condition=table.names[0])

    def on_prompts(self, prompts: tuple[str, ...]) -> Run:
        """The same policy on other prompts, or on those in a file, each with a law of its own.

        Errors: ValueError for a run without prompts, and a prompt that cannot be encoded.
        """
        from ...samplers.loading.text import with_prompts
        from ...samplers.policy import Policy

        if self.config.prior.prompts is None:
            raise ValueError(f"{self.folder} is no run of a text-to-image prior, so it takes no prompts.")
        own = self.config.prior
        asked = from_file(replace(own, prompts=prompts, prompt_metadata=()))
        if not asked.prompt_metadata:  # what the run knows of its own prompts
            known = dict(zip(own.prompts or (), own.prompt_metadata, strict=False))
            told = tuple(known.get(text, "{}") for text in asked.prompts or ())
            asked = replace(asked, prompt_metadata=told)
        chosen = prompts_of(asked)
        assert chosen is not None
        prior = with_prompts(self.prior, chosen)
        return replace(self, config=replace(self.config, prior=asked), prior=prior, policy=Policy(prior, self.policy.denoiser))

    def energy(self, terms: Sequence[str] = ()) -> Energy:
        """The energy that ``terms`` name, or the one of the training where none are given.

        Errors: ValueError where the training's is code that only the folder names: importing that is for whoever typed it.
        """
        config = replace(self.config.energy, terms=tuple(terms) or self.config.energy.terms)
        if not terms:
            foreign = [term for term in config.terms if not is_shipped(term, self.task)]
            if foreign or not config.terms:
                named = f"with {' '.join(foreign)}" if foreign else "with a function of its own"
                raise ValueError(
                    f"{self.folder} was trained {named}; no code is run because a folder names it, so say it again: --energy"
                    f" {shlex.join(config.terms) or 'FILE.py:NAME'} (in Python, pass energy=)."
                )
        return load_energies(replace(self.config, energy=config), self.task)


def read_config(folder: str | Path) -> RunConfig:
    """The config of the run in ``folder``.

    Errors: ValueError where there is none, or one that cannot be read.
    """
    path = Path(folder) / "config.yaml"
    if not path.exists():
        raise ValueError(f"there is no run in {folder}: {path} is missing.")
    return from_mapping(read_yaml(path), RunConfig(), str(path))


def open_run(folder: str | Path, task: Task | None = None) -> Run:
    """The run in ``folder`` with its prior and policy loaded; ``task`` as in `train`. Runs no code that the folder names.

    Errors: ValueError for a folder without a finished run, or with files that do not fit together.
    """
    from ...samplers.loading.policy import load_policy

    folder = Path(folder)
    config = read_config(folder)
    refuse_other_task(config, task)
    if not (folder / "run.json").exists() or not (folder / "policy").is_dir():
        raise ValueError(f"the run in {folder} has no policy yet: it is still training, or its process was killed.")
    try:
        record = json.loads((folder / "run.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder / 'run.json'} is not JSON: {error}.") from None
    prior = load_prior(config, task)
    return Run(folder, config, prior, load_policy(prior, folder / "policy"), record, task)
