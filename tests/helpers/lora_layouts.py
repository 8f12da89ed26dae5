"""Random LoRA adapters for a net, and the same adapter under the names of every layout; no test itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fewstep.families.registry import built_in

RANK, ALPHA = 4, 6.0
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Layer -> ``A``, ``B``."""


def draw(shapes: Mapping[str, tuple[int, int]], seed: int = 0, scale: float = 0.3) -> dict[str, Any]:
    """Random factors of layers ``{name: (out, in)}``, rank 4."""
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: (
            scale * torch.randn(RANK, inside, generator=generator),
            scale * torch.randn(out, RANK, generator=generator),
        )
        for layer, (out, inside) in shapes.items()
    }


def linears(net: Any, ends: tuple[str, ...] = ()) -> dict[str, tuple[int, int]]:
    return {
        path: (layer.out_features, layer.in_features)
        for path, layer in net.named_modules()
        if isinstance(layer, torch.nn.Linear) and (not ends or path.endswith(ends))
    }


def diffusers(factors: Factors, scale: float = 1.0, part: str = "transformer") -> dict[str, torch.Tensor]:
    """``part.LAYER.lora_A.weight`` and ``lora_B``, the scale in ``B``."""
    return {
        f"{part}.{layer}.lora_{side}.weight": tensor.clone()
        for layer, (a, b) in factors.items()
        for side, tensor in (("A", a), ("B", scale * b))
    }


def original(kind: str, shapes: Mapping[str, tuple[int, int]], seed: int = 0) -> tuple[Factors, Factors]:
    """Random factors of layers as the authors' code has them, and the same of diffusers' layers."""
    names = built_in()[kind].lora_names
    theirs = {
        name: layers
        for name, layers in names.table(shapes).items()
        if all(layer in shapes for layer in layers)
    }
    whole = {
        name: (sum(shapes[layer][0] for layer in layers), shapes[layers[0]][1])
        for name, layers in theirs.items()
    }
    drawn = draw(whole, seed)
    swap = names.swapped(shapes)
    parts: dict[str, Any] = {}
    for name, (a, b) in drawn.items():
        b = torch.cat(b.chunk(2)[::-1]) if name in swap else b
        for layer, rows in zip(theirs[name], b.split([shapes[x][0] for x in theirs[name]]), strict=True):
            parts[layer] = (a, rows)
    return drawn, parts


def kohya(factors: Factors, alpha: float | None = ALPHA, prefix: str = "lora_unet_") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for layer, (a, b) in factors.items():
        name = prefix + layer.replace(".", "_")
        found |= {f"{name}.lora_down.weight": a.clone(), f"{name}.lora_up.weight": b.clone()}
        if alpha is not None:
            found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


def comfy(
    factors: Factors,
    alpha: float | None = ALPHA,
    prefix: str = "diffusion_model.",
    ends: Any = ("lora_down", "lora_up"),
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for layer, (a, b) in factors.items():
        found |= {
            f"{prefix}{layer}.{ends[0]}.weight": a.clone(),
            f"{prefix}{layer}.{ends[1]}.weight": b.clone(),
        }
        if alpha is not None:
            found[f"{prefix}{layer}.alpha"] = torch.tensor(alpha)
    return found


def write(path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()},
        path,
        {"format": "pt", **(header or {})},
    )
    return path


def configured(**config: Any) -> dict[str, str]:
    """The header in which diffusers' trainers say how a LoRA was trained."""
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}


def peft_folder(folder: Path, factors: Factors, **config: Any) -> Path:
    """A folder as ``PeftModel.save_pretrained`` writes it."""
    tensors = {
        f"base_model.model.{layer}.lora_{side}.weight": tensor
        for layer, pair in factors.items()
        for side, tensor in zip("AB", pair, strict=True)
    }
    write(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder
