"""What lies in a folder that diffusers saved: a pipeline or a bare model, read without pickle and without foreign code."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

TEXT_DENOISERS = ("UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel")
DENOISERS = ("UNet2DModel", "DiTTransformer2DModel", "Transformer2DModel", "MLPDenoiser", *TEXT_DENOISERS)
DECODERS = ("AutoencoderKL", "VQModel")
TEXT_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline")
# Their parts that neither chain nor decoder is made of, and those that nothing here is made of.
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
TEXT_KINDS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "CLIPTokenizer", "T5Tokenizer")
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
WEIGHTS = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Layout:
    """Where the parts of a sampler lie. pipeline: the class in model_index.json, None for a bare model; decoder: of latents."""

    folder: Path
    pipeline: str | None
    denoiser: Path
    scheduler: Path
    decoder: Path | None


def locate(path: str | Path) -> Path:
    """The folder itself, or the local copy of a hub repository where no such folder exists.

    Errors: ValueError where it is neither. A hub repository comes as its safetensors and configs, never with code.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise ValueError(f"{path} is a file; give the folder that diffusers' save_pretrained wrote.")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)):
        raise ValueError(f"there is no folder {path}; give one that diffusers' save_pretrained wrote, or a hub id (owner/name).")
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        return Path(cast(Any, DiffusionPipeline).download(str(path), use_safetensors=True))
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"there is no folder {path}, and no pipeline of that name came from the hub: {reason}") from error


def read_layout(folder: Path) -> Layout:
    """Find denoiser, scheduler and decoder of a pipeline folder or a bare model's folder.

    Errors: ValueError for a folder that is neither, a part that is missing, and a pipeline with parts that a chain ignores.
    """
    if (folder / "model_index.json").is_file():
        return _pipeline_layout(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds neither a model_index.json (a pipeline) nor a config.json (a model).")
    for place in (folder, folder / "scheduler"):
        if (place / "scheduler_config.json").is_file():
            return Layout(folder, None, folder, place, None)
    hint = ""
    if (folder.parent / "model_index.json").is_file():
        hint = f" It is part of the pipeline {folder.parent}: give that folder."
    raise ValueError(
        f"{folder} has no scheduler_config.json, beside its config.json or in scheduler/, so nothing says how its model is"
        f" sampled.{hint or ' Save the scheduler that it was trained with there (scheduler.save_pretrained).'}"
    )


def _pipeline_layout(folder: Path) -> Layout:
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(
            f"{folder}/model_index.json names a custom pipeline ({name}); code that comes with weights is never run."
        )
    lists = cast("dict[str, list[Any]]", {key: part for key, part in index.items() if isinstance(part, list)})
    beside = (*TEXT_PARTS, *UNUSED_PARTS) if name in TEXT_PIPELINES else ()
    for part in beside[: len(TEXT_PARTS)]:
        _refuse_other_code(name, part, lists.get(part, [None, None]))
    parts = {key: part for key, part in lists.items() if len(part) == 2 and part[0] is not None and key not in beside}
    foreign = [f"{key}: {'.'.join(map(str, part))}" for key, part in parts.items() if part[0] not in ("diffusers", "tiltune")]
    extra = sorted(set(parts) - {"unet", "transformer", "scheduler", "vae", "vqvae"})
    if foreign or extra:
        raise ValueError(
            f"{name} has parts that a chain does not know ({', '.join(foreign or extra)}); unconditional and class-conditional"
            " pipelines are covered: a unet or a transformer, a scheduler, and a vae or vqvae where it samples latents; and of"
            f" text-to-image ones {', '.join(TEXT_PIPELINES)}."
        )
    denoisers = [key for key in ("unet", "transformer") if key in parts]
    decoders = [key for key in ("vae", "vqvae") if key in parts]
    if len(denoisers) != 1 or len(decoders) > 1:
        raise ValueError(f"{name} has {len(denoisers)} denoisers and {len(decoders)} decoders; one and at most one are covered.")
    if name in TEXT_PIPELINES and not decoders:
        raise ValueError(f"{folder} has no vae, so that latents of {name} cannot be decoded; put the pipeline's own there.")
    scheduler = folder / "scheduler"
    if not (scheduler / "scheduler_config.json").is_file():
        raise ValueError(f"{folder} has no scheduler/scheduler_config.json, so nothing says how {name} is sampled.")
    return Layout(folder, name, folder / denoisers[0], scheduler, folder / decoders[0] if decoders else None)


def _refuse_other_code(pipeline: str, part: str, kind: list[Any]) -> None:
    """Errors: ValueError for a text part of any other class than transformers' own ones, which alone are ever imported."""
    if kind[0] is None or (kind[0] == "transformers" and str(kind[1]).removesuffix("Fast") in TEXT_KINDS):
        return
    raise ValueError(
        f"the {part} of this {pipeline} is a {'.'.join(map(str, kind))}; transformers' {', '.join(TEXT_KINDS)} are covered, and"
        " code that comes with weights is never run."
    )


def left_empty(folder: Path) -> dict[str, None]:
    """The text parts that a pipeline was saved without, as its from_pretrained wants to be told (SD3 without its T5, say)."""
    parts = read_json(folder / "model_index.json")
    return {part: None for part in TEXT_PARTS if isinstance(kind := parts.get(part), list) and kind[0] is None}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Errors: ValueError where it is missing, cannot be read or is no object."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return cast("dict[str, Any]", value)


def load_scheduler(folder: Path) -> Any:
    """The diffusers scheduler of a scheduler_config.json. Errors: ValueError for a class that diffusers does not have."""
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    name = read_json(folder / "scheduler_config.json").get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"{folder}/scheduler_config.json names the scheduler {name!r}, which diffusers does not have.")
    try:
        return cast(Any, kind).from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"the scheduler {name} of {folder} cannot be built: {str(error).splitlines()[0]}") from error


def load_model(folder: Path, kinds: tuple[str, ...], known: type | None = None) -> tuple[nn.Module, str]:
    """(a model of one of these classes with float32 weights, the dtype that they are stored in).

    The class is diffusers' or Tiltune's own of that name, or ``known``, which is at hand already.

    Errors: ValueError for another class, weights that are missing, a pickle or corrupt, and weights of another network.
    """
    import diffusers

    from ..mlp import MLPDenoiser

    name = read_json(folder / "config.json").get("_class_name")
    if name not in kinds:
        raise ValueError(f"{folder} holds a {name}, which is not covered; {', '.join(kinds)} are.")
    variant = weights_variant(folder)
    kind: Any = known or (MLPDenoiser if name == "MLPDenoiser" else getattr(diffusers, name))
    try:
        model, info = kind.from_pretrained(
            folder,
            variant=variant,
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        stored = _stored_dtype(folder, variant)
    except Exception as error:  # whatever a third party's reader makes of a broken file
        raise ValueError(f"the weights of {folder} cannot be read as a {name}: {str(error).strip().splitlines()[0]}") from error
    if info["missing_keys"] or info["unexpected_keys"]:
        wrong = [*info["missing_keys"], *info["unexpected_keys"]]
        raise ValueError(f"the weights of {folder} are another network's: {sorted(wrong)[0]} is missing or foreign.")
    if type(model).__name__ not in kinds or type(model).__name__ == "Transformer2DModel":
        raise ValueError(f"{folder} holds a {name} that is no DiT (norm_type 'ada_norm_zero'), so it is not covered.")
    # Read in place, tensors lie where the file's header ends: matrix products of unaligned ones round otherwise.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model, stored


def weights_variant(folder: Path, stem: str = WEIGHTS) -> str | None:
    """The variant ('fp16') of the weights, files of this ``stem``, where no plain ones exist.

    Errors: ValueError for several variants, weights that are a pickle, and none.
    """
    names = {path.name for path in folder.iterdir()}
    if {f"{stem}.safetensors", f"{stem}.safetensors.index.json"} & names:
        return None
    pattern = re.compile(rf"{stem}\.([\w-]+)\.safetensors|{stem}\.safetensors\.index\.([\w-]+)\.json")
    variants = sorted({match[1] or match[2] for match in map(pattern.fullmatch, names) if match})
    if len(variants) > 1:
        raise ValueError(f"{folder} holds the weights in variants ({', '.join(variants)}) and no plain ones; leave one of them.")
    if variants:
        return variants[0]
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        raise ValueError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is read, so it is refused; if"
            " you trust it, load it in diffusers and save_pretrained(folder, safe_serialization=True)."
        )
    raise ValueError(f"{folder} has no weights: {stem}.safetensors is missing.")


def _stored_dtype(folder: Path, variant: str | None) -> str:
    from safetensors import safe_open

    names: dict[str, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    file = sorted(path for path in folder.glob(f"{WEIGHTS}*.safetensors") if variant is None or f".{variant}" in path.name)[0]
    with cast(Any, safe_open(file, "pt")) as weights:
        stored: str = weights.get_slice(next(iter(weights.keys()))).get_dtype() or "?"
    return names.get(stored, stored)
