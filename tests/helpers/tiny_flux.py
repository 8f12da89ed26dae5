"""Small random FLUX pipelines: every class and switch of the real ones, a few thousand weights."""

from __future__ import annotations

from typing import Any

import torch

import tiny
from fewstep.pocket.config import byte_tokenizer

KINDS = ("dev", "schnell")
NET: dict[str, Any] = {
    # black-forest-labs/FLUX.1-dev, transformer/config.json, but 2 and 3 blocks instead of 19 and 38, 16 wide.
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 24,
    "axes_dims_rope": (2, 2, 4),
}


def vae() -> Any:
    """FLUX's autoencoder with its own scaling, f8, narrow."""
    codec = tiny.vae(4)
    codec.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    return codec


def parts(kind: str) -> dict[str, Any]:
    """Random components of ``dev`` or ``schnell`` by their diffusers names."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextModel

    dev = kind == "dev"
    tokenizer = byte_tokenizer(tiny.LENGTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = FluxTransformer2DModel(**NET, guidance_embeds=dev)
        codec = vae()
        clip = CLIPTextModel(tiny.clip(tokenizer, 24, "quick_gelu").config)
        t5 = tiny.t5(tokenizer)
    return {
        "transformer": net,
        "vae": codec,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "text_encoder": clip,
        "text_encoder_2": t5,
    }
