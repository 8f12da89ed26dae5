"""Single-file SD3 checkpoints in Stability's key names, through diffusers' own conversion."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.core import json_io
from fewstep.core.types import UserError
from fewstep.families.config_check import KnownClasses, class_of
from fewstep.families.diffusers_io import checked_facts, first_line, read_index, read_part
from fewstep.families.safetensors_header import read_header
from fewstep.families.safetensors_match import Converted, LoadWarning
from fewstep.families.safetensors_reader import empty, fill
from fewstep.families.safetensors_tensors import header
from fewstep.families.safetensors_weights import Weights
from fewstep.families.schedulers import Schedule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module

T5 = ("tokenizer_3", "text_encoder_3")
NET, CODEC = "model.diffusion_model.", "first_stage_model."
TEXTS = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
"""Prefixes of the text encoders' tensors; many files contain none of the three."""

PREFIXES = {"transformer": NET, "vae": CODEC, **TEXTS}
UNUSED = ("model_ema.", *(f"text_encoders.{name}.logit_scale" for name in ("clip_l", "clip_g", "t5xxl")))
"""Prefixes of tensors that no part uses and that change no image."""

PROJECTION = "text_projection.weight"


def read_single(
    known: KnownClasses, path: Path, config: str | Path | None, dtype: torch.dtype, t5: bool | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The components of a single-file checkpoint, and the facts that ``fewstep export`` wrote into its
    header; what the file lacks comes from ``config``.

    Args:
        known: classes of the family.
        path: the ``.safetensors`` file.
        config: a diffusers folder or a hub name; ``None`` is the hub's original of the checkpoint.
        dtype: torch dtype of the nets.
        t5: whether to read T5; ``None`` reads it where it is present.

    Raises:
        UserError: not such a checkpoint, a broken one, one that holds what no part can use, or the
            configuration cannot be had.
    """
    outline, facts = _outline(path)
    if not any(".x_block." in key for key in outline):
        raise UserError(f"{path} is not an SD3 checkpoint: it has no joint_blocks")
    if not any(key.startswith(CODEC) for key in outline):
        raise UserError(f"{path} has no autoencoder (first_stage_model); give a file that has, or a folder")
    weights = Weights(path, header(path)).scaled()
    _check_prefixes(weights)
    lacking = [part for part, prefix in TEXTS.items() if not any(k.startswith(prefix) for k in outline)]
    if t5 is False:
        lacking = [part for part in lacking if part not in T5]
    folder = _local(config) or _fetch(path, config, outline, lacking)
    index = read_index(folder, known, T5 if t5 else ())
    absent = T5 if t5 is False or any(part not in index for part in T5) else ()
    parts: dict[str, Any] = dict.fromkeys(absent)
    wanted = ["tokenizer", "tokenizer_2", "tokenizer_3", "scheduler", *PREFIXES]
    for part in (part for part in wanted if part not in absent):
        if part not in index:
            raise UserError(f"{part} is neither in {path} nor in {folder}")
        if part in lacking:
            parts[part] = read_part(folder, part, index[part], known, dtype)
        elif part in PREFIXES:
            parts[part] = _net(weights, part, folder, index[part], known, dtype)
        else:
            parts[part] = read_part(folder, part, index[part], known)
    return {**parts, "scheduler": _scheduler(parts["scheduler"], facts)}, facts


def _check_prefixes(weights: Weights) -> None:
    """Refuse a file with tensors of no part."""
    known = (*PREFIXES.values(), *UNUSED)
    if odd := sorted(name for name in weights.entries if not name.startswith(known)):
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        what = f"{weights.where} holds {odd[0]}{more}, which is of no part of an SD3 checkpoint"
        raise UserError(f"{what}, so the image may be another: take it out")


def _net(
    weights: Weights, part: str, folder: Path, entry: tuple[str, str], known: KnownClasses, dtype: torch.dtype
) -> Module:
    """A net with the file's weights and the folder's configuration."""
    prefix, path = PREFIXES[part], weights.folder
    kind = class_of(entry, part, str(folder / "model_index.json"), known)
    try:
        net = empty(kind, folder / part)
        tensors = {n.removeprefix(prefix): weights.read(n) for n in weights.entries if n.startswith(prefix)}
        return fill(net, Converted(path, CONVERSIONS.get(part, _same)(tensors, net, path)), dtype)
    except (OSError, ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"cannot load {part} of {path}: {first_line(error)}") from error


def _transformer(tensors: dict[str, Tensor], net: Any, path: Path) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    left = dict(tensors)
    return convert_sd3_transformer_checkpoint_to_diffusers(left) | left  # it takes out what it converts


def _autoencoder(tensors: dict[str, Tensor], net: Any, path: Path) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    made = convert_ldm_vae_checkpoint(dict(tensors), net.config)
    used = {tensor.untyped_storage().data_ptr() for tensor in made.values()}  # none is copied
    return made | {n: t for n, t in tensors.items() if t.untyped_storage().data_ptr() not in used}


def _first_clip(tensors: dict[str, Tensor], net: Any, path: Path) -> dict[str, Tensor]:
    """All who read these files take the first CLIP's projection for the identity."""
    import torch

    identity = torch.eye(net.config.projection_dim, net.config.hidden_size)
    said = tensors.get(PROJECTION)
    if said is not None and not said.float().equal(identity):
        name = f"{TEXTS['text_encoder']}{PROJECTION}"
        text = f"{path}: {name} is passed over, as in all that read such files"
        warnings.warn(text, LoadWarning, stacklevel=2)
    return {**tensors, PROJECTION: identity}


def _same(tensors: dict[str, Tensor], net: Any, path: Path) -> dict[str, Tensor]:
    return tensors


CONVERSIONS = {"transformer": _transformer, "vae": _autoencoder, "text_encoder": _first_clip}
"""From the names of the file to those of the net; what has no name there keeps its own."""


def _scheduler(scheduler: Any, facts: dict[str, Any]) -> Any:
    """Return the scheduler of the configuration, or the one that a student's file states."""
    if "shift" not in facts:
        return scheduler
    schedule = Schedule(shift=facts["shift"], stochastic_sampling=facts.get("sampler") == "renoise")
    return schedule.scheduler()


def _outline(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Names and shapes of a file's tensors, as tensors without data, and the facts in its header."""
    import torch

    head = read_header(path)
    facts: dict[str, Any] = json_io.parse(head.metadata.get("fewstep", "{}"), where=f"the header of {path}")
    outline = {key: torch.empty(fact.shape, device="meta") for key, fact in head.tensors.items()}
    return outline, checked_facts(facts, path)


def _local(config: str | Path | None) -> Path | None:
    return Path(config) if config is not None and Path(config).is_dir() else None


def _fetch(path: Path, config: str | Path | None, outline: dict[str, Tensor], lacking: list[str]) -> Path:
    """Configurations and tokenizers from the hub, and the weights of the parts ``lacking``."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from huggingface_hub import snapshot_download

    name = str(config or fetch_diffusers_config(outline)["pretrained_model_name_or_path"])
    if config is None and "stable-diffusion-3" not in name:  # what diffusers takes an unknown size for
        raise UserError(f"{path} is of none of SD3's known sizes; name its diffusers folder instead")
    weights = [f"{part}/*.safetensors" for part in lacking]
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model", *weights]))
    except (OSError, ValueError) as error:
        what = f"the hub did not give the configurations and tokenizers of {name}"
        raise UserError(f"{what}; check network and access, or give a local folder as config") from error
