"""Tensors in ``.safetensors`` files: where each lies, and how its numbers are stored."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.core import json_io
from fewstep.core.types import UserError
from fewstep.families.safetensors_header import read_header

if TYPE_CHECKING:
    from torch import Tensor

DTYPES: Mapping[str, str] = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
}
"""Kinds of numbers in a safetensors file, and what torch calls them."""

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
NARROW = ("F8_E4M3", "F8_E5M2")
"""Kinds that are read as float32: torch has no arithmetic for them."""

FORMATS = ("float8_e4m3fn", "float8_e5m2")
"""Quantization formats (of ComfyUI) that are 8-bit floats with a scale."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, its first byte there, its kind (:data:`DTYPES`) and its shape."""

    path: Path
    offset: int
    kind: str
    shape: Shape

    @property
    def size(self) -> int:
        """Numbers."""
        return math.prod(self.shape)

    def read(self) -> Tensor:
        """The tensor in memory of its own, as it is stored.

        Raises:
            UserError: the file is cut off, or holds numbers of an unknown kind.
        """
        import torch

        if self.kind not in DTYPES:
            raise UserError(f"{self.path} holds numbers of a kind that is not known: {self.kind}")
        # Memory of torch is aligned: products may round by that.
        tensor = torch.empty(self.shape, dtype=getattr(torch, DTYPES[self.kind]))
        room = tensor.reshape(-1).view(torch.uint8).numpy()
        with self.path.open("rb") as file:
            file.seek(self.offset)
            if file.readinto(room) != room.size:  # pyright: ignore[reportArgumentType]
                raise UserError(f"{self.path} is cut off")
        return tensor


def header(path: Path) -> dict[str, Entry]:
    """The tensors of one ``.safetensors`` file.

    Raises:
        UserError: it is none, it is cut off, or it is quantized in a way that is not followed.
    """
    head = read_header(path)
    if (said := head.metadata.get("_quantization_metadata")) is not None:
        _check_formats(said, path)
    return {
        name: Entry(path, head.start + tensor.data_offsets[0], tensor.dtype, tensor.shape)
        for name, tensor in head.tensors.items()
    }


def item_bytes(kind: str) -> int | None:
    digits = re.search(r"\d+", DTYPES.get(kind, "").replace("bool", "uint8"))
    return int(digits[0]) // 8 if digits else None


def _check_formats(text: str, where: Path) -> None:
    """Refuse layers that ComfyUI's description says to be of other formats than 8-bit floats."""
    said: dict[str, Any] = json_io.parse(text, dict[str, Any], f"{where}: _quantization_metadata")
    layers = said.get("layers", said)
    for layer in layers.values() if isinstance(layers, dict) else ():  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        check_format(layer, where)


def check_format(layer: object, where: Path) -> None:
    if isinstance(layer, dict):
        said: dict[str, object] = layer  # pyright: ignore[reportUnknownVariableType]
        if odd := sorted(key for key, value in said.items() if value and key not in QUANT_FIELDS):
            raise UserError(f"{where} is quantized with {odd[0]}, which is not followed: {IN_FLOATS}")
    found = layer.get("format") if isinstance(layer, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if found is not None and found not in FORMATS:
        raise UserError(f"{where} is quantized to {found}, which is not followed: {IN_FLOATS}")


QUANT_FIELDS = ("format", "full_precision_matrix_mult")
"""Of ComfyUI's description of a layer: all matrices are multiplied in full precision here."""
IN_FLOATS = "give the model in 16 or 32 bits, or in 8-bit floats"
