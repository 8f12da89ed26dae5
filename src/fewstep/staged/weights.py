"""Weights of a diffusers folder's part, read tensor by tensor (floor 3, torch).

A reader that maps whole files counts them as this process's memory, and one that loads whole parts needs them
twice where they are cast. Here a tensor is in memory once, and no other beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from msgspec import Meta
from torch import Tensor

from fewstep import formats
from fewstep.families.header import read_header
from fewstep.types import UserError

KINDS: dict[str, tuple[Any, torch.dtype]] = {
    "F32": (np.float32, torch.float32),
    "F16": (np.float16, torch.float16),
    "BF16": (np.int16, torch.bfloat16),  # numpy has none: its bits
}


@dataclass(frozen=True)
class _Index:
    """The shape of an index of several files: tensor -> file."""

    weight_map: Annotated[dict[str, str], Meta(min_length=1)]


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, its first byte there, its kind (:data:`KINDS`) and its shape."""

    path: Path
    offset: int
    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """The tensors of one part.

    Attributes:
        folder: the part's folder.
        entries: its tensors by name.
    """

    folder: Path
    entries: Mapping[str, Entry]

    @staticmethod
    def open(folder: Path) -> Weights:
        """Read the headers of a part's ``.safetensors`` files.

        Raises:
            UserError: there are none, or one is broken or of another precision than floats of 16 or 32 bits.
        """
        entries: dict[str, Entry] = {}
        for path in _files(folder):
            entries |= header(path)
        return Weights(folder, entries)

    @property
    def stored(self) -> int:
        """Bytes of a number, of the widest that are stored."""
        return max((KINDS[entry.kind][1].itemsize for entry in self.entries.values()), default=4)

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own, as it is stored.

        Raises:
            UserError: it is not there, or its file is cut off.
        """
        entry = self._entry(name)
        tensor = torch.empty(entry.shape, dtype=KINDS[entry.kind][1])  # aligned: products may round by that
        room = tensor.reshape(-1).view(torch.uint8).numpy()
        with entry.path.open("rb") as file:
            file.seek(entry.offset)
            if file.readinto(room) != room.size:  # pyright: ignore[reportArgumentType]
                raise UserError(f"{entry.path} is cut off: {name} is not whole")
        return tensor

    def window(self, name: str, shape: Sequence[int], cut: tuple[slice, ...]) -> Tensor:
        """``tensor.reshape(shape)[cut]``; of a table of gigabytes only that is read.

        Raises:
            UserError: it is not there, or has another number of elements.
        """
        entry = self._entry(name)
        if prod(shape) != prod(entry.shape):
            what = f"{name} has the shape {entry.shape}, not {tuple(shape)}"
            raise UserError(f"{self.folder} is another net than its configuration says: {what}")
        kind, dtype = KINDS[entry.kind]
        table = np.memmap(entry.path, kind, "r", entry.offset, tuple(shape))
        return torch.from_numpy(np.array(table[cut])).view(dtype).clone()

    def _entry(self, name: str) -> Entry:
        for known in (name, f"text_model.{name}", name.removeprefix("text_model.")):
            if known in self.entries:  # versions of transformers differ in whether a CLIP says so
                return self.entries[known]
        raise UserError(f"{self.folder} lacks weights, among them {name}")


def header(path: Path) -> dict[str, Entry]:
    """The tensors of one ``.safetensors`` file.

    Raises:
        UserError: it is none, or holds other numbers than floats of 16 or 32 bits.
    """
    head = read_header(path)
    return {
        name: Entry(path, head.start + fact.data_offsets[0], _known(path, fact.dtype), fact.shape)
        for name, fact in head.tensors.items()
    }


def _known(path: Path, kind: str) -> str:
    if kind not in KINDS:
        raise UserError(f"{path} is not a .safetensors file that can be read: numbers of kind {kind}")
    return kind


def _files(folder: Path) -> list[Path]:
    for index in sorted(folder.glob("*.safetensors.index.json")):
        if index.name.count(".") == 3:  # no variant: "model.fp16.safetensors.index.json"
            names = sorted(set(formats.read(index, _Index).weight_map.values()))
            for name in names:
                if Path(name).name != name:
                    raise UserError(f"{index} names a file outside its folder: {name[:80]!r}")
            return [folder / name for name in names]
    for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(f"{folder} has no weights: diffusion_pytorch_model.safetensors or model.safetensors")
