"""Models whose configurations are known without a folder, for questions of memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fewstep.core.types import UserError
from fewstep.families import flux, sd3
from fewstep.families.registry import architecture, architecture_of, parse_family
from fewstep.families.spec import ModelSpec, read


def _clip(width: int, layers: int, heads: int, act: str) -> dict[str, int | str]:
    return {
        "vocab_size": 49408, "hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": 77,
        "hidden_act": act, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    }  # fmt: skip


_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
    "norm_num_groups": 32, "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
_T5_XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
    "num_heads": 64, "feed_forward_proj": "gated-gelu", "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_CLIP = ("transformers", "CLIPTextModelWithProjection")

SD35_MEDIUM = ModelSpec(
    # stabilityai/stable-diffusion-3.5-medium, the config.json of each part
    name="sd3.5-medium",
    architecture=sd3.ARCHITECTURE,
    classes={
        "transformer": ("diffusers", "SD3Transformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": _CLIP,
        "text_encoder_2": _CLIP,
        "text_encoder_3": ("transformers", "T5EncoderModel"),
    },
    configs={
        "transformer": {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
            "num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536,
            "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
        },
        "vae": {**_VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        "text_encoder": _clip(768, 12, 12, "quick_gelu"),
        "text_encoder_2": _clip(1280, 32, 20, "gelu"),
        "text_encoder_3": _T5_XXL,
    },
    max_tokens={"text_encoder": 77, "text_encoder_2": 77, "text_encoder_3": 256},
)  # fmt: skip
"""Stable Diffusion 3.5 Medium."""

FLUX_DEV = ModelSpec(
    # black-forest-labs/FLUX.1-dev, the config.json of each part
    name="flux-dev",
    architecture=flux.ARCHITECTURE,
    classes={
        "transformer": ("diffusers", "FluxTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "T5EncoderModel"),
    },
    configs={
        "transformer": {
            "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
            "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 4096,
            "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
        },
        "vae": {**_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        "text_encoder": _clip(768, 12, 12, "quick_gelu"),
        "text_encoder_2": _T5_XXL,
    },
    max_tokens={"text_encoder": 77, "text_encoder_2": 512},
)  # fmt: skip
"""FLUX.1 dev."""

PRESETS: Mapping[str, ModelSpec] = {spec.name: spec for spec in (SD35_MEDIUM, FLUX_DEV)}


def read_spec(model: str) -> ModelSpec:
    """Return the spec of a preset, or of a diffusers folder, of which configurations alone are read.

    Args:
        model: name of a preset or a folder, with its family in front where that is not built in.

    Raises:
        UserError: it is neither, or the folder's configurations are missing or broken.
    """
    if model in PRESETS:
        return PRESETS[model]
    family, name = parse_family(model)
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"--model {model}: neither a folder nor one of {', '.join(PRESETS)}")
    asked = None if family is None else architecture(family)
    return read(folder, architecture_of(folder, asked), tokenizers=False)
