"""Diffusers' names of SD3's tensors to Stability's: the inverse of what loading a single file does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

OUTER = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
INNER = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
JOINED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}


def _swap(tensor: torch.Tensor) -> torch.Tensor:
    """Diffusers' (scale, shift) to Stability's (shift, scale)."""
    scale, shift = tensor.chunk(2)
    return torch.cat([shift, scale])


def transformer(state: Mapping[str, torch.Tensor]) -> Tensors:
    out: Tensors = {}
    layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("transformer_blocks."))
    for ours, theirs in OUTER.items():
        for end in ("", ".weight", ".bias"):
            if ours + end in state:
                tensor = state[ours + end]
                out[theirs + end] = _swap(tensor) if ours == "norm_out.linear" else tensor
    for i in range(layers):
        ours, theirs = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
        for end in (".weight", ".bias"):
            for old, new in INNER.items():
                if ours + old + end in state:
                    tensor = state[ours + old + end]
                    last = old == "norm1_context.linear" and i == layers - 1
                    out[theirs + new + end] = _swap(tensor) if last else tensor
            for new, olds in JOINED.items():
                if ours + olds[0] + end in state:
                    out[theirs + new + end] = torch.cat([state[ours + old + end] for old in olds])
    return out


def autoencoder(state: Mapping[str, torch.Tensor], blocks: int) -> Tensors:
    out: Tensors = {}
    for key, tensor in state.items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        for i in range(blocks):
            name = name.replace(f"down_blocks.{i}.", f"down.{i}.").replace(
                f"up_blocks.{i}.", f"up.{blocks - 1 - i}."
            )
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace(
            "mid_block.resnets.1", "mid.block_2"
        )
        name = name.replace("samplers.0", "sample").replace(".resnets.", ".block.")
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            name = name.replace("to_out.0", "proj_out").replace("to_", "")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        out[name] = tensor
    return out


def checkpoint(parts: Mapping[str, Any]) -> Tensors:
    """All components in one dictionary, as Stability's single files are laid out."""
    groups = {
        "model.diffusion_model.": transformer(parts["transformer"].state_dict()),
        "first_stage_model.": autoencoder(parts["vae"].state_dict(), 4),
    }
    for part, place in (
        ("text_encoder", "clip_l"),
        ("text_encoder_2", "clip_g"),
        ("text_encoder_3", "t5xxl"),
    ):
        if parts[part] is not None:
            groups[f"text_encoders.{place}.transformer."] = parts[part].state_dict()
    return {prefix + key: tensor.clone() for prefix, group in groups.items() for key, tensor in group.items()}
