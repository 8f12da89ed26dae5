"""Torch modules with the inputs and outputs of the diffusers SD3 pipeline, for engines that implement it.

The modules of fewstep's own graphs are in :mod:`fewstep.export.common.wrappers`. This module imports torch at
import time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.core.types import Cond
from fewstep.export.common.graphs import GraphSpec
from fewstep.export.common.token_lengths import text_length
from fewstep.export.common.wrappers import cropped, shortened
from fewstep.families.base import Family
from fewstep.families.sd3 import NetVelocity
from fewstep.modules.adaln import with_submodules


class ClipGraph(nn.Module):
    """A CLIP encoder with all hidden states. A truncated row of tokens gets an end token."""

    def __init__(self, family: Family, name: str) -> None:
        super().__init__()
        self.clip = shortened(family.parts[name], text_length(family))
        self.eos: int = family.parts["tokenizer"].eos_token_id

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Encode ``[B, L]`` int64 as pooled ``[B, P]``, the last and every layer's state ``[B, L, D]``."""
        ended = (input_ids == self.eos).any(1, keepdim=True)
        last = torch.where(ended, input_ids[:, -1:], self.eos)
        output = self.clip(torch.cat([input_ids[:, :-1], last], 1), output_hidden_states=True)
        return output.text_embeds, output.last_hidden_state, *output.hidden_states


class Transformer(nn.Module):
    """The net at a fixed spatial size.

    Args:
        family: an SD3-type family without T5.
        largest: the timestep of pure noise.
    """

    def __init__(self, family: Family, largest: int) -> None:
        super().__init__()
        self.net = cropped(family.net, *family.latent[1:])
        self.length = text_length(family)
        self.largest = largest

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
    ) -> Tensor:
        """Predict the velocity ``[B, C, H, W]``.

        The pipeline appends zeros for a missing T5. They are dropped, because no fewstep model is trained
        with them.

        Args:
            hidden_states: noisy latents ``[B, C, H, W]``.
            timestep: ``[1]``, shared by the batch.
            encoder_hidden_states: text embeddings ``[B, 2 L, D]``.
            pooled_projections: pooled text embeddings ``[B, P]``.
        """
        t = (timestep / self.largest).expand(hidden_states.shape[0])
        context = encoder_hidden_states[:, : self.length]
        return NetVelocity(self.net)(hidden_states, t, Cond(context, pooled_projections))


class Decoder(nn.Module):
    """The VAE decoder. The pipeline applies the latent scaling."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.vae = with_submodules(family.parts["vae"], {"encoder": nn.Identity()})

    def forward(self, latent_sample: Tensor) -> Tensor:
        """Decode ``[B, C, H, W]`` to images ``[B, 3, h, w]``, about [-1, 1]."""
        return self.vae.decode(latent_sample, return_dict=False)[0]


class Encoder(nn.Module):
    """The VAE encoder. The pipeline applies the latent scaling."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.vae = with_submodules(family.parts["vae"], {"decoder": nn.Identity()})

    def forward(self, sample: Tensor) -> Tensor:
        """Encode ``[B, 3, h, w]`` in [-1, 1] as ``[B, C, H, W]``, the mode of the posterior."""
        return self.vae.encode(sample).latent_dist.mode()


def diffusers_parts(family: Family, largest: int) -> dict[str, GraphSpec]:
    """Return the graphs of a model without T5 by their folders in OpenVINO's layout of diffusers pipelines.

    Args:
        family: an SD3-type family with an ``AutoencoderKL``.
        largest: the timestep of pure noise.
    """
    channels, height, width = family.latent
    length, config = text_length(family), family.parts["transformer"].config
    tokens = torch.zeros(2, length, dtype=torch.int64)
    tokens[:, 1:] = family.parts["tokenizer"].eos_token_id
    latents = torch.zeros(2, channels, height, width)
    net = {
        "hidden_states": latents,
        "timestep": torch.tensor([float(largest)]),
        "encoder_hidden_states": torch.zeros(2, 2 * length, config.joint_attention_dim),
        "pooled_projections": torch.zeros(2, config.pooled_projection_dim),
    }
    images = torch.zeros(2, 3, height * family.downscale, width * family.downscale)
    return {
        **{name: _clip(family, name, tokens) for name in ("text_encoder", "text_encoder_2")},
        "transformer": GraphSpec(Transformer(family, largest).eval(), net, ("out_sample",)),
        "vae_decoder": GraphSpec(Decoder(family).eval(), {"latent_sample": latents}, ("sample",)),
        "vae_encoder": GraphSpec(Encoder(family).eval(), {"sample": images}, ("latent_sample",)),
    }


def _clip(family: Family, name: str, tokens: Tensor) -> GraphSpec:
    states = range(family.parts[name].config.num_hidden_layers + 1)
    outputs = ("text_embeds", "last_hidden_state", *(f"hidden_states.{number}" for number in states))
    return GraphSpec(ClipGraph(family, name).eval(), {"input_ids": tokens}, outputs)
