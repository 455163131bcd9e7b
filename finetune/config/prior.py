"""Which pretrained sampler is fine-tuned, and the chain that it is run with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from ...samplers.trained_steps import step_window
from .refusals import refuse, refuse_other_choices


@dataclass(frozen=True)
class PriorConfig:
    """The sampler to fine-tune: a pretrained denoiser and the chain that it is run with."""

    source: str | None = None
    """Folder (or hub id) of a diffusers pipeline, or of a denoiser with a scheduler config. None: the task's own prior."""
    steps: int = 50
    """K, the number of denoising steps."""
    chain: str | None = None
    """Which chain of a task that ships several: ddpm, ddim, flow or brownian of the mixture. None: the task's first."""
    dim: int | None = None
    """Dimension of the prior, of a task that has one in several; the mixture's is then random, with an exact denoiser. None: the
    task's own."""
    seed: int = 0
    """Which of the random mixtures that dim asks for. An energy of theirs takes the same one: 'linear(ess=0.003, seed=1)'."""
    eta: float = 1.0
    """DDIM's share of noise, above 0; 1 forgets the start best."""
    variance: Literal["fixed_large", "fixed_small"] | None = None
    """DDPM's kernel variance; short chains gain from fixed_large. None: the scheduler's own."""
    noise: Literal["memoryless", "flow_grpo"] = "memoryless"
    """The noise that turns a flow into a stochastic sampler."""
    noise_level: float = 0.7
    """Scale of the flow_grpo noise."""
    train_steps: str | None = None
    """FIRST:LAST, counted from 0: the only steps that the policy changes; the others stay the prior's own. A shorter window costs
    less and reaches less. None: every step that can be trained."""
    labels: tuple[int, ...] | Literal["all"] | None = None
    """Class labels of a class-conditional denoiser, fine-tuned together, each toward a law of its own; or all of them."""
    scheduler: Literal["ddpm", "ddim", "euler_ancestral"] | None = None
    """A scheduler in place of the prior's own, on its betas, where that one is none of a chain (PNDM, Euler, DPM-Solver)."""
    prompts: tuple[str, ...] | None = None
    """Of a text-to-image prior, each with a law of its own. One that is a file's name stands for the prompts in it: a line each
    (.txt), or the column "prompt" of a .csv or .json, whose other columns are the metadata that energies see."""
    prompt_metadata: tuple[str, ...] = ()
    """JSON of each prompt's metadata; a file of prompts fills it in."""
    negative_prompt: str = ""
    """The prompt that guidance leads away from."""
    guidance: float | None = None
    """Scale of classifier-free guidance, in prior and policy alike; 1: none, in half of the evaluations. None: the pipeline's own
    default (7.5 for Stable Diffusion, 5 for SDXL, 7 for SD3, 3.5 for Flux, which is told it and has no negative half)."""
    image_size: int | None = None
    """Height and width of a latent prior's pictures, in pixels. None: its own."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """What the networks run in; log-ratios stay float32."""
    channels_last: bool = False
    """Memory format of the networks; helps convolutions on accelerators."""

    def __post_init__(self) -> None:
        refuse_other_choices(self)
        refuse(
            self.source is not None and self.chain is not None,
            f"chain is {self.chain!r}, which names a chain of a shipped task; the chain of {self.source!r} is its scheduler's.",
        )
        refuse(
            self.source is not None and self.dim is not None,
            f"dim is {self.dim}, which asks for the prior of a shipped task; {self.source!r} has its own dimension.",
        )
        refuse(self.dim is not None and self.dim < 1, f"dim is {self.dim}; it is at least 1.")
        refuse(self.seed < 0, f"seed is {self.seed}; it must not be negative.")
        refuse(self.steps < 1, f"steps is {self.steps}; a chain has at least one step.")
        refuse(not self.eta >= 0, f"eta is {self.eta}; it is DDIM's share of noise, above 0.")
        refuse(not self.noise_level > 0, f"noise_level is {self.noise_level}; it must be positive.")
        if self.train_steps is not None:
            first, last = step_window(self.train_steps)
            refuse(
                last >= self.steps,
                f"train_steps {first}:{last} reaches beyond the chain, whose {self.steps} steps are 0 to {self.steps - 1}.",
            )
        self._refuse_prompts()
        if isinstance(self.labels, tuple):
            refuse(not self.labels, "labels is an empty list; name at least one, or leave it out for an unconditional denoiser.")
            refuse(min(self.labels) < 0, f"labels holds {min(self.labels)}; class labels start at 0.")
            twice = [label for label in self.labels if self.labels.count(label) > 1]
            refuse(bool(twice), f"labels holds {twice[0] if twice else None} twice; name each label once.")

    def _refuse_prompts(self) -> None:
        for prompt in self.prompts or ():
            refuse(not prompt.strip(), "a prompt is empty; give it words, or leave it out.")
            refuse(
                " ".join(prompt.split()) != prompt,
                f"the prompt {prompt!r} has spaces around it or line breaks; write it in a line.",
            )
        refuse(self.prompts == (), "prompts is an empty list; name at least one, or leave it out.")
        refuse(
            self.prompts is None and (bool(self.negative_prompt) or self.guidance is not None),
            "guidance and negative_prompt are of a text-to-image prior with its prompts; give prompts, or leave them out.",
        )
        refuse(
            self.prompts is not None and self.labels is not None,
            "labels are of a class-conditional prior and prompts of a text-to-image one; give one of them.",
        )
        refuse(
            bool(self.prompt_metadata) and len(self.prompt_metadata) != len(self.prompts or ()),
            f"prompt_metadata has {len(self.prompt_metadata)} entries for {len(self.prompts or ())} prompts; give one for each.",
        )
        for text in self.prompt_metadata:
            refuse(not _is_object(text), f"the metadata {text!r} is no JSON object without NaN; a file of prompts writes it.")
        refuse(
            self.guidance is not None and not 1 <= self.guidance < float("inf"),
            f"guidance is {self.guidance}; it is 1, for none, or more.",
        )


def _is_object(text: str) -> bool:
    def refused(name: str) -> None:
        raise ValueError(name)

    try:
        return isinstance(json.loads(text, parse_constant=refused), dict)
    except ValueError:
        return False
