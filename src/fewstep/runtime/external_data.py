"""The files that an ONNX graph draws its weights from, found without the package ``onnx``.

A tensor of an ONNX graph may lie in another file, which its ``external_data`` names under the key
``location``. No engine asks whether anybody vouches for that file, so :class:`fewstep.runtime.bundle.Bundle`
does.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from fewstep.core.types import UserError

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
_OTHERS: dict[str, dict[int, tuple[int, ...]]] = {
    "model": {_VARINT: (1, 5), _BYTES: (2, 3, 4, 6, 8, 14, 26)},
    "training": {_BYTES: (3, 4)},
    "graph": {_BYTES: (2, 10, 11, 12, 13, 14, 16)},
    "function": {_BYTES: (1, 4, 5, 6, 8, 9, 10, 12, 13, 14)},
    "node": {_BYTES: (1, 2, 3, 4, 6, 7, 8, 9, 10)},
    "attribute": {_VARINT: (3, 8, 20), _FIXED32: (2, 7), _BYTES: (1, 4, 7, 8, 9, 13, 14, 15, 21)},
    "sparse": {_VARINT: (3,), _BYTES: (3,)},
    "tensor": {
        _VARINT: (1, 2, 5, 7, 11, 14),
        _FIXED64: (10,),
        _FIXED32: (4,),
        _BYTES: (1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16),
    },
    "entry": {_BYTES: (1, 2)},
}
"""Message -> wire type -> numbers of its other fields; repeated numbers come packed, as bytes, or not."""
_TAGS = {
    kind: frozenset(number << 3 | _BYTES for number in inner)
    | frozenset(number << 3 | wire for wire, numbers in _OTHERS[kind].items() for number in numbers)
    for kind, inner in _MESSAGES.items()
}
"""Message -> all tags that it may have. An engine may read another tag as one of these, or as nothing."""


def external_files(path: Path) -> set[str]:
    """The locations that an ONNX file names, as they stand there; empty where all weights are in the file.

    It takes some 1 ms for graphs of a thousand nodes: weights are skipped. So are messages without the bytes
    of the key, for an engine that opens a file must find them there. Parts of one message count together, as
    protobuf merges them.

    Raises:
        UserError: the file cannot be read, or is no ONNX graph of fields and encodings that are known.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return {name.decode("utf-8", "backslashreplace") for name in _locations(data)}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, IndexError) as error:  # mmap's of an empty file among them
        raise UserError(f"{path} cannot be checked: it is no ONNX graph of known fields ({error})") from None


def _locations(data: mmap.mmap) -> Iterator[bytes]:
    todo = [("model", 0, len(data), 0)]
    while todo:
        kind, start, stop, depth = todo.pop()
        if depth > MOST_DEPTH:
            raise ValueError("nested too deeply")
        if kind == "entry":
            entry = {number: data[first:last] for number, first, last in _fields(data, start, stop, kind)}
            if entry.get(1) == _KEY:
                yield entry.get(2, b"")
            continue
        inner = _MESSAGES[kind]
        for number, first, last in _fields(data, start, stop, kind):
            if number in inner and (last - first > _SMALL or data.find(_KEY, first, last) >= 0):
                todo.append((inner[number], first, last, depth + 1))


def _fields(data: mmap.mmap, at: int, stop: int, message: str) -> Iterator[tuple[int, int, int]]:
    """Number, first byte and end of the fields of a message that are bytes.

    Raises:
        ValueError: a field is cut off, not of this message, or encoded as no writer does.
    """
    tags = _TAGS[message]
    while at < stop:
        tag, at = (data[at], at + 1) if data[at] < 128 else _shortest(data, at)  # the call costs more
        if tag not in tags:
            raise ValueError(f"field {tag >> 3} of wire type {tag & 7} in a {message}")
        kind = tag & 7
        if kind == _BYTES:
            size, at = (data[at], at + 1) if data[at] < 128 else _shortest(data, at)
            if at + size > stop:
                raise ValueError("cut short")
            yield tag >> 3, at, at + size
            at += size
        elif kind == _VARINT:
            _, at = _varint(data, at)
        else:
            at += 8 if kind == _FIXED64 else 4
        if at > stop:
            raise ValueError("cut short")


def _shortest(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A tag or a length, and where it ends.

    Raises:
        ValueError: it has bytes or bits that an engine may drop, and so read another number.
    """
    value, end = _varint(data, at)
    if value >= 2**32 or (end - at > 1 and not data[end - 1]):
        raise ValueError("a tag or a length with more bytes than it needs")
    return value, end


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A whole number of 7 bits a byte, and where it ends."""
    value = 0
    for more in range(10):
        byte = data[at + more]
        value |= (byte & 127) << 7 * more
        if byte < 128:
            return value, at + more + 1
    raise ValueError("a number of more than 10 bytes")
