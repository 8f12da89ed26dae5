"""Reads and checks the header of a ``.safetensors`` file."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from fewstep.core import json_io
from fewstep.core.types import UserError

MOST_BYTES = 2**24
"""Of a header; that of a model of a thousand tensors has some 2**17."""
BITS: Mapping[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Kind of number -> bits."""

Offset = Annotated[int, Meta(ge=0, le=2**62)]


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file.

    Attributes:
        dtype: kind of its numbers, of :data:`BITS`.
        shape: its shape.
        data_offsets: first byte and end, from the end of the header.
    """

    dtype: str
    shape: tuple[Offset, ...]
    data_offsets: tuple[Offset, Offset]


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        tensors: by name.
        metadata: free text by name.
        start: byte of the file where the numbers begin.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    start: int


def read_header(path: Path) -> Header:
    """The header of a ``.safetensors`` file, its tensors within the file and apart from each other.

    Raises:
        UserError: it is no such file, cut off, or says what cannot be.
    """
    where = f"the header of {path}"
    try:
        with path.open("rb") as file:
            head = file.read(8)
            size = path.stat().st_size
            (length,) = struct.unpack("<Q", head) if len(head) == 8 else (size,)
            if length > size - 8:
                raise UserError(f"{path} is not a whole .safetensors file: its header is cut off")
            if length > MOST_BYTES:
                raise UserError(f"{path} has a header of {length} bytes: at most {MOST_BYTES} are read")
            content: dict[str, object] = json_io.parse(file.read(length), where=where)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    metadata = json_io.convert(content.pop("__metadata__", {}), dict[str, str], where)
    tensors: dict[str, Tensor] = json_io.convert(content, dict[str, Tensor], where)
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        begin, stop = tensor.data_offsets
        bits = prod(tensor.shape) * BITS.get(tensor.dtype, 0)
        if tensor.dtype not in BITS:
            raise UserError(f"{path}: {name[:80]} has numbers of the unknown kind {tensor.dtype[:20]}")
        if begin < end or -(-bits // 8) != stop - begin:
            raise UserError(f"{path} is not a whole .safetensors file: {name[:80]} lies where it cannot")
        if stop > size - 8 - length:
            raise UserError(f"{path} is not a whole .safetensors file: {name[:80]} is cut off")
        end = stop
    return Header(tensors, metadata, 8 + length)
