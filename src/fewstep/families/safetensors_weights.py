"""The weights of one part of a model, read tensor by tensor.

A reader that maps whole files counts them as this process's memory. One that loads whole parts needs them
twice where they are cast. Here one tensor is in memory at a time. 8-bit floats are multiplied by the scales
beside them where the layout leaves no doubt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.core import json_io
from fewstep.core.types import UserError
from fewstep.families.safetensors_match import resolve
from fewstep.families.safetensors_tensors import (
    DTYPES,
    FLOATS,
    NARROW,
    Entry,
    Shape,
    check_format,
    header,
    item_bytes,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

SCALES = (".scale_weight", ".weight_scale")
"""Ends of the names of scales: ComfyUI's, and that of most others. Each multiplies ``.weight``."""


@dataclass(frozen=True)
class Weights:
    """The tensors of one part.

    Attributes:
        folder: the part's folder, or the file of a single-file checkpoint.
        entries: its tensors by the names in its files.
        scales: by the name of an 8-bit weight, what its values are multiplied by.
        names: by the name in the net, the name in the files, where they differ (:meth:`matched`).
    """

    folder: Path
    entries: Mapping[str, Entry]
    scales: Mapping[str, Entry] = field(default_factory=dict[str, Entry])
    names: Mapping[str, str] = field(default_factory=dict[str, str])

    @staticmethod
    def open(folder: Path) -> Weights:
        """Read the headers of a part's ``.safetensors`` files.

        Raises:
            UserError: there are none, one is broken, or a scale is of a layout that is not followed.
        """
        entries: dict[str, Entry] = {}
        for path in _files(folder):
            new = header(path)
            if twice := entries.keys() & new.keys():
                raise UserError(f"{folder} has {sorted(twice)[0]} in two files")
            entries |= new
        return Weights(folder, entries).scaled()

    def scaled(self) -> Weights:
        """The same with each scale assigned to its weight instead of a tensor of its own.

        Raises:
            UserError: a scale is of a layout that is not followed.
        """
        scales: dict[str, Entry] = {}
        used: set[str] = set()
        marks: list[str] = []
        for name, entry in self.entries.items():
            layer, dot, last = name.rpartition(".")
            weight = f"{layer}{dot}weight"
            if f"{dot}{last}" in SCALES and weight in self.entries and self._scales(weight, entry):
                if weight in scales:
                    raise UserError(f"{entry.path} has two scales of {weight}")
                scales[weight] = entry
                used.add(name)
            elif last == "comfy_quant" and entry.kind == "U8":
                description = bytes(entry.read().tolist()).decode("utf-8", "replace")
                check_format(json_io.parse(description, dict[str, Any], f"{entry.path}: {name}"), entry.path)
                used.add(name)
            elif last == "scaled_fp8":  # says that there are scales
                used.add(name)
                marks.append(name)
        for mark in marks:
            if not any(name.startswith(mark.removesuffix("scaled_fp8")) for name in scales):
                raise UserError(f"{self.entries[mark].path} has {mark}, but no scale: they were lost")
        kept = {name: entry for name, entry in self.entries.items() if name not in used}
        return replace(self, entries=kept, scales=scales)

    def _scales(self, name: str, scale: Entry) -> bool:
        """Whether a scale is to be multiplied into a weight."""
        weight = self.entries[name]
        if weight.kind not in FLOATS:  # which is refused where it is used
            return False
        if weight.kind not in NARROW:
            if bool((scale.read() == 1).all()):
                return True
            raise UserError(
                f"{scale.path} has a scale beside {name}, which is of {weight.kind}: not followed"
            )
        rows = weight.shape[:1]
        if scale.kind not in FLOATS[:4] or (scale.size != 1 and scale.shape not in (rows, (*rows, 1))):
            what = f"{scale.kind} {list(scale.shape)} for {list(weight.shape)}"
            raise UserError(f"{scale.path} has a scale of {name} of a layout that is not followed: {what}")
        return True

    @property
    def where(self) -> Path:
        """The folder or file."""
        return self.folder

    def shapes(self) -> Mapping[str, Shape]:
        """Shapes by the names in the files."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def kind(self, name: str) -> str:
        """Kind of numbers of a tensor."""
        return self.entries[name].kind

    @property
    def stored(self) -> int:
        """Bytes of a number, of the widest that are read; 8-bit floats are read as 32-bit ones."""
        kinds = {entry.kind for entry in self.entries.values()} & set(FLOATS)
        wide = {"F64": 8, "F16": 2, "BF16": 2}
        return max((wide.get(kind, 4) for kind in kinds), default=4)

    def matched(self, net: Module) -> Weights:
        """The same for the tensors of ``net``, by their names there.

        Raises:
            UserError: see :func:`fewstep.families.safetensors_match.resolve`.
        """
        return replace(self, names=resolve(net, self))

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own: as it is stored, or 8-bit floats times their scale as float32.

        Raises:
            UserError: it is not there, or its file is cut off.
        """
        entry = self._entry(name)
        return self._plain(name, entry.read(), entry)

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors are the same; neither is in memory as a whole, unless it is scaled."""
        a, b = self.entries[one], self.entries[other]
        if a.shape != b.shape:
            return False
        if a.kind != b.kind or one in self.scales or other in self.scales:
            return bool((self.read(one).float() == self.read(other).float()).all())
        left = a.size * (item_bytes(a.kind) or 1)
        with a.path.open("rb") as first, b.path.open("rb") as second:
            first.seek(a.offset)
            second.seek(b.offset)
            while left > 0:
                size = min(left, 2**20)
                if first.read(size) != second.read(size):
                    return False
                left -= size
        return True

    def window(self, name: str, shape: Sequence[int], cut: tuple[slice, ...]) -> Tensor:
        """``tensor.reshape(shape)[cut]``; of a table of gigabytes only that is read.

        Raises:
            UserError: it is not there, or has another number of elements.
        """
        import torch

        entry = self._entry(name)
        if math.prod(shape) != math.prod(entry.shape):
            what = f"{name} has the shape {entry.shape}, not {tuple(shape)}"
            raise UserError(f"{self.folder} is another net than its configuration says: {what}")
        bits = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[item_bytes(entry.kind) or 1]
        table = np.memmap(entry.path, bits, "r", entry.offset, tuple(shape))
        found = torch.from_numpy(np.array(table[cut])).view(getattr(torch, DTYPES[entry.kind])).clone()
        return self._plain(name, found, entry)

    def _plain(self, name: str, tensor: Tensor, entry: Entry) -> Tensor:
        scale = self.scales.get(self.names.get(name, name))
        if entry.kind in NARROW:
            tensor = tensor.float()
        if scale is None or entry.kind not in NARROW:
            return tensor
        factor = scale.read().float()
        return tensor.mul_(
            factor.reshape(-1, *[1] * (tensor.ndim - 1)) if scale.size > 1 else factor.reshape(())
        )

    def _entry(self, name: str) -> Entry:
        known = self.names.get(name, name)
        if known not in self.entries:
            raise UserError(f"{self.folder} lacks weights, among them {name}")
        return self.entries[known]


VARIANTS = ("fp32", "fp16", "bf16")
"""Names of files of the same weights in a precision."""


def _files(folder: Path) -> list[Path]:
    """The ``.safetensors`` files of a part: the plain ones, or those of one precision where all are such."""
    stems = ("diffusion_pytorch_model", "model")
    for stem in stems:
        if (index := folder / f"{stem}.safetensors.index.json").is_file():
            return _shards(index)
    plain = [f"{stem}.safetensors" for stem in stems]
    for variant in VARIANTS:
        for stem in stems:
            if (index := folder / f"{stem}.safetensors.index.{variant}.json").is_file() and not any(
                (folder / name).is_file() for name in plain
            ):
                return _shards(index)
            plain.append(f"{stem}.{variant}.safetensors")
    for name in plain:
        if (folder / name).is_file():
            return [folder / name]
    hint = "diffusion_pytorch_model.safetensors or model.safetensors"
    raise UserError(f"{folder} has no weights: {hint} is missing (pickled .bin files are not read)")


@dataclass(frozen=True)
class _Index:
    """Of weights in several files: ``{name: file}``."""

    weight_map: dict[str, str]


def _shards(index: Path) -> list[Path]:
    names = sorted(set(json_io.read(index, _Index).weight_map.values()))
    if odd := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise UserError(f"{index} names {odd[0]}, which is no .safetensors file beside it")
    return [index.parent / name for name in names]
