"""Torch modules that are exported as graphs.

Each takes and returns tensors only and holds all constants. This module imports torch at import time.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.types import Cond
from fewstep.export.common.token_lengths import text_length
from fewstep.families.base import Family
from fewstep.families.common import LatentCodec
from fewstep.families.sd3 import NetVelocity
from fewstep.modules.adaln import split_modulation, with_submodules


class TextModule(nn.Module):
    """Both CLIP encoders on the tokens of the first one's tokenizer.

    Stable Diffusion pads the first CLIP's tokens with the end token and the second one's with another token.
    Where these differ, the padding is replaced for the second encoder.
    """

    def __init__(self, family: Family) -> None:
        super().__init__()
        parts = family.parts
        length = text_length(family)
        self.first, self.second = (
            shortened(parts[name], length) for name in ("text_encoder", "text_encoder_2")
        )
        self.eos: int = parts["tokenizer"].eos_token_id
        self.pads: tuple[int, int] = (parts["tokenizer"].pad_token_id, parts["tokenizer_2"].pad_token_id)
        widths = (self.first.config.hidden_size, self.second.config.hidden_size)
        self.padding: int = parts["transformer"].config.joint_attention_dim - sum(widths)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode ``tokens [B, L]`` int64 as context ``[B, L, D]`` and pooled vector ``[B, P]``."""
        second_tokens = tokens
        if self.pads[0] != self.pads[1]:
            ends = (tokens == self.eos).to(torch.int64)
            second_tokens = torch.where(ends.cumsum(1) - ends > 0, self.pads[1], tokens)
        first = self.first(tokens, output_hidden_states=True)
        second = self.second(second_tokens, output_hidden_states=True)
        context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
        return nn.functional.pad(context, (0, self.padding)), pooled


class T5Module(nn.Module):
    """The T5 encoder, whose output follows the CLIPs' in the context."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.t5 = family.parts["text_encoder_3"]

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode ``tokens [B, L]`` int64 of T5's tokenizer as context ``[B, L, D]``."""
        return self.t5(tokens)[0]


class ModulationModule(nn.Module):
    """The net's adaLN modulations of time and pooled text (:mod:`fewstep.modules.adaln`)."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.modulation, _ = split_modulation(family.net)

    def forward(self, t: Tensor, pooled: Tensor) -> Tensor:
        """Compute modulations ``[B, M]`` of ``t [B]`` in [0, 1] and ``pooled [B, P]``."""
        return self.modulation(1000 * t, pooled)


class TransformerModule(nn.Module):
    """The net's velocity at a fixed spatial size, with cropped position embeddings and given modulations."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        _, net = split_modulation(family.net)
        self.net = cropped(net, *family.latent[1:])

    def forward(self, x: Tensor, context: Tensor, modulation: Tensor) -> Tensor:
        """Predict the velocity ``[B, C, H, W]``.

        Args:
            x: noisy latents ``[B, C, H, W]``.
            context: text embeddings ``[B, L, D]``.
            modulation: modulations ``[B, M]``.
        """
        no_time = x.new_zeros(x.shape[0])  # the modulations contain the time
        return NetVelocity(self.net)(x, no_time, Cond(context, modulation))


class DecoderModule(nn.Module):
    """The VAE decoder with the latent scaling."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.vae = with_submodules(family.parts["vae"], {"encoder": nn.Identity()})

    def forward(self, latents: Tensor) -> Tensor:
        """Decode ``[B, C, H, W]`` to images ``[B, 3, h, w]``, about [-1, 1]."""
        return LatentCodec(self.vae).decode(latents)


class EncoderModule(nn.Module):
    """The VAE encoder with the latent scaling."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.vae = with_submodules(family.parts["vae"], {"decoder": nn.Identity()})

    def forward(self, images: Tensor) -> Tensor:
        """Encode ``[B, 3, h, w]`` in [-1, 1] as ``[B, C, H, W]``, the mode of the posterior."""
        return LatentCodec(self.vae).encode(images)


def shortened(clip: Any, length: int) -> Any:
    """Return a CLIP with only the position embeddings of ``length`` tokens."""
    table = clip.text_model.embeddings.position_embedding.weight
    if length == len(table):
        return clip
    short = copy.deepcopy(clip)  # transformers hooks layers per model, so no layer may belong to two models
    short.text_model.embeddings.position_embedding = nn.Embedding.from_pretrained(table[:length].clone())
    return short


def cropped(net: Any, height: int, width: int) -> Any:
    """Return ``net`` with the position embeddings of ``height`` x ``width`` latents; the rest is shared."""
    embed = copy.copy(net.pos_embed)
    table = embed.cropped_pos_embed(height, width)
    embed._buffers = {**embed._buffers, "pos_embed": table.contiguous()}
    embed.height, embed.width = height // embed.patch_size, width // embed.patch_size
    embed.pos_embed_max_size = None  # the table is used as it is
    return with_submodules(net, {"pos_embed": embed})
