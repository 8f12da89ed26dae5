"""Which layers of a model a LoRA's names mean."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from fewstep.core.types import UserError
from fewstep.families.lora.file import Factors, Lora, tensor_of
from fewstep.families.lora.header import short
from fewstep.families.lora.original_names import OriginalNames

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

_MARKS = (
    ("a U-Net (SD 1.5 or SDXL)", r"(down|up)_blocks|mid_block|(in|out)put_blocks|middle_block"),
    ("flux", r"(double|single)_blocks|single_transformer_blocks"),
    ("sd3", r"joint_blocks|[._]attn2[._]|pos_embed"),
    ("Wan", r"blocks[._]\d+[._](self|cross)_attn"),
    ("Qwen-Image", r"(img|txt)_mod"),
    ("PixArt or LTX", r"adaln_single|caption_projection"),
)
"""Whose layers they are -> how their names are known."""


class LoraFamily(Protocol):
    """The part of a family that :func:`resolve` uses, as an
    :class:`~fewstep.families.base.Architecture` has it."""

    @property
    def name(self) -> str: ...
    @property
    def lora_names(self) -> OriginalNames: ...


@dataclass(frozen=True)
class Update:
    """The update of one layer: ``scale B[rows] A``, the halves of the rows swapped if ``swap``."""

    path: Path
    down: str
    up: str
    scale: float
    rows: tuple[int, int]
    swap: bool = False

    def read(self) -> tuple[Tensor, Tensor]:
        """``scale B [out, r]`` and ``A [r, in]``, float32.

        Raises:
            UserError: they cannot be read, or are no finite numbers.
        """
        import torch

        up, down = (tensor_of(self.path, name).float().flatten(1) for name in (self.up, self.down))
        up = self.scale * up[slice(*self.rows)]
        if not (up.isfinite().all() and down.isfinite().all()):
            raise UserError(f"{self.path} holds NaN or infinity in {short(self.down)} or its counterpart")
        return torch.cat(up.chunk(2)[::-1]) if self.swap else up, down


Updates: TypeAlias = Mapping[str, Sequence[Update]]
"""Layer -> what is added to its weight."""
Shapes: TypeAlias = Mapping[str, tuple[int, int]]
"""Layer -> the shape of its weight, ``[out, in]`` (:func:`shapes_of`)."""


def shapes_of(net: Module) -> dict[str, tuple[int, int]]:
    """Layers of a net that an adapter may change, with the shapes of their weights, ``[out, in]``; of a
    convolution ``in`` counts the kernel."""
    import torch

    return {
        path: (layer.weight.shape[0], math.prod(layer.weight.shape[1:]))
        for path, layer in net.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    }


def resolve(
    lora: Lora, family: LoraFamily, shapes: Callable[[str], Shapes | None], weight: float = 1.0
) -> tuple[dict[str, dict[str, Update]], list[str]]:
    """Return the updates that a LoRA makes.

    Args:
        lora: the adapter.
        family: the model's family.
        shapes: part -> its layers; ``None`` where the model has no such part.
        weight: the adapter's.

    Returns:
        Part -> layer -> what is added to it, and names of layers that the model has not.

    Raises:
        UserError: it is another model's: of another family, of other shapes, or without any layer of this.
    """
    updates: dict[str, dict[str, Update]] = {}
    left: list[tuple[str, Factors]] = []
    nets: dict[str, _Names | None] = {}
    for factors in lora.factors:
        part = family.lora_names.encoders.get(factors.part, factors.part)
        if part not in nets:
            layers = shapes(part)
            nets[part] = None if layers is None else _Names.of(part, family.lora_names, layers)
        net = nets[part]
        layers = None if net is None else net.find(factors)
        if net is None or layers is None:
            left.append((part, factors))
            continue
        for layer, update in net.updates(lora.path, factors, layers, weight).items():
            if layer in updates.setdefault(part, {}):
                raise UserError(f"{lora.path} adds to {layer} twice, the second time as {factors.down}")
            updates[part][layer] = update
    _check_family(lora.path, family.name, [factors.name for part, factors in left if part == "transformer"])
    if not updates:
        names = ", ".join(short(factors.down) for _, factors in left[:1])
        raise UserError(
            f"{lora.path} is a LoRA of another net: the model has no layer of it, such as {names}"
        )
    return updates, [factors.down.removesuffix(".weight") for _, factors in left]


def _check_family(path: Path, kind: str, names: Sequence[str]) -> None:
    for name in names:
        family = next((family for family, mark in _MARKS if re.search(mark, name)), kind)
        if family != kind:
            raise UserError(
                f"{path} is a LoRA of another net: it looks like one for {family} ({short(name)}), "
                f"and the model is of the family {kind}"
            )


@dataclass(frozen=True)
class _Names:
    """How files call the layers of one net.

    Attributes:
        shapes: of its layers.
        names: name in a file -> the layers that it means.
        swap: names whose rows' halves are the other way round.
    """

    shapes: Shapes
    names: Mapping[str, tuple[str, ...]]
    swap: frozenset[str]

    @staticmethod
    def of(part: str, original: OriginalNames, shapes: Shapes) -> _Names:
        if part != "transformer":
            names = {layer.removeprefix("text_model."): (layer,) for layer in shapes}
            olds = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
            for name, layers in list(names.items()):
                front, _, last = name.rpartition(".")
                names.setdefault(f"{front}.{olds.get(last, last)}", layers)
            return _Names(shapes, _flattened(names), frozenset())
        theirs = {
            name: layers
            for name, layers in original.table(shapes).items()
            if all(layer in shapes for layer in layers)
        }
        names = theirs | {layer: (layer,) for layer in shapes}
        names |= _xlabs(theirs) | _processors(shapes)
        swap = {name for name in original.swapped(shapes) if name in names}
        return _Names(shapes, _flattened(names), frozenset(swap | {n.replace(".", "_") for n in swap}))

    def find(self, factors: Factors) -> tuple[str, ...] | None:
        name = factors.name.removeprefix("text_model_" if factors.flat else "text_model.")
        layers = self.names.get(name)
        if layers is None or factors.chunk is None:
            return layers
        return layers[factors.chunk : factors.chunk + 1] or None

    def updates(
        self, path: Path, factors: Factors, layers: Sequence[str], weight: float
    ) -> dict[str, Update]:
        """Of each of the layers that ``factors`` mean.

        Raises:
            UserError: they have other shapes.
        """
        ours = [self.shapes[layer] for layer in layers]
        if factors.shape != (sum(out for out, _ in ours), ours[0][1]):
            what = f"{', '.join(layers)}: {list(map(list, ours))}, the LoRA has {list(factors.shape)}"
            raise UserError(f"{path} is a LoRA of another shape: {what}")
        swap = factors.name in self.swap
        found: dict[str, Update] = {}
        begin = 0
        for layer, (out, _) in zip(layers, ours, strict=True):
            rows = (begin, begin + out)
            found[layer] = Update(path, factors.down, factors.up, weight * factors.scale, rows, swap)
            begin += out
        return found


def _flattened(names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The names, and the same with underscores for dots."""
    return {name.replace(".", "_"): layers for name, layers in names.items()} | dict(names)


def _xlabs(theirs: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """XLabs' names of FLUX's attention."""
    ends = {
        "img_attn.qkv": "processor.qkv_lora1",
        "img_attn.proj": "processor.proj_lora1",
        "txt_attn.qkv": "processor.qkv_lora2",
        "txt_attn.proj": "processor.proj_lora2",
    }
    found: dict[str, tuple[str, ...]] = {}
    for name, layers in theirs.items():
        for end, other in ends.items():
            if name.startswith("double_blocks.") and name.endswith(end):
                found[name.removesuffix(end) + other] = layers
        if name.startswith("single_blocks.") and name.endswith("linear1"):
            found[name.removesuffix("linear1") + "processor.qkv"] = layers[:3]
        if name.startswith("single_blocks.") and name.endswith("linear2"):
            found[name.removesuffix("linear2") + "processor.proj"] = layers
    return found


def _processors(shapes: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Old diffusers' names of attention, where a LoRA was an attention processor."""
    found: dict[str, tuple[str, ...]] = {}
    for layer in shapes:
        front, attn, end = layer.rpartition(".attn.")
        if attn:
            found[f"{front}.attn.{end.removesuffix('.0')}"] = (layer,)
            found[f"{front}.attn.processor.{end.removesuffix('.0')}"] = (layer,)
    return found
