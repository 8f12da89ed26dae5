"""Read NumPy files of known shapes; the sizes in their headers are not trusted."""

from __future__ import annotations

import io
from collections.abc import Mapping
from math import prod
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray

MAX_HEADER = 256
"""Bytes before the numbers of a ``.npy`` file: 128 at any rank that occurs here."""


def from_npy(data: bytes, shape: tuple[int, ...]) -> NDArray[np.float16]:
    """Return the float16 array of ``shape`` in a ``.npy`` file.

    Raises:
        ValueError: it holds something else.
    """
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("its version is not 1.0")
        stored, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except (
        Exception
    ) as error:  # NumPy reads the header with Python's parser, which raises many kinds of errors
        raise ValueError(f"no .npy file ({error})") from None
    if stored != shape or dtype != np.dtype("<f2") or fortran:
        raise ValueError(f"{dtype} {stored}, not float16 {shape}")
    values = data[file.tell() :]
    if len(values) != 2 * prod(shape):
        raise ValueError("cut short")
    return np.frombuffer(values, "<f2").reshape(shape)


def from_npz(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[np.float16]]:
    """Return the float16 arrays of these shapes in an ``.npz`` file.

    Raises:
        ValueError: it holds something else.
        OSError: it cannot be read.
    """
    try:
        with ZipFile(path) as archive:
            arrays: dict[str, NDArray[np.float16]] = {}
            for name, shape in shapes.items():
                if archive.getinfo(f"{name}.npy").file_size > 2 * prod(shape) + MAX_HEADER:
                    raise ValueError(f"{name} is not of shape {shape}")
                arrays[name] = from_npy(archive.read(f"{name}.npy"), shape)
            return arrays
    except OSError:
        raise
    except Exception as error:  # a damaged archive can raise the error of any codec
        kind = "no .npz file" if isinstance(error, BadZipFile) else type(error).__name__
        raise ValueError(f"{kind}: {error}") from None
