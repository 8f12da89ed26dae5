"""A family that the package does not know: another net, one text encoder, a token mask, no pooled text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from fewstep.core.types import Cond
from fewstep.families.base import Architecture, Family
from fewstep.families.common import Reader, append_mask, family_of_parts, split_mask, warn_of_cuts
from fewstep.families.net_classes import SHARED_CLASSES, VAE_CLASSES, Layers, NetClass, Side, Width
from fewstep.families.schedulers import of_scheduler, schedule_shift

PARTS = ("transformer", "vae", "scheduler", "tokenizer", "text_encoder")


@dataclass(frozen=True)
class GridConfig:
    in_channels: Width
    sample_size: Side
    width: Width
    context_width: Width
    num_layers: Layers


class Block(nn.Module):
    """Cross attention to the text."""

    def __init__(self, width: int, context_width: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width)
        self.to_k, self.to_v = nn.Linear(context_width, width), nn.Linear(context_width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return x + nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])


class GridTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    @register_to_config
    def __init__(
        self, in_channels: int, sample_size: int, width: int, context_width: int, num_layers: int
    ) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(in_channels, width), nn.Linear(1, width)
        self.layers = nn.ModuleList([Block(width, context_width) for _ in range(num_layers)])
        self.out = nn.Linear(width, in_channels)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        h = self.embed(x.flatten(2).transpose(1, 2)) + self.time(t[:, None])[:, None]
        for layer in self.layers:
            h = layer(h, context, mask)
        return self.out(h).transpose(1, 2).reshape(x.shape)


class GridPipeline(DiffusionPipeline):  # type: ignore[misc]
    def __init__(self, transformer: Any, vae: Any, scheduler: Any, tokenizer: Any, text_encoder: Any) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, tokenizer=tokenizer,
            text_encoder=text_encoder,
        )  # fmt: skip


@dataclass(frozen=True)
class NetVelocity:
    net: Any

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        context, mask = split_mask(cond.context)
        dtype = self.net.dtype
        return self.net(x_t.to(dtype), t.to(dtype), context.to(dtype), mask).float()


@dataclass(frozen=True)
class Text:
    parts: Mapping[str, Any]

    def __call__(self, prompts: Sequence[str]) -> Cond:
        encoder, tokenizer = self.parts["text_encoder"], self.parts["tokenizer"]
        config = encoder.config
        length = min(config.max_position_embeddings, tokenizer.model_max_length)
        reader = Reader("CLIP", tokenizer, length, config.vocab_size)
        warn_of_cuts(prompts, [reader])
        ids = reader(prompts)
        with torch.no_grad():
            tokens = encoder(ids.to(encoder.device))[0]
        mask = (ids != tokenizer.pad_token_id).to(tokens.device)
        return Cond(append_mask(tokens.float(), mask), tokens.new_zeros(len(prompts), 0).float())


class Grid(Architecture):
    name = "grid"
    pipeline = "GridPipeline"
    nets = {  # noqa: RUF012
        "transformer": ("GridTransformer",),
        "vae": VAE_CLASSES,
        "text_encoder": ("CLIPTextModel",),
    }
    net_classes = {  # noqa: RUF012
        **SHARED_CLASSES,
        "GridTransformer": NetClass("transformer", GridConfig, lambda: GridTransformer),
    }
    required = PARTS
    block_lists = ("layers",)
    modulation = None
    lora_targets = ("to_q", "to_k", "to_v")

    def assemble(
        self,
        parts: Mapping[str, Any],
        *,
        name: str,
        steps: int | None = None,
        guidance: float | None = 2.0,
        side: int | None = None,
        device: str = "cpu",
    ) -> Family:
        config = parts["transformer"].config
        width = side or config.sample_size
        return family_of_parts(
            parts,
            architecture=self,
            device=device,
            name=name,
            velocity=NetVelocity(parts["transformer"]),
            text=Text(parts),
            latent=(config.in_channels, width, width),
            shift=schedule_shift(of_scheduler(parts["scheduler"]), width**2),
            steps=steps or 4,
            guidance=guidance,
        )

    def pipeline_class(self) -> Any:
        return GridPipeline

    def patch(self, config: Mapping[str, Any]) -> int:
        return 1

    def context_dim(self, config: Mapping[str, Any]) -> int:
        return int(config["context_width"]) + 1  # the mask


ARCHITECTURE = Grid()
