"""Tensors of an SD3 model under Stability's key names, the inverse of reading a single file.

Tables map a layer's name to the diffusers layers that it consists of: a fused matrix stacks three
projections. A tensor that no table contains is an error, so that none is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from fewstep.core.types import UserError
from fewstep.export.base import ExportMetadata
from fewstep.families.base import Family
from fewstep.families.lora.original_names import SD3, Table

if TYPE_CHECKING:
    from torch import Tensor

Tensors: TypeAlias = "dict[str, Tensor]"

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
    out = renamed(state, SD3.table(state))
    for layer in SD3.swapped(state):
        for end in ("weight", "bias"):
            key = f"{layer}.{end}"
            scale, shift = out[key].chunk(2)  # diffusers' order, the reverse of Stability's
            out[key] = torch.cat([shift, scale])
    pooled = "y_embedder.mlp.0.weight"
    out[pooled] = with_projection(out[pooled], parts["text_encoder"].text_projection.weight.detach())
    return out


def with_projection(weight: Tensor, projection: Tensor) -> Tensor:
    """Return the net's first layer of pooled text ``[D, P]`` times the first CLIP's projection ``[H, H]``.

    Readers of these files assume that this projection is the identity, as it is in Stability's own files.

    Raises:
        UserError: the projection is not square, so that the layer would change its shape.
    """
    import torch

    rows, width = projection.shape
    if rows != width:
        raise UserError(f"text_encoder projects {width} numbers to {rows}: Stability's files have no place")
    if projection.equal(torch.eye(width, dtype=projection.dtype)):
        return weight
    return torch.cat([weight[:, :width] @ projection, weight[:, width:]], dim=1)


def autoencoder_tensors(vae: Any) -> Tensors:
    """Return the tensors of an ``AutoencoderKL``, without a prefix.

    Raises:
        UserError: it is another kind of autoencoder, or a tensor has no name in Stability's format.
    """
    kind = type(vae).__name__
    if kind != "AutoencoderKL":
        raise UserError(f"a single file holds an AutoencoderKL, and this model has an {kind}")
    blocks, layers = len(vae.config.block_out_channels), vae.config.layers_per_block
    table: dict[str, tuple[str, ...]] = {name: (name,) for name in ("quant_conv", "post_quant_conv")}
    for side, direction in (("encoder", "down"), ("decoder", "up")):
        resnets = {f"mid.block_{i + 1}": f"mid_block.resnets.{i}" for i in (0, 1)}
        for i in range(blocks):
            level = i if direction == "down" else blocks - 1 - i  # Stability counts from the pixels
            for j in range(layers + 1):
                resnets[f"{direction}.{level}.block.{j}"] = f"{direction}_blocks.{i}.resnets.{j}"
            sampler = f"{side}.{direction}_blocks.{i}.{direction}samplers.0.conv"
            table[f"{side}.{direction}.{level}.{direction}sample.conv"] = (sampler,)
        for new, old in resnets.items():
            table |= {f"{side}.{new}.{a}": (f"{side}.{old}.{b}",) for a, b in RESNET.items()}
        attention = f"{side}.mid_block.attentions.0"
        table |= {f"{side}.mid.attn_1.{a}": (f"{attention}.{b}",) for a, b in ATTENTION.items()}
        table |= {f"{side}.{a}": (f"{side}.{b}",) for a, b in ENDS.items()}
    out = renamed(vae.state_dict(), table)
    for key, tensor in out.items():
        if ".mid.attn_1." in key and tensor.ndim == 2:  # a 1x1 convolution there
            out[key] = tensor[:, :, None, None]
    return out


def text_tensors(parts: Mapping[str, Any]) -> Tensors:
    """Return the tensors of the model's text encoders, under ``clip_l.transformer.`` and so on.

    The first CLIP's projection is merged into the net (:func:`with_projection`).

    Raises:
        UserError: both CLIPs have the same width, by which diffusers distinguishes them.
    """
    first, second = (parts[part].config.hidden_size for part in ("text_encoder", "text_encoder_2"))
    if first == second:
        raise UserError(f"both CLIPs are {first} wide, and by their widths readers tell them apart")
    out: Tensors = {}
    for part, prefix in TEXTS.items():
        state = {} if parts[part] is None else dict(parts[part].state_dict())
        if prefix == "clip_l":
            del state["text_projection.weight"]
        if TIED in state:  # tied embeddings, which diffusers does not find if they are stored once
            state[TIED] = state[TIED].clone()
        out |= {f"{prefix}.transformer.{key}": tensor for key, tensor in state.items()}
    return out


def checkpoint(parts: Mapping[str, Any]) -> Tensors:
    """Return all tensors of a model in the layout of Stability's single files.

    Raises:
        UserError: the layout has no place for a part or tensor.
    """
    groups = {
        "model.diffusion_model": net_tensors(parts),
        "first_stage_model": autoencoder_tensors(parts["vae"]),
        "text_encoders": text_tensors(parts),
    }
    return {f"{prefix}.{key}": tensor for prefix, group in groups.items() for key, tensor in group.items()}


def renamed(state: Mapping[str, Tensor], table: Table) -> Tensors:
    """Return ``state`` under the names of ``table``.

    Raises:
        UserError: the table does not contain a tensor.
    """
    import torch

    left, out = dict(state), {}
    for new, sources in table.items():
        for end in ("", ".weight", ".bias"):
            if sources[0] + end in left:
                rows = [left.pop(source + end) for source in sources]
                out[new + end] = rows[0] if len(rows) == 1 else torch.cat(rows)
    if left:
        raise UserError(f"Stability's files have no place for {sorted(left)[0]}")
    return out


def file_metadata(family: Family, metadata: ExportMetadata, bits: int) -> dict[str, str]:
    """Return the metadata of a file: ``title``, ``license`` and ``usage_hint`` for readers, and ``fewstep``.

    ``fewstep`` is a JSON object with everything that loading needs, and with the text of the licence.
    """
    guided = "no guidance (CFG 1)" if family.guidance is None else f"guidance (CFG) {family.guidance:g}"
    file = metadata.license_file
    text = None if file is None else file.read_text(encoding="utf-8", errors="replace")
    fields = {
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
        "fewstep": json.dumps(fields),
    }
