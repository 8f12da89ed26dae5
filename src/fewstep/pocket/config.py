"""The configuration of Pocket, a small SD3 for images of 128 px that trains on a laptop.

Its parts are the classes of SD3: ``sd3.load`` and ``sd3.save`` work for it.
"""

from __future__ import annotations

from typing import Any

from fewstep.families.base import Family
from fewstep.families.sd3 import assemble

LENGTH = 32
"""Tokens per prompt, the same for each of the three text encoders."""

CELLS = 16
"""Number of prompt positions, the last ones, that predict one cell each of a 4 x 4 grid over the image.

A CLIP's attention is causal, so the positions after the last word depend on the whole prompt. Few prompts are
so long that their words reach the last positions. See :mod:`fewstep.pocket.text_encoder`.
"""

TOKENS = 64 + 2 * LENGTH
"""Longest sequence of the MMDiT: the patches of a 128 px image, and the tokens of the CLIPs and of T5."""

VOCAB = 8192
"""Size of the tokenizer's vocabulary."""


def byte_tokenizer(length: int = LENGTH) -> Any:
    """Return a CLIP tokenizer whose vocabulary is the 256 bytes, plain and word-final, without merges."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=length
    )


def transformer() -> Any:
    """Return a fresh MMDiT of 8 layers of width 256, with patches of 2 x 2 latents, for up to 256 px."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=8,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=384,
        caption_projection_dim=256,
        pooled_projection_dim=384,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def clip(tokenizer: Any, activation: str) -> Any:
    """Return a fresh CLIP text encoder of width 192, with this activation function."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=VOCAB,
            hidden_size=192,
            intermediate_size=768,
            projection_dim=192,
            num_hidden_layers=4,
            num_attention_heads=3,
            max_position_embeddings=LENGTH,
            hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5(tokenizer: Any) -> Any:
    """Return a fresh T5 encoder of width 384."""
    import torch
    from transformers import T5Config, T5EncoderModel

    encoder = T5EncoderModel(
        T5Config(
            vocab_size=VOCAB,
            d_model=384,
            d_kv=64,
            d_ff=768,
            num_layers=2,
            num_heads=6,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    with torch.no_grad():
        encoder.shared.weight.mul_(0.05)  # embeddings of unit size hardly change at Pocket's rates
    return encoder


def autoencoder() -> Any:
    """Return a fresh KL autoencoder that downscales by 8 to 16 channels, as SD3's."""
    from diffusers import AutoencoderKL

    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (16, 32, 64, 128),
    }
    return AutoencoderKL(
        **blocks,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def build(
    seed: int = 0,
    *,
    codec: Any = None,
    tokenizer: Any = None,
    text_encoders: tuple[Any, Any, Any] | None = None,
) -> Family:
    """Return a Pocket with fresh weights.

    Args:
        seed: seed of the weights; torch's global random state is unchanged.
        codec: an ``AutoencoderKL`` or ``AutoencoderTiny``; by default :func:`autoencoder`.
        tokenizer: shared by the text encoders; by default :func:`byte_tokenizer`.
        text_encoders: the two CLIPs and T5 (or ``None`` for no T5); by default fresh ones.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    tokenizer = tokenizer or byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = transformer()
        vae = codec or autoencoder()
        text_encoder, text_encoder_2, text_encoder_3 = text_encoders or (
            clip(tokenizer, "quick_gelu"),
            clip(tokenizer, "gelu"),
            t5(tokenizer),
        )
    parts = {
        "transformer": net,
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "tokenizer_3": tokenizer if text_encoder_3 is not None else None,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
        "text_encoder_3": text_encoder_3,
    }
    return assemble(parts, name="pocket")


def zero_gates(net: Any) -> None:
    """Zero the modulations and the last layer in place, so that every block starts as the identity.

    This is the initialization adaLN-Zero (Peebles and Xie, arXiv 2212.09748, section 3.2).
    """
    import torch

    layers = [net.norm_out.linear, net.proj_out]
    for block in net.transformer_blocks:
        layers += [block.norm1.linear, block.norm1_context.linear]
    for layer in layers:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
