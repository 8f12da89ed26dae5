"""Adds LoRA adapters to the weights of a model.

An adapter adds ``scale B A`` to the weight of a layer (Hu et al., arXiv 2106.09685), with ``A [r, in]``,
``B [out, r]`` and ``scale = alpha / r``. Layouts differ in what they call a layer, in whether three
projections are one layer, and in where alpha stands: in a tensor, in the header, in a file beside.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.core.types import UserError
from fewstep.families.diffusers_io import first_line
from fewstep.families.lora.alpha import FILE, PEFT_FILE
from fewstep.families.lora.file import listed, read
from fewstep.families.lora.layers import LoraFamily, Shapes, Update, resolve, shapes_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHUNK = 2**20
"""Numbers of a weight that are added to at once: float32 copies are of so many, and not of the layer."""


class LoraWarning(UserWarning):
    """Something of a LoRA is not used, or had to be assumed."""


def added(weight: Tensor, updates: Sequence[Update], dtype: torch.dtype) -> Tensor:
    """A weight with updates added in float32, then rounded to ``dtype``.

    Args:
        weight: ``[out, in]``, or a convolution's ``[out, in, h, w]``; written over where it is of ``dtype``.
        updates: in the order in which they are added.
        dtype: torch dtype of the result.

    Raises:
        UserError: see :meth:`fewstep.families.lora.layers.Update.read`.
    """
    import torch

    pairs = [update.read() for update in updates]
    result = weight if weight.dtype == dtype else torch.empty_like(weight, dtype=dtype)
    old, new = weight.flatten(1), result.flatten(1)
    rows = max(1, CHUNK // old.shape[1])
    for begin in range(0, len(old), rows):
        few = slice(begin, begin + rows)
        total = old[few].float()
        for up, down in pairs:
            total = total + up[few] @ down
        new[few] = total.to(dtype)
    return result


def find(place: Path, option: str = "--lora") -> Path:
    """The ``.safetensors`` file of a LoRA: a file, or in a folder or run what diffusers or PEFT write.

    Raises:
        UserError: there is none, or several.
    """
    try:
        if place.is_file():
            if place.suffix != ".safetensors":
                raise UserError(f"{option} {place}: only .safetensors files are read")
            return place
        for name in (FILE, PEFT_FILE, f"lora/{FILE}"):
            if (place / name).is_file():
                return place / name
        found = sorted(place.glob("*.safetensors"))
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {place} cannot be read: {first_line(error)}") from None
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{option} {place} holds several .safetensors files: name one, such as {found[0]}")
    if place.exists():
        raise UserError(f"{option} {place} holds no LoRA: neither {FILE} nor {PEFT_FILE} is in it")
    raise UserError(f"there is no LoRA {place}: give a .safetensors file, or a folder with one")


def parsed(spec: str) -> tuple[str, float]:
    """``FILE[:WEIGHT]`` -> the file and the adapter's weight, 1 where none is given.

    What follows the last colon is a weight where it is a number and the rest is there; a file whose own name
    ends so needs a weight after it.

    Raises:
        UserError: no file is named, or the weight is no finite number.
    """
    name, colon, last = spec.rpartition(":")
    try:
        weight = float(last) if colon else None
    except ValueError:
        weight = None
    there = _there(spec)
    if weight is None:
        if name and not there and _there(name):
            raise UserError(f"--lora {spec}: the weight must be a number, such as {name}:0.8")
        name, weight = spec, 1.0
    elif there and not _there(name):
        name, weight = spec, 1.0
    if not name:
        raise UserError("--lora must name a .safetensors file, or a folder with one")
    if not math.isfinite(weight):
        raise UserError(f"--lora {spec}: the weight must be a finite number, such as {name}:0.8")
    return name, weight


def _there(name: str) -> bool:
    try:
        return bool(name) and Path(name).exists()
    except (OSError, ValueError):
        return False


def specs(given: object) -> tuple[str, ...]:
    """Return the LoRAs that Python or the command line gives as ``FILE:WEIGHT``, always with a weight.

    Args:
        given: ``None``, a ``FILE[:WEIGHT]``, or several, each that or a pair of file and weight.

    Raises:
        UserError: see :func:`parsed`.
    """
    if given is None:
        return ()
    many = [given] if isinstance(given, str | Path) or not isinstance(given, Iterable) else list(given)
    if len(many) == 2 and isinstance(many[1], int | float):
        many = [tuple(many)]
    found: list[str] = []
    for one in many:
        if isinstance(one, str):
            name, weight = parsed(one)
        elif isinstance(one, Path):
            name, weight = str(one), 1.0
        else:
            name, weight = _pair(one)
        found.append(f"{name}:{weight!r}")
    return tuple(found)


def _pair(one: Any) -> tuple[str, float]:
    try:
        name, weight = one
        weight = float(weight)
    except (TypeError, ValueError):
        name, weight = None, math.nan
    if not isinstance(name, str | Path) or not math.isfinite(weight):
        raise UserError(f"lora must be FILE[:WEIGHT] or (file, weight), not {str(one)[:40]}")
    return str(name), weight


def named(given: Sequence[str]) -> dict[str, list[str]]:
    """Return the names and weights of LoRAs for a model's metadata, without folders."""
    return {"lora": [f"{Path(name).name}:{weight!r}" for name, weight in map(parsed, given)]} if given else {}


def updates_of(
    given: Sequence[str], family: LoraFamily, shapes: Callable[[str], Shapes | None]
) -> dict[str, dict[str, list[Update]]]:
    """Return what several LoRAs add to a model, and warn of layers that cannot be used.

    Args:
        given: ``FILE[:WEIGHT]`` of each.
        family: the model's family.
        shapes: see :func:`fewstep.families.lora.layers.resolve`.

    Returns:
        Part -> layer -> what is added, in the order of the LoRAs. One of weight 0 adds nothing.

    Raises:
        UserError: one of them is missing, damaged, foreign or not followed.
    """
    shapes = cache(shapes)
    total: dict[str, dict[str, list[Update]]] = {}
    for spec in given:
        name, weight = parsed(spec)
        lora = read(find(Path(name)))
        updates, left = resolve(lora, family, shapes, weight)
        for note in lora.notes:
            warnings.warn(f"{lora.path}: {note}", LoraWarning, stacklevel=2)
        if left:
            text = f"{lora.path}: left out what the model has no layer for: {listed(left)}"
            warnings.warn(text, LoraWarning, stacklevel=2)
        for part, layers in updates.items():
            for layer, update in layers.items() if weight else ():
                total.setdefault(part, {}).setdefault(layer, []).append(update)
    return total


def apply(parts: Mapping[str, Any], family: LoraFamily, given: Sequence[str]) -> None:
    """Add LoRAs to the nets of a model that is in memory, in place.

    Args:
        parts: components by their diffusers names; ``None`` for what is absent.
        family: the model's family.
        given: ``FILE[:WEIGHT]`` of each.

    Raises:
        UserError: see :func:`updates_of`.
    """
    import torch

    def shapes(part: str) -> Shapes | None:
        return None if parts.get(part) is None else shapes_of(parts[part])

    with torch.no_grad():
        for part, layers in updates_of(given, family, shapes).items():
            for layer, updates in layers.items():
                weight = parts[part].get_submodule(layer).weight
                weight.copy_(added(weight.detach().cpu().contiguous(), updates, weight.dtype))
