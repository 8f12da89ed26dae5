"""The classes of nets that a model folder may name, with the shape of each configuration.

A family adds its own classes in :attr:`fewstep.families.base.Architecture.net_classes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

if TYPE_CHECKING:
    from torch.nn import Module

MAX_LAYERS = 128
MAX_LIST = 128
"""Most values in a list of a configuration."""
MAX_WIDTH = 2**20
"""Limit of every other integer: widths, sides, vocabulary sizes."""

Width = Annotated[int, Meta(ge=1, le=MAX_WIDTH)]
Layers = Annotated[int, Meta(ge=0, le=MAX_LAYERS)]
Number = Annotated[int, Meta(ge=-MAX_WIDTH, le=MAX_WIDTH)]
Side = Annotated[int, Meta(ge=1, le=4096)]
Patch = Annotated[int, Meta(ge=1, le=64)]
Real = Annotated[float, Meta(ge=-1e6, le=1e6)]
Factor = Annotated[float, Meta(gt=0, le=1e6)]
Names = Annotated[tuple[str, ...], Meta(max_length=MAX_LIST)]
Indices = Annotated[tuple[Layers, ...], Meta(max_length=MAX_LIST)]
Widths = Annotated[tuple[Width, ...], Meta(min_length=1, max_length=MAX_LIST)]
Counts = Annotated[tuple[Layers, ...], Meta(min_length=1, max_length=MAX_LIST)]
Token = Number | None


@dataclass(frozen=True)
class NetClass:
    """A class of net that a model folder may name.

    Attributes:
        part: the part that it can be: ``transformer``, ``vae`` or ``text_encoder``.
        config: a dataclass with the fields of its configuration that are checked.
        load: returns the class; ``None`` takes it from diffusers or transformers by its name.
    """

    part: str
    config: type
    load: Callable[[], type[Module]] | None = None


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """The configuration of diffusers' ``AutoencoderKL``."""

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
class AutoencoderTinyConfig:
    """The configuration of diffusers' ``AutoencoderTiny``."""

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
class CLIPConfig:
    """The configuration of a CLIP text encoder of transformers."""

    vocab_size: Width = 49408
    hidden_size: Width = 512
    intermediate_size: Width = 2048
    projection_dim: Width = 512
    num_hidden_layers: Annotated[int, Meta(ge=1, le=MAX_LAYERS)] = 12  # the second to last layer is read
    num_attention_heads: Width = 8
    max_position_embeddings: Annotated[int, Meta(ge=1, le=4096)] = 77
    hidden_act: str = "quick_gelu"
    bos_token_id: Token = None
    eos_token_id: Number = 49407
    pad_token_id: Token = None


@dataclass(frozen=True)
class T5Config:
    """The configuration of transformers' ``T5EncoderModel``."""

    vocab_size: Width = 32128
    d_model: Width = 512
    d_kv: Width = 64
    d_ff: Width = 2048
    num_layers: Layers = 6
    num_decoder_layers: Layers | None = None
    num_heads: Width = 8
    relative_attention_num_buckets: Annotated[int, Meta(ge=2, le=4096)] = 32
    relative_attention_max_distance: Annotated[int, Meta(ge=1, le=MAX_WIDTH)] = 128
    feed_forward_proj: str = "relu"
    bos_token_id: Token = None
    eos_token_id: Token = None
    pad_token_id: Token = None


VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
SHARED_CLASSES: Mapping[str, NetClass] = {
    "AutoencoderKL": NetClass("vae", AutoencoderKLConfig),
    "AutoencoderTiny": NetClass("vae", AutoencoderTinyConfig),
    "CLIPTextModel": NetClass("text_encoder", CLIPConfig),
    "CLIPTextModelWithProjection": NetClass("text_encoder", CLIPConfig),
    "T5EncoderModel": NetClass("text_encoder", T5Config),
}
"""The autoencoders and text encoders that families share."""
