"""Small random SD3 pipelines: every class and switch of the real ones, a few thousand weights."""

from __future__ import annotations

from typing import Any

import torch

from fewstep.core import sampling, schedule
from fewstep.families.base import Family
from fewstep.pocket.config import byte_tokenizer

LENGTH = 24
SD35_MEDIUM: dict[str, Any] = {
    # stabilityai/stable-diffusion-3.5-medium, transformer/config.json, but heads of 2 instead of 64
    # (so 48 wide instead of 1536) and text 64 wide instead of 4096.
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 2,
    "caption_projection_dim": 48,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 56,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SMALL: dict[str, Any] = SD35_MEDIUM | {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "caption_projection_dim": 16,
    "pos_embed_max_size": 16,
    "dual_attention_layers": (0, 1),
}


def clip(tokenizer: Any, width: int, act: str) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def t5(tokenizer: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def vae(channels: int) -> Any:
    """SD3's autoencoder with its own scaling, f8, narrow."""
    from diffusers import AutoencoderKL

    shape: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (4, 4, 8, 8),
    }
    return AutoencoderKL(
        **shape,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=64,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def tiny_vae(channels: int) -> Any:
    from diffusers import AutoencoderTiny

    wide = (8, 8, 8, 8)
    return AutoencoderTiny(
        encoder_block_out_channels=wide,
        decoder_block_out_channels=wide,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
        latent_channels=channels,
    )


def parts(config: dict[str, Any] = SMALL, *, with_t5: bool = True, tiny: bool = False) -> dict[str, Any]:
    """Random components by their diffusers names; CLIPs of widths 24 and 32."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    tokenizer = byte_tokenizer(LENGTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SD3Transformer2DModel(**config)
        codec = (tiny_vae if tiny else vae)(config["in_channels"])
        texts = [clip(tokenizer, 24, "quick_gelu"), clip(tokenizer, 32, "gelu")]
        third = t5(tokenizer) if with_t5 else None
    return {
        "transformer": net,
        "vae": codec,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "tokenizer_3": tokenizer if with_t5 else None,
        "text_encoder": texts[0],
        "text_encoder_2": texts[1],
        "text_encoder_3": third,
    }


def original(**options: Any) -> dict[str, Any]:
    """:func:`parts`, the first CLIP pooling without a projection, as in all of Stability's files."""
    made = parts(**options)
    with torch.no_grad():
        made["text_encoder"].text_projection.weight.copy_(torch.eye(24))
    return made


def assert_batch_does_not_matter(family: Family, prompts: list[str]) -> None:
    """The second of two prompts gives the same latents and text alone as beside the first."""
    noise, cond = sampling.batch_noise([1, 2], family.latent), family.text(prompts)
    with torch.no_grad():
        both = sampling.sample_flow(family.velocity, family.from_numpy(noise), schedule.grid(4), cond)
        second = sampling.sample_flow(
            family.velocity, family.from_numpy(noise[1:]), schedule.grid(4), cond[1:]
        )
    assert (both[1:] - second).abs().max() < 1e-4
    assert (family.text(prompts[1:]).context - cond.context[1:]).abs().max() < 1e-5
