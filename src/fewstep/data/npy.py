"""Numpy's files, read only where they hold what is expected: a header is believed no size."""

from __future__ import annotations

import io
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np

LONGEST_HEAD = 256
"""Bytes before the numbers of a ``.npy`` file: 128 at any rank that occurs here."""


def from_npy(data: bytes, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The float16 array of ``shape`` in a ``.npy`` file.

    Raises:
        ValueError: it holds something else.
    """
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("its version is not 1.0")
        found, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # a header is read by Python's own parser, which has errors of its own
        raise ValueError(f"no .npy file ({error})") from None
    if found != shape or dtype != np.dtype("<f2") or fortran:
        raise ValueError(f"{dtype} {found}, not float16 {shape}")
    numbers = data[file.tell() :]
    if len(numbers) != 2 * prod(shape):
        raise ValueError("cut short")
    return np.frombuffer(numbers, "<f2").reshape(shape)


def from_npz(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray[Any, Any]]:
    """The float16 arrays of these shapes in an ``.npz`` file.

    Raises:
        ValueError: it holds something else.
        OSError: it cannot be read.
    """
    try:
        with ZipFile(path) as archive:
            found: dict[str, np.ndarray[Any, Any]] = {}
            for name, shape in shapes.items():
                if archive.getinfo(f"{name}.npy").file_size > 2 * prod(shape) + LONGEST_HEAD:
                    raise ValueError(f"{name} is not of shape {shape}")
                found[name] = from_npy(archive.read(f"{name}.npy"), shape)
            return found
    except OSError:
        raise
    except Exception as error:  # a damaged archive can raise that of any codec
        kind = "no .npz file" if isinstance(error, BadZipFile) else type(error).__name__
        raise ValueError(f"{kind}: {error}") from None
