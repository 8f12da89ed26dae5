"""Single-file SD3 checkpoints in Stability's key names, through diffusers' own conversion (floor 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep import formats
from fewstep.families.folder import T5, checked_facts, first_line, read_index, read_part
from fewstep.families.header import read_header
from fewstep.types import UserError

MARKS = {
    "text_encoder": "text_encoders.clip_l.transformer.text_model.embeddings.position_embedding.weight",
    "text_encoder_2": "text_encoders.clip_g.transformer.text_model.embeddings.position_embedding.weight",
    "text_encoder_3": "text_encoders.t5xxl.transformer.shared.weight",
}
"""A tensor by which to see that a text encoder is in the file; many files leave all three out."""


def read_single(
    path: Path, config: str | Path | None, dtype: Any, t5: bool | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The components of a single-file checkpoint, and the facts that ``fewstep export`` wrote into its
    header; what the file lacks comes from ``config``.

    Args:
        path: the ``.safetensors`` file.
        config: a diffusers folder or a hub name; ``None`` is the hub's original of the checkpoint.
        dtype: torch dtype of the nets.
        t5: see ``sd3.load``.

    Raises:
        UserError: not such a checkpoint, a broken one, or the configuration cannot be had.
    """
    from diffusers import StableDiffusion3Pipeline

    outline, facts = _outline(path)
    if not any(".x_block." in key for key in outline):
        raise UserError(f"{path} is not an SD3 checkpoint: it has no joint_blocks")
    if not any(key.startswith("first_stage_model.") for key in outline):
        raise UserError(f"{path} has no autoencoder (first_stage_model); give a file that has, or a folder")
    lacking = [part for part, mark in MARKS.items() if mark not in outline]
    if t5 is False:
        lacking = [part for part in lacking if part not in T5]
    folder = _local(config) or _fetch(path, config, outline, lacking)
    index = read_index(folder, "StableDiffusion3", T5 if t5 else ())
    given: dict[str, Any] = {}
    if t5 is False or any(part not in index for part in T5):
        given = dict.fromkeys(T5)
    for part in lacking:
        if part not in given:
            if part not in index:
                raise UserError(f"{part} is neither in {path} nor in {folder}")
            given[part] = read_part(folder, part, index[part], dtype)
    try:
        pipe = StableDiffusion3Pipeline.from_single_file(
            str(path), config=str(folder), torch_dtype=dtype, local_files_only=True, **given
        )
    except NotImplementedError as error:  # torch cannot move a tensor that the file gave no data
        raise UserError(f"{path} lacks weights of its autoencoder or text encoders") from error
    except Exception as error:  # of a library that believes what it reads
        raise UserError(f"cannot load {path}: {first_line(error)}") from error
    parts = _whole(path, pipe.components)
    return {**parts, "scheduler": _told(parts["scheduler"], facts)}, facts


def _told(scheduler: Any, facts: dict[str, Any]) -> Any:
    """The scheduler of the configuration, but a student's steps are laid and taken as its own file says."""
    if "shift" not in facts:
        return scheduler
    renoise = facts.get("sampler") == "renoise"
    return type(scheduler).from_config(scheduler.config, shift=facts["shift"], stochastic_sampling=renoise)


def _outline(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Names and shapes of a file's tensors, as tensors without data, and the facts in its header."""
    import torch

    head = read_header(path)
    facts: dict[str, Any] = formats.parse(head.metadata.get("fewstep", "{}"), where=f"the header of {path}")
    outline = {key: torch.empty(fact.shape, device="meta") for key, fact in head.tensors.items()}
    return outline, checked_facts(facts, path)


def _local(config: str | Path | None) -> Path | None:
    return Path(config) if config is not None and Path(config).is_dir() else None


def _fetch(path: Path, config: str | Path | None, outline: dict[str, Any], lacking: list[str]) -> Path:
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


def _whole(path: Path, components: dict[str, Any]) -> dict[str, Any]:
    """The components, if no tensor of theirs was left without a value."""
    import torch

    for part, component in components.items():
        if isinstance(component, torch.nn.Module):
            tie: Any = getattr(component, "tie_weights", None)
            if tie is not None:  # files hold T5's one table of embeddings once or twice
                tie()
            holes = [name for name, tensor in component.named_parameters() if tensor.is_meta]
            if holes:
                raise UserError(f"{path} lacks weights of {part}, among them {holes[0]}")
    foreign = ("image_encoder", "feature_extractor")
    return {part: component for part, component in components.items() if part not in foreign}
