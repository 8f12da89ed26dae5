"""What layers of SD3 and FLUX are called in their authors' code.

A layer there may be several of diffusers' layers, one below the other: three projections lie in one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
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
BLOCKS: Mapping[str, Mapping[str, tuple[str, Table]]] = {
    "sd3": {"transformer_blocks": ("joint_blocks", SD3_BLOCK)},
    "flux": {
        "transformer_blocks": ("double_blocks", FLUX_DOUBLE),
        "single_transformer_blocks": ("single_blocks", FLUX_SINGLE),
    },
}
"""Family -> diffusers' name of a list of blocks -> the authors' name of it, and the table of one block."""


def layer_table(kind: str, names: Iterable[str]) -> Table:
    """The whole table of a net.

    Args:
        kind: the family, ``sd3`` or ``flux``.
        names: of the net's layers or tensors in diffusers; they say how many blocks there are.
    """
    names = list(names)
    found = dict(SD3_NET if kind == "sd3" else FLUX_NET)
    for theirs, (original, block) in BLOCKS[kind].items():
        for i in range(blocks(names, theirs)):
            for new, olds in block.items():
                found[f"{original}.{i}.{new}"] = tuple(f"{theirs}.{i}.{old}" for old in olds)
    return found


def swapped(kind: str, names: Iterable[str]) -> tuple[str, ...]:
    """Layers, by the authors' names, whose rows are shift and scale; in diffusers scale and shift."""
    places = ["final_layer"]
    if kind == "sd3":
        places.append(f"joint_blocks.{blocks(names, 'transformer_blocks') - 1}.context_block")
    return tuple(f"{place}.adaLN_modulation.1" for place in places)


def blocks(names: Iterable[str], of: str) -> int:
    """How many blocks a list of them has."""
    found = (re.match(rf"{of}\.(\d+)\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)
