"""An SD3's tensors under Stability's key names: what reading a single file undoes.

The tables say what a layer is called there, and of which of diffusers' layers it is made: three projections
lie in one matrix, one below the other. A tensor that no table names is an error, so that none is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fewstep.core.types import UserError
from fewstep.export.base import ExportMetadata
from fewstep.families.base import Family
from fewstep.families.lora.original_names import Table, layer_table, swapped

Tensors = dict[str, Any]

RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
ENDS = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
TEXTS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
TIED = "encoder.embed_tokens.weight"


def net_tensors(parts: Mapping[str, Any]) -> Tensors:
    """The tensors of a model's ``SD3Transformer2DModel``, without a prefix.

    Raises:
        UserError: a tensor has no place there, or the first CLIP's projection has none.
    """
    import torch

    state = parts["transformer"].state_dict()
    out = renamed(state, layer_table("sd3", state))
    for layer in swapped("sd3", state):
        for end in ("weight", "bias"):
            key = f"{layer}.{end}"
            scale, shift = out[key].chunk(2)  # diffusers' order; Stability's is the other one
            out[key] = torch.cat([shift, scale])
    pooled = "y_embedder.mlp.0.weight"
    out[pooled] = with_projection(out[pooled], parts["text_encoder"].text_projection.weight.detach())
    return out


def with_projection(weight: Any, projection: Any) -> Any:
    """The net's first layer of pooled text ``[D, P]``, the first CLIP's projection ``[H, H]`` multiplied in.

    All who read these files take that projection for the identity, which it is in Stability's own.

    Raises:
        UserError: it is not square, so that the layer would change its shape.
    """
    import torch

    rows, width = projection.shape
    if rows != width:
        raise UserError(f"text_encoder projects {width} numbers to {rows}: Stability's files have no place")
    if projection.equal(torch.eye(width, dtype=projection.dtype)):
        return weight
    return torch.cat([weight[:, :width] @ projection, weight[:, width:]], dim=1)


def autoencoder_tensors(vae: Any) -> Tensors:
    """The tensors of an ``AutoencoderKL``, without a prefix.

    Raises:
        UserError: it is another kind of autoencoder, or a tensor has no place there.
    """
    kind = type(vae).__name__
    if kind != "AutoencoderKL":
        raise UserError(f"a single file holds an AutoencoderKL, and this model has an {kind}")
    blocks, layers = len(vae.config.block_out_channels), vae.config.layers_per_block
    table: dict[str, tuple[str, ...]] = {name: (name,) for name in ("quant_conv", "post_quant_conv")}
    for side, way in (("encoder", "down"), ("decoder", "up")):
        resnets = {f"mid.block_{i + 1}": f"mid_block.resnets.{i}" for i in (0, 1)}
        for i in range(blocks):
            level = i if way == "down" else blocks - 1 - i  # Stability counts both ways from the pixels
            for j in range(layers + 1):
                resnets[f"{way}.{level}.block.{j}"] = f"{way}_blocks.{i}.resnets.{j}"
            sampler = f"{side}.{way}_blocks.{i}.{way}samplers.0.conv"
            table[f"{side}.{way}.{level}.{way}sample.conv"] = (sampler,)
        for new, old in resnets.items():
            table |= {f"{side}.{new}.{a}": (f"{side}.{old}.{b}",) for a, b in RESNET.items()}
        place = f"{side}.mid_block.attentions.0"
        table |= {f"{side}.mid.attn_1.{a}": (f"{place}.{b}",) for a, b in ATTENTION.items()}
        table |= {f"{side}.{a}": (f"{side}.{b}",) for a, b in ENDS.items()}
    out = renamed(vae.state_dict(), table)
    for key, tensor in out.items():
        if ".mid.attn_1." in key and tensor.ndim == 2:  # a convolution of one pixel there
            out[key] = tensor[:, :, None, None]
    return out


def text_tensors(parts: Mapping[str, Any]) -> Tensors:
    """The tensors of the text encoders that are there, as ``clip_l.transformer.`` and so on; the first
    CLIP's projection is in the net (:func:`with_projection`).

    Raises:
        UserError: both CLIPs are of one width, by which diffusers tells them apart.
    """
    first, second = (parts[part].config.hidden_size for part in ("text_encoder", "text_encoder_2"))
    if first == second:
        raise UserError(f"both CLIPs are {first} wide, and by their widths readers tell them apart")
    out: Tensors = {}
    for part, place in TEXTS.items():
        state = {} if parts[part] is None else dict(parts[part].state_dict())
        if place == "clip_l":
            del state["text_projection.weight"]
        if TIED in state:  # T5's one table of embeddings: stock diffusers lacks it where it lies there once
            state[TIED] = state[TIED].clone()
        out |= {f"{place}.transformer.{key}": tensor for key, tensor in state.items()}
    return out


def checkpoint(parts: Mapping[str, Any]) -> Tensors:
    """All of a model, as Stability's single files are laid out.

    Raises:
        UserError: it cannot be laid out so.
    """
    groups = {
        "model.diffusion_model": net_tensors(parts),
        "first_stage_model": autoencoder_tensors(parts["vae"]),
        "text_encoders": text_tensors(parts),
    }
    return {f"{prefix}.{key}": tensor for prefix, group in groups.items() for key, tensor in group.items()}


def renamed(state: Mapping[str, Any], table: Table) -> Tensors:
    """``state`` under the names of ``table``.

    Raises:
        UserError: a tensor has no place in the table.
    """
    import torch

    left, out = dict(state), {}
    for new, olds in table.items():
        for end in ("", ".weight", ".bias"):
            if olds[0] + end in left:
                rows = [left.pop(old + end) for old in olds]
                out[new + end] = rows[0] if len(rows) == 1 else torch.cat(rows)
    if left:
        raise UserError(f"Stability's files have no place for {sorted(left)[0]}")
    return out


def file_metadata(family: Family, metadata: ExportMetadata, bits: int) -> dict[str, str]:
    """What a file tells of its model: ``title``, ``license`` and ``usage_hint`` for people, and ``fewstep``,
    a JSON object of all that we know; the licence's text too, which in one file cannot get lost."""
    guided = "no guidance (CFG 1)" if family.guidance is None else f"guidance (CFG) {family.guidance:g}"
    place = metadata.license_file
    text = None if place is None else place.read_text(encoding="utf-8", errors="replace")
    ours = {
        "name": family.name,
        "steps": family.steps,
        "guidance": family.guidance,
        "shift": family.shift,
        "sampler": family.sampler,
        "license": metadata.license,
        "license_text": text,
        "about": {"bits": bits, **metadata.about},
    }
    return {
        "title": family.name,
        "license": metadata.license,
        "usage_hint": f"{family.steps} steps, {guided}, shift {family.shift:g}, {family.sampler}",
        "fewstep": json.dumps(ours),
    }
