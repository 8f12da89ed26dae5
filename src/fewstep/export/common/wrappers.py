"""The torch modules that become graphs: tensors in, tensors out, every constant inside.

This file imports torch when it is imported; only the exporters import it.
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
    """Both CLIPs on one row of tokens, made by the first one's tokenizer.

    Stable Diffusion pads the first CLIP's tokens with the end token and the second one's with another;
    where they differ, what follows the first end token is replaced for the second.
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
        self.room: int = parts["transformer"].config.joint_attention_dim - sum(widths)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``tokens [B, L]`` int64 -> context ``[B, L, D]``, pooled ``[B, P]``."""
        others = tokens
        if self.pads[0] != self.pads[1]:
            ends = (tokens == self.eos).to(torch.int64)
            others = torch.where(ends.cumsum(1) - ends > 0, self.pads[1], tokens)
        first = self.first(tokens, output_hidden_states=True)
        second = self.second(others, output_hidden_states=True)
        context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
        return nn.functional.pad(context, (0, self.room)), pooled


class T5Module(nn.Module):
    """T5 on its own tokenizer's row: the rows of the context that follow the CLIPs'."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.t5 = family.parts["text_encoder_3"]

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens [B, L]`` int64 -> context ``[B, L, D]``."""
        return self.t5(tokens)[0]


class ModulationModule(nn.Module):
    """What the net makes of time and pooled text alone (:mod:`fewstep.modules.adaln`)."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.modulation, _ = split_modulation(family.net)

    def forward(self, t: Tensor, pooled: Tensor) -> Tensor:
        """``t [B]`` in [0, 1], ``pooled [B, P]`` -> modulations ``[B, M]``."""
        return self.modulation(1000 * t, pooled)


class TransformerModule(nn.Module):
    """The net as a velocity of fixed spatial size, its modulations given, its table of positions cropped."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        _, net = split_modulation(family.net)
        self.net = cropped(net, *family.latent[1:])

    def forward(self, x: Tensor, context: Tensor, modulation: Tensor) -> Tensor:
        """``x [B, C, H, W]``, ``context [B, L, D]``, ``modulation [B, M]`` -> velocity ``[B, C, H, W]``."""
        none = x.new_zeros(x.shape[0])  # the time is in the modulations
        return NetVelocity(self.net)(x, none, Cond(context, modulation))


class DecoderModule(nn.Module):
    """Latents to pixels, the scaling inside."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.vae = with_submodules(family.parts["vae"], {"encoder": nn.Identity()})

    def forward(self, latents: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, 3, h, w]``, about [-1, 1]."""
        return LatentCodec(self.vae).decode(latents)


class EncoderModule(nn.Module):
    """Pixels to latents, the scaling inside."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.vae = with_submodules(family.parts["vae"], {"decoder": nn.Identity()})

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, h, w]`` in [-1, 1] -> ``[B, C, H, W]``, the mode of the posterior."""
        return LatentCodec(self.vae).encode(images)


def shortened(clip: Any, length: int) -> Any:
    """A CLIP with only the positions that ``length`` tokens use."""
    table = clip.text_model.embeddings.position_embedding.weight
    if length == len(table):
        return clip
    short = copy.deepcopy(clip)  # transformers hooks each layer once a model: none may be in two
    short.text_model.embeddings.position_embedding = nn.Embedding.from_pretrained(table[:length].clone())
    return short


def cropped(net: Any, height: int, width: int) -> Any:
    """``net`` with only the positions that latents of ``height`` x ``width`` use; all else is shared."""
    embed = copy.copy(net.pos_embed)
    table = embed.cropped_pos_embed(height, width)
    embed._buffers = {**embed._buffers, "pos_embed": table.contiguous()}
    embed.height, embed.width = height // embed.patch_size, width // embed.patch_size
    embed.pos_embed_max_size = None  # the table is used as it is
    return with_submodules(net, {"pos_embed": embed})
