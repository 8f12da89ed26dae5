"""Names of the layers of SD3 and FLUX in their authors' code.

One layer there may be several of diffusers' layers: the three projections are rows of one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

Table: TypeAlias = Mapping[str, tuple[str, ...]]
"""Name in the authors' code -> diffusers' names, in the order of their rows."""

SD3_NET: Table = {
    "pos_embed": ("pos_embed.pos_embed",),
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "context_embedder": ("context_embedder",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
SD3_BLOCK: Table = {
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}
"""One block; the last one has less of the context's half, and only some have ``attn2``."""

FLUX_NET: Table = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
FLUX_DOUBLE: Table = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
FLUX_SINGLE: Table = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}


@dataclass(frozen=True)
class OriginalNames:
    """The names of a family's layers in LoRA files and in its authors' code.

    Attributes:
        encoders: name of a text encoder in LoRA files -> part of the model.
        net: the table of the layers outside blocks.
        blocks: diffusers' name of a list of blocks -> the authors' name of it, and the table of one block.
        last_norm: layer of the last block whose modulation is a shift and a scale, as (diffusers' list,
            the authors' layer); ``None`` where no block has one.
    """

    encoders: Mapping[str, str]
    net: Table
    blocks: Mapping[str, tuple[str, Table]]
    last_norm: tuple[str, str] | None = None

    def table(self, names: Iterable[str]) -> Table:
        """Return the whole table of a net.

        Args:
            names: names of the net's layers or tensors in diffusers; they give the number of blocks.
        """
        names = list(names)
        found = dict(self.net)
        for theirs, (original, block) in self.blocks.items():
            for i in range(count_blocks(names, theirs)):
                for new, olds in block.items():
                    found[f"{original}.{i}.{new}"] = tuple(f"{theirs}.{i}.{old}" for old in olds)
        return found

    def swapped(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the layers, by the authors' names, whose rows are shift and scale. In diffusers the order
        is scale and shift."""
        layers = ["final_layer"]
        if self.last_norm is not None:
            theirs, layer = self.last_norm
            layers.append(f"{self.blocks[theirs][0]}.{count_blocks(names, theirs) - 1}.{layer}")
        return tuple(f"{layer}.adaLN_modulation.1" for layer in layers)


SD3 = OriginalNames(
    encoders={
        "te1": "text_encoder",
        "te2": "text_encoder_2",
        "te3": "text_encoder_3",
        "clip_g": "text_encoder_2",
    },
    net=SD3_NET,
    blocks={"transformer_blocks": ("joint_blocks", SD3_BLOCK)},
    last_norm=("transformer_blocks", "context_block"),
)
FLUX = OriginalNames(
    encoders={"te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_2"},
    net=FLUX_NET,
    blocks={
        "transformer_blocks": ("double_blocks", FLUX_DOUBLE),
        "single_transformer_blocks": ("single_blocks", FLUX_SINGLE),
    },
)
DIFFUSERS = OriginalNames(encoders={}, net={}, blocks={})
"""Of a family whose LoRA files have diffusers' names alone."""


def count_blocks(names: Iterable[str], of: str) -> int:
    """Return how many blocks a list of blocks has."""
    found = (re.match(rf"{of}\.(\d+)\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)
