"""The text encoders of a folder, as the pipeline that encodes with them: safetensors and transformers' own code only."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .folder import TEXT_PARTS, UNUSED_PARTS, load_scheduler, read_json, weights_variant


@contextmanager
def text_encoders(folder: Path, name: str, network: Any) -> Generator[Any]:
    """The pipeline ``name`` around ``network``, its unet or transformer, without a decoder, for as long as the block runs.

    Errors: ValueError for an encoder that cannot be loaded, or whose weights are not all there.
    """
    with _quiet():
        import diffusers

        index = read_json(folder / "model_index.json")
        parts: dict[str, Any] = {part: _load(folder / part, *index[part]) for part in TEXT_PARTS if part in index}
        parts |= {part: None for part in ("vae", *UNUSED_PARTS) if part in index and part != "image_encoder"}
        parts["unet" if "unet" in index else "transformer"] = network
        # Whatever else its constructor takes: whether an empty prompt stands for zeros (SDXL), say.
        parts |= {key: value for key, value in index.items() if not key.startswith("_") and not isinstance(value, list)}
        parts["scheduler"] = load_scheduler(folder / "scheduler")
        if "requires_safety_checker" in parts:
            parts["requires_safety_checker"] = False
        yield getattr(diffusers, name)(**parts)


def _load(place: Path, library: str | None, kind: str | None) -> Any:
    """One encoder or tokenizer; None where the pipeline was saved without it."""
    if kind is None:
        return None
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"text encoders need transformers ({error}); install it: pip install 'tiltune[text]'") from error
    if not place.is_dir():
        raise ValueError(
            f"{place} is missing, and its pipeline encodes prompts with it; copy it from where the folder came from."
        )
    own: Any = getattr(transformers, kind)
    try:
        if "tokenizer" in place.name:
            return own.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        model, info = own.from_pretrained(
            place,
            variant=weights_variant(place, "model"),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a third party's reader makes of a broken folder
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{place} cannot be loaded as a {kind}: {said[0]}") from error
    # Buffers that older versions of transformers saved.
    wrong = [name for name in (*info["missing_keys"], *info["unexpected_keys"]) if not name.endswith("position_ids")]
    if wrong:
        raise ValueError(f"the weights of {place} are another network's, or not whole: {sorted(wrong)[0]} is missing or foreign.")
    return model.requires_grad_(False).eval()


@contextmanager
def _quiet() -> Generator[None]:
    """Without the bars and remarks of transformers and diffusers, which are about other uses than this one."""
    try:
        from transformers.utils import logging
    except ImportError:  # said by what needs it
        yield
        return
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
