"""The files that an ONNX graph draws its weights from, found without the package ``onnx``.

A tensor of an ONNX graph may lie in another file, which its ``external_data`` names under the key
``location``. No engine asks whether anybody vouches for that file, so :class:`fewstep.runtime.bundle.Bundle`
does.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewstep.types import UserError

MOST_DEPTH = 64
"""Of messages in messages; graphs of ours come to 8."""
_KEY = b"location"
_SMALL = 2**12
"""Bytes of a message that is searched for the key before it is read field by field."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}
"""Message -> number of a field -> the message in it, as onnx.proto has them, where a tensor can be inside."""


def external_files(path: Path) -> set[str]:
    """The locations that an ONNX file names, as they stand there; empty where all weights are in the file.

    It takes some 1 ms for graphs of a thousand nodes: weights are skipped.

    Raises:
        UserError: the file cannot be read, or is no ONNX graph.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return {name.decode("utf-8", "backslashreplace") for name in _locations(data)}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, IndexError) as error:  # mmap's of an empty file among them
        raise UserError(f"{path} cannot be loaded: it is no ONNX graph ({error})") from None


def _locations(data: mmap.mmap) -> Iterator[bytes]:
    todo = [("model", 0, len(data), 0)]
    while todo:
        kind, start, stop, depth = todo.pop()
        if depth > MOST_DEPTH:
            raise ValueError("nested too deeply")
        if kind == "entry":
            entry = {number: data[first:last] for number, first, last in _fields(data, start, stop)}
            if entry.get(1) == _KEY:
                yield entry.get(2, b"")
            continue
        inner = _MESSAGES[kind]
        for number, first, last in _fields(data, start, stop):
            if number in inner and (last - first > _SMALL or data.find(_KEY, first, last) >= 0):
                todo.append((inner[number], first, last, depth + 1))


def _fields(data: mmap.mmap, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Number, first byte and end of the fields of a message that are bytes.

    Raises:
        ValueError: a field is cut off, or of a kind that ONNX does not have.
    """
    while at < stop:
        tag, at = (data[at], at + 1) if data[at] < 128 else _varint(data, at)  # the call costs more
        kind = tag & 7
        if kind == _BYTES:
            size, at = (data[at], at + 1) if data[at] < 128 else _varint(data, at)
            if at + size > stop:
                raise ValueError("cut short")
            yield tag >> 3, at, at + size
            at += size
        elif kind == _VARINT:
            _, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if at > stop:
            raise ValueError("cut short")


def _varint(data: Any, at: int) -> tuple[int, int]:
    """A whole number of 7 bits a byte, and where it ends."""
    value = 0
    for more in range(10):
        byte = data[at + more]
        value |= (byte & 127) << 7 * more
        if byte < 128:
            return value, at + more + 1
    raise ValueError("a number of more than 10 bytes")
