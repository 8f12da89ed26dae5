"""The parts of SD3's pipeline as diffusers calls them, for engines that bring that pipeline.

Those of our own are in :mod:`fewstep.export.common.wrappers`. This file imports torch when it is imported.
"""

from __future__ import annotations

from typing import Any

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
    """One CLIP, with all that it tells. A row that was cut before its end token ends with one."""

    def __init__(self, family: Family, name: str) -> None:
        super().__init__()
        self.clip = shortened(family.parts[name], text_length(family))
        self.eos: int = family.parts["tokenizer"].eos_token_id

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """``[B, L]`` int64 -> pooled ``[B, P]``, then the last state and every layer's, ``[B, L, D]``."""
        ended = (input_ids == self.eos).any(1, keepdim=True)
        last = torch.where(ended, input_ids[:, -1:], self.eos)
        told = self.clip(torch.cat([input_ids[:, :-1], last], 1), output_hidden_states=True)
        return told.text_embeds, told.last_hidden_state, *told.hidden_states


class Transformer(nn.Module):
    """The net, of fixed spatial size.

    Args:
        family: without T5.
        largest: the timestep that stands for pure noise.
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
        """``[B, C, H, W]``, ``[1]`` for all, ``[B, 2 L, D]``, ``[B, P]`` -> velocity ``[B, C, H, W]``.

        The second half of the context's rows, the zeros of a T5 that is not there, are dropped: no model
        here was taught with them.
        """
        t = (timestep / self.largest).expand(hidden_states.shape[0])
        context = encoder_hidden_states[:, : self.length]
        return NetVelocity(self.net)(hidden_states, t, Cond(context, pooled_projections))


class Decoder(nn.Module):
    """The autoencoder's half that draws, its scaling left to the pipeline."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.vae = with_submodules(family.parts["vae"], {"encoder": nn.Identity()})

    def forward(self, latent_sample: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, 3, h, w]``, about [-1, 1]."""
        return self.vae.decode(latent_sample, return_dict=False)[0]


class Encoder(nn.Module):
    """Its other half, likewise."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.vae = with_submodules(family.parts["vae"], {"decoder": nn.Identity()})

    def forward(self, sample: Tensor) -> Tensor:
        """``[B, 3, h, w]`` in [-1, 1] -> ``[B, C, H, W]``, the mode of the posterior."""
        return self.vae.encode(sample).latent_dist.mode()


def stock_parts(family: Family, largest: int) -> dict[str, GraphSpec]:
    """The graphs of a model without T5, by their folders in OpenVINO's layout of diffusers' pipelines.

    Args:
        family: SD3-type, with an ``AutoencoderKL``.
        largest: the timestep that stands for pure noise.
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


def _clip(family: Family, name: str, tokens: Any) -> GraphSpec:
    states = range(family.parts[name].config.num_hidden_layers + 1)
    outputs = ("text_embeds", "last_hidden_state", *(f"hidden_states.{number}" for number in states))
    return GraphSpec(ClipGraph(family, name).eval(), {"input_ids": tokens}, outputs)
