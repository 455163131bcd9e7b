"""Policies that another toolkit trained: a LoRA as peft or diffusers save it, or a whole network, on the prior they began at."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from ..denoiser import DiffusersDenoiser
from ..lora import PREFIX, LoraDenoiser, add_adapters, layers_of, load_adapter, peft, refuse_other_options
from ..policy import Policy
from ..prior import Prior
from ..shapes import AnyShape
from .folder import PICKLES
from .policy import load_full

PEFT, DIFFUSERS = "adapter_config.json", "pytorch_lora_weights.safetensors"


def load_foreign_policy(prior: Prior, folder: str | Path) -> Policy:
    """The policy in ``folder``, in one of three forms, looked for in this order.

    A peft adapter, adapter_config.json with adapter_model.safetensors, in the folder, in its lora/ or in the subfolder of the
    denoiser. A LoRA as a diffusers pipeline's save_lora_weights writes it, pytorch_lora_weights.safetensors or the only
    .safetensors there, kohya's and the older names of diffusers included. A whole network, as config.json with weights, alone or
    in its pipeline. Only the denoiser is taken: a LoRA that changes text encoders is refused.

    Errors: ValueError for a folder with none of these, for pickles, and for weights that do not fit the prior's network.
    """
    place = Path(folder)
    if not place.is_dir():
        raise ValueError(f"{folder} is no folder; give the one that holds the trained LoRA or network.")
    base = prior.denoiser
    if not isinstance(base, DiffusersDenoiser) or prior.source is None:
        raise ValueError("the base has no network of diffusers, so nothing that another toolkit saved fits it.")
    own = prior.source.denoiser
    for adapter in (place, place / "lora", place / own):
        if (adapter / PEFT).is_file():
            _refuse_pickles(adapter)
            return Policy(prior, load_adapter(base, adapter, prior.source))
    if (file := _lora_file(place)) is not None:
        return Policy(prior, _diffusers_lora(prior, base, file))
    for network in (place / own, place):
        if (network / "config.json").is_file():
            return load_full(prior, network)
    _refuse_pickles(place)
    several = sorted(path.name for path in place.glob("*.safetensors"))
    if several:
        raise ValueError(f"{place} holds several files ({', '.join(several[:3])}), and none is {DIFFUSERS}; leave one of them.")
    raise ValueError(f"{place} holds no policy: neither {PEFT}, nor {DIFFUSERS}, nor the config.json of a network.")


def _refuse_pickles(folder: Path) -> None:
    """Errors: ValueError for a folder whose weights are a pickle alone."""
    pickles = sorted(path.name for path in folder.iterdir() if path.name.endswith(PICKLES))
    if pickles and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds {pickles[0]}, a pickle, which can run code when it is read, so it is refused; load it where it was"
            " trained and save it as safetensors (save_lora_weights, or save_pretrained with safe_serialization=True)."
        )


def _lora_file(folder: Path) -> Path | None:
    """The weights of a LoRA outside of peft's layout."""
    if (folder / DIFFUSERS).is_file():
        return folder / DIFFUSERS
    alone = sorted(folder.glob("*.safetensors"))
    known = (folder / "config.json").exists() or (folder / "model_index.json").exists()
    return alone[0] if len(alone) == 1 and not known else None


def _diffusers_lora(prior: Prior, base: DiffusersDenoiser, file: Path) -> LoraDenoiser:
    """Adapters with the weights of a file that diffusers reads. Errors: ValueError as `load_foreign_policy`."""
    assert prior.source is not None
    part = prior.source.denoiser
    state, scales = _read(file, prior.source.pipeline, part, base.model)
    encoders = sorted({key.split(".")[0] for key in state} - {part})
    if encoders and any(key.startswith("text_encoder") for key in state):
        raise ValueError(
            f"{file} changes {encoders[0]} too, and here the text encoders are the base's; fuse it into a pipeline and give that"
            " as the base of both, or train the denoiser alone."
        )
    own = {key.removeprefix(f"{part}."): weight for key, weight in state.items()}
    wrong = next((key for key in own if not key.endswith((".lora_A.weight", ".lora_B.weight"))), None)
    ranks = {weight.shape[0] for key, weight in own.items() if key.endswith(".lora_A.weight")}
    if wrong is not None or len(ranks) != 1 or len(scales) > 1:
        said = f"{wrong} is no part of one" if wrong else f"its layers have the ranks {sorted(ranks)} and alphas {sorted(scales)}"
        raise ValueError(
            f"{file} is not covered as a LoRA of one rank: {said}; fuse it into its base and give the whole network."
        )
    try:
        lora = add_adapters(base, ranks.pop(), layers_of(own), next(iter(scales), None), prior.source, whole_names=True)
        lora.load_adapter_state({f"{PREFIX}{key}": weight for key, weight in own.items()})
    except ValueError as error:
        raise ValueError(f"the LoRA in {file} does not fit this base's network: {str(error).splitlines()[0]}") from error
    return lora


def _read(file: Path, pipeline: str | None, part: str, network: Any) -> tuple[dict[str, AnyShape], set[float]]:
    """(weights under peft's endings, behind the name of the part that they change; the alphas that the file names).

    Errors: ValueError for a file that is no LoRA, and for options of one that are not covered.
    """
    import diffusers
    from diffusers.utils import state_dict_utils

    kind: Any = getattr(diffusers, pipeline or "StableDiffusionPipeline", None)
    if not hasattr(kind, "lora_state_dict"):
        raise ValueError(f"{file} is a LoRA as pipelines save it, and {pipeline} loads none; give it as a peft adapter.")
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "return_lora_metadata": True}
    if pipeline == "FluxPipeline":  # the others return them unasked
        options["return_alphas"] = True
    if pipeline == "StableDiffusionXLPipeline":  # whose blocks have other names at kohya
        options["unet_config"] = network.config
    try:
        found: Any = kind.lora_state_dict(str(file.parent), weight_name=file.name, **options)
    except Exception as error:  # whatever a third party's reader makes of a broken file
        raise ValueError(f"{file} cannot be read as a LoRA: {str(error).strip().splitlines()[0]}") from error
    state, alphas, metadata = found[0], found[1:-1], cast("dict[str, Any]", found[-1] or {})
    named = {float(value) for told in filter(None, alphas) for value in told.values()}
    settings = {key.removeprefix(f"{part}."): value for key, value in metadata.items() if key.startswith(f"{part}.")}
    if settings.get("lora_alpha"):
        named.add(float(settings["lora_alpha"]))
    own = {name: value for name, value in settings.items() if name not in ("r", "lora_alpha", "target_modules", "peft_type")}
    refuse_other_options(own, peft().LoraConfig().to_dict(), file)
    converted = cast(Any, state_dict_utils).convert_unet_state_dict_to_peft(state)
    return {key: weight.float() for key, weight in converted.items()}, named
