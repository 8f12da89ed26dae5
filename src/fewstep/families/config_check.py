"""What a stranger's diffusers folder says, checked before diffusers and transformers act on it.

Both believe a configuration: they make as many layers and as long tables as it says, and fail far from the
file where a value has another type. Here each configuration that we read has a shape, and numbers have
limits.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from fewstep.core import json_io
from fewstep.core.types import UserError

MOST_LAYERS = 128
MOST_LISTED = 128
"""Of the values in a list."""
MOST_WIDTH = 2**20
"""Of any other number: widths, sides, words of a vocabulary."""
LEFT_OUT = ("vocab_size", "max_position_embeddings")
"""What is read of a text encoder's configuration, whose file need not say it."""
SPARE = 2**20
"""Weights that a configuration may declare beyond :data:`TIMES` as many as its files hold."""
TIMES = 2
"""A table that two parts of a net share is stored once, and which of them has it differs."""

Width = Annotated[int, Meta(ge=1, le=MOST_WIDTH)]
Layers = Annotated[int, Meta(ge=0, le=MOST_LAYERS)]
Number = Annotated[int, Meta(ge=-MOST_WIDTH, le=MOST_WIDTH)]
Side = Annotated[int, Meta(ge=1, le=4096)]
Real = Annotated[float, Meta(ge=-1e6, le=1e6)]
Factor = Annotated[float, Meta(gt=0, le=1e6)]
Names = Annotated[tuple[str, ...], Meta(max_length=MOST_LISTED)]
Indices = Annotated[tuple[Layers, ...], Meta(max_length=MOST_LISTED)]
Widths = Annotated[tuple[Width, ...], Meta(min_length=1, max_length=MOST_LISTED)]
Counts = Annotated[tuple[Layers, ...], Meta(min_length=1, max_length=MOST_LISTED)]
Token = Number | None


@dataclass(frozen=True)
class _Sd3:
    sample_size: Side
    patch_size: Annotated[int, Meta(ge=1, le=64)]
    in_channels: Width
    attention_head_dim: Width
    num_attention_heads: Width
    joint_attention_dim: Width
    pos_embed_max_size: Side
    num_layers: Layers = 18
    caption_projection_dim: Width = 1152
    pooled_projection_dim: Width = 2048
    out_channels: Width | None = 16
    dual_attention_layers: Indices = ()
    qk_norm: str | None = None


@dataclass(frozen=True)
class _Flux:
    in_channels: Width
    attention_head_dim: Width
    num_attention_heads: Width
    joint_attention_dim: Width
    pooled_projection_dim: Width
    patch_size: Annotated[int, Meta(ge=1, le=64)] = 1
    out_channels: Width | None = None
    num_layers: Layers = 19
    num_single_layers: Layers = 38
    guidance_embeds: bool = False
    axes_dims_rope: Widths = (16, 56, 56)

    def __post_init__(self) -> None:
        axes = self.axes_dims_rope
        if len(axes) != 3 or sum(axes) != self.attention_head_dim or any(axis % 2 for axis in axes):
            raise ValueError("axes_dims_rope must be three even numbers whose sum is attention_head_dim")


@dataclass(frozen=True)
class _Kl:
    block_out_channels: Widths
    latent_channels: Width
    in_channels: Width = 3
    out_channels: Width = 3
    down_block_types: Names = ()
    up_block_types: Names = ()
    layers_per_block: Annotated[int, Meta(ge=1, le=16)] = 1
    act_fn: str = "silu"
    norm_num_groups: Width = 32
    sample_size: Width | Widths = 32
    scaling_factor: Factor = 0.18215
    shift_factor: Real | None = None
    latents_mean: tuple[Real, ...] | None = None
    latents_std: tuple[Real, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


@dataclass(frozen=True)
class _Tiny:
    in_channels: Width = 3
    out_channels: Width = 3
    encoder_block_out_channels: Widths = (64,)
    decoder_block_out_channels: Widths = (64,)
    block_out_channels: Widths = (64,)
    num_encoder_blocks: Counts = (1,)
    num_decoder_blocks: Counts = (1,)
    act_fn: str = "relu"
    upsample_fn: str = "nearest"
    upsampling_scaling_factor: Annotated[int, Meta(ge=1, le=8)] = 2
    latent_channels: Width = 4
    latent_magnitude: Real = 3
    latent_shift: Real = 0.5
    force_upcast: bool = False
    scaling_factor: Factor = 1.0
    shift_factor: Real | None = 0.0


@dataclass(frozen=True)
class _Clip:
    vocab_size: Width = 49408
    hidden_size: Width = 512
    intermediate_size: Width = 2048
    projection_dim: Width = 512
    num_hidden_layers: Annotated[int, Meta(ge=1, le=MOST_LAYERS)] = 12  # the last but one is read
    num_attention_heads: Width = 8
    max_position_embeddings: Annotated[int, Meta(ge=1, le=4096)] = 77
    hidden_act: str = "quick_gelu"
    bos_token_id: Token = None
    eos_token_id: Number = 49407
    pad_token_id: Token = None


@dataclass(frozen=True)
class _T5:
    vocab_size: Width = 32128
    d_model: Width = 512
    d_kv: Width = 64
    d_ff: Width = 2048
    num_layers: Layers = 6
    num_decoder_layers: Layers | None = None
    num_heads: Width = 8
    relative_attention_num_buckets: Annotated[int, Meta(ge=2, le=4096)] = 32
    relative_attention_max_distance: Annotated[int, Meta(ge=1, le=MOST_WIDTH)] = 128
    feed_forward_proj: str = "relu"
    bos_token_id: Token = None
    eos_token_id: Token = None
    pad_token_id: Token = None


@dataclass(frozen=True)
class _Added:
    content: Annotated[str, Meta(min_length=1)]


@dataclass(frozen=True)
class _Tokenizer:
    model_max_length: Annotated[int, Meta(ge=1)] | Annotated[float, Meta(ge=1)] = 512
    added_tokens_decoder: dict[Annotated[int, Meta(ge=0, lt=2**24)], _Added] = field(
        default_factory=dict[Any, Any]
    )


KNOWN: Mapping[str, tuple[str, type]] = {
    "SD3Transformer2DModel": ("transformer", _Sd3),
    "FluxTransformer2DModel": ("transformer", _Flux),
    "AutoencoderKL": ("vae", _Kl),
    "AutoencoderTiny": ("vae", _Tiny),
    "CLIPTextModel": ("text_encoder", _Clip),
    "CLIPTextModelWithProjection": ("text_encoder", _Clip),
    "T5EncoderModel": ("text_encoder", _T5),
}
"""Class of a net -> the part of a model that it can be, and the shape of its configuration."""


LIBRARIES = ("diffusers", "transformers")
"""The only modules that are imported because a file names them: importing another would run its code."""

_VAES = ("AutoencoderKL", "AutoencoderTiny")
PARTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "StableDiffusion3Pipeline": {
        "transformer": ("SD3Transformer2DModel",),
        "vae": _VAES,
        "text_encoder": ("CLIPTextModelWithProjection",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "text_encoder_3": ("T5EncoderModel",),
    },
    "FluxPipeline": {
        "transformer": ("FluxTransformer2DModel",),
        "vae": _VAES,
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("T5EncoderModel",),
    },
}
"""Plain pipeline of a family -> the classes that its nets can be."""


def is_plain(kind: str, pipeline: str) -> bool:
    """Whether a pipeline class makes the same images of a text as the plain pipeline of a family.

    Those that begin with an image or a mask share all parts and the sampling; any other has more in it.

    Args:
        kind: name of the class.
        pipeline: name of the plain one.
    """
    stem = pipeline.removesuffix("Pipeline")
    return kind in (pipeline, f"{stem}Img2ImgPipeline", f"{stem}InpaintPipeline")


def check_class(entry: tuple[str, str], part: str, where: str, pipeline: str | None = None) -> None:
    """Refuse a class that cannot be that part of a model, by its name alone: nothing is imported.

    Args:
        entry: library and class, as the index says.
        part: by its diffusers name, such as ``text_encoder_2``.
        where: of the index, for errors.
        pipeline: the family's plain pipeline; ``None`` where the family is not known.

    Raises:
        UserError: it cannot, or its library is another than :data:`LIBRARIES`.
    """
    library, name = entry
    if library not in LIBRARIES:
        raise UserError(
            f"{where} names a class of {library[:80] or 'no library'} for {part}: "
            "only diffusers and transformers are known"
        )
    stem = part.rstrip("_123")
    known = PARTS.get(pipeline or "", {})
    if part in known:
        fits = name in known[part]
    elif stem in {kind for kind, _ in KNOWN.values()}:
        fits = KNOWN.get(name, ("",))[0] == stem
    else:  # a tokenizer or a scheduler, or what is never loaded
        fits = name.isidentifier()
    if not fits:
        of = f" of a {pipeline}" if pipeline else ""
        raise UserError(f"{where} names {name[:80] or 'no class'} for {part}{of}, which cannot be one")


def class_of(entry: tuple[str, str], part: str, where: str) -> Any:
    """The class of a part: the one place where a library is imported because a file names it.

    Args:
        entry: library and class, as the index says.
        part: by its diffusers name.
        where: of the index, for errors.

    Raises:
        UserError: see :func:`check_class`; or the library has no such class.
    """
    check_class(entry, part, where)
    library, name = entry
    try:
        kind = getattr(importlib.import_module(library), name, None)
    except Exception:  # one of the library's modules that needs what is not installed
        kind = None
    if kind is None:
        raise UserError(
            f"{where} names {library}.{name[:80]} for {part}, which the installed {library} does not have"
        )
    tokenizer = part.rstrip("_123") == "tokenizer"
    if tokenizer != hasattr(kind, "vocab_files_names") or not (tokenizer or name in KNOWN):
        raise UserError(f"{where} names {name[:80]} for {part}, which cannot be one")
    return kind


def check_config(config: Mapping[str, Any], name: str | None, where: str) -> None:
    """Refuse a configuration that has another shape than its class reads, or numbers beyond the limits.

    Args:
        config: as the JSON says.
        name: of the class.
        where: of the file, for errors.

    Raises:
        UserError: it is so.
    """
    if name is not None and name in KNOWN:
        json_io.convert(config, KNOWN[name][1], where)


def with_defaults(config: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """A net's configuration with what transformers leaves out where it is the class's default.

    Args:
        config: as the JSON says.
        name: of the class.
    """
    shape = KNOWN[name][1] if name is not None and name in KNOWN else None
    told = {key: getattr(shape, key) for key in LEFT_OUT if shape in (_Clip, _T5) and hasattr(shape, key)}
    return told | dict(config)


def longest_prompt(folder: Path) -> float:
    """Tokens of a prompt that a tokenizer's folder says it is made for; some say a number without an end.

    Raises:
        UserError: its configuration has another shape.
    """
    path = folder / "tokenizer_config.json"
    return json_io.read(path, _Tokenizer).model_max_length if path.is_file() else _Tokenizer.model_max_length


def check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer's folder whose files the libraries cannot take.

    Raises:
        UserError: a file has another shape, or numbers beyond the limits.
    """
    from fewstep.runtime.tokenizer_check import Identifier, check

    if (path := folder / "tokenizer_config.json").exists():
        json_io.read(path, _Tokenizer)
    if (path := folder / "tokenizer.json").exists():
        check(path)
    for name in ("vocab.json", "added_tokens.json"):
        if (path := folder / name).exists():
            json_io.read(path, dict[str, Identifier])


def check_weights(folder: Path, kind: Any, library: str, config: Mapping[str, Any], stored: int) -> None:
    """Refuse a net whose configuration declares far more weights than its files hold.

    Args:
        folder: of the part, for errors.
        kind: its class.
        library: of the class.
        config: of the net.
        stored: numbers in its files.

    Raises:
        UserError: it does.
    """
    import torch

    with torch.device("meta"):  # shapes without memory
        net = kind.from_config(dict(config)) if library == "diffusers" else kind(kind.config_class(**config))
    declared = sum(tensor.numel() for tensor in net.state_dict().values())
    if declared > TIMES * stored + SPARE:
        raise UserError(
            f"{folder} declares {declared} weights in its configuration, and its files hold {stored}"
        )
