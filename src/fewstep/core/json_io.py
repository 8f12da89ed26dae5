"""Reads JSON from untrusted files, and checks it against a type."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from fewstep.core.types import UserError

T = TypeVar("T")

MOST_BYTES = 2**26
"""Of a JSON file: tokenizers, the largest that are read here, have some 2**25."""


def read(path: Path, kind: type[T] | Any = dict[str, Any], most: int = MOST_BYTES, python: bool = False) -> T:
    """Read a JSON file into ``kind``.

    Args:
        path: the file.
        kind: a dataclass, or any other type that msgspec knows. Fields that a dataclass lacks are passed
            over.
        most: bytes that the file may have.
        python: see :func:`parse`.

    Raises:
        UserError: the file is missing, no regular file, too large, not JSON, nested too deeply, or of another
            shape. The line names the file and the field.
    """
    return parse(read_bytes(path, most), kind, str(path), python)


def read_lines(path: Path, kind: type[T] | Any = dict[str, Any]) -> list[T]:
    """Read a file of one JSON value a line, as Python's ``json`` writes them, into ``kind``.

    Raises:
        UserError: see :func:`read`. The line names file, number of the line, and field.
    """
    lines = read_bytes(path).splitlines()
    return [parse(line, kind, f"{path}, line {number},", True) for number, line in enumerate(lines, 1)]


def parse(
    data: bytes | str, kind: type[T] | Any = dict[str, Any], where: str = "", python: bool = False
) -> T:
    """JSON text as ``kind``.

    Args:
        data: UTF-8.
        kind: see :func:`read`.
        where: what it is called in errors.
        python: take what Python's ``json`` writes and JSON does not have: NaN, Infinity, and the halves of
            surrogate pairs that stand for the bytes of a path which are no UTF-8.

    Raises:
        UserError: see :func:`read`.
    """
    if python:
        return convert(_loads(data, where), kind, where)
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{where} is damaged or no such file: {_field(error)}") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise UserError(f"{where} is damaged (not JSON: {_lower(str(error))})") from None
    except RecursionError:
        raise UserError(f"{where} is damaged (nested too deeply)") from None


def _loads(data: bytes | str, where: str) -> object:
    import json  # what draws an image reads nothing that needs it

    try:
        return json.loads(data)
    except ValueError as error:
        raise UserError(f"{where} is damaged (not JSON: {_lower(str(error))})") from None
    except RecursionError:
        raise UserError(f"{where} is damaged (nested too deeply)") from None


def convert(value: object, kind: type[T] | Any, where: str) -> T:
    """Convert parsed JSON to ``kind``, and check it as :func:`parse` does.

    Raises:
        UserError: it has another shape.
    """
    try:
        return msgspec.convert(value, type=kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{where} is damaged or no such file: {_field(error)}") from None
    except UnicodeError:
        raise UserError(f"{where} is damaged (text that is no UTF-8)") from None
    except RecursionError:
        raise UserError(f"{where} is damaged (nested too deeply)") from None


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """A file of at most ``most`` bytes.

    Raises:
        UserError: it is missing, no regular file, or larger.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise UserError(f"{path} is no file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(min(size, most) + 1)  # as much memory is taken as is asked for
            if size < len(data) <= most:  # it has grown, or the system does not tell the size
                data += file.read(most + 1 - len(data))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # a zero byte in the name
        raise UserError(f"cannot read {str(path)!r}: {error}") from error
    if len(data) > most:
        raise UserError(f"{path} is larger than the {most} bytes that such a file may have")
    return data


def read_array(path: Path) -> np.ndarray:
    """The array of a ``.npy`` file, read from the disk as it is used. Objects are refused: they are pickles.

    Raises:
        UserError: it is missing, or no array of numbers.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a header is read by Python's own parser, which has errors of its own
        raise UserError(f"{path} is damaged ({_lower(str(error))}); delete it and run again") from error


def _field(error: msgspec.ValidationError) -> str:
    """``Expected `int`, got `str` - at `$.a.b``` -> ``a.b: expected int, got str``."""
    text, _, place = str(error).partition(" - at `")
    place = re.sub(r"^\$\.?", "", place.rstrip("`"))
    return f"{place}: {_lower(text)}" if place else _lower(text)


def _lower(text: str) -> str:
    text = " ".join(text.replace("`", "").split())
    return text[:1].lower() + text[1:]
