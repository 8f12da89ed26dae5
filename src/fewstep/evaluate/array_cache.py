"""A cache of arrays on disk, so that an interrupted evaluation continues where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np

from fewstep.core.atomic import sweep, write
from fewstep.core.types import UserError

Arrays = dict[str, np.ndarray]


class Cache:
    """A folder of ``.npz`` files named after a digest of their origin."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for below in (folder, *folder.glob("*/")):
            sweep(below)

    def get(self, group: str, origin: object, make: Callable[[], Arrays]) -> Arrays:
        """Return the arrays of ``origin``, a JSON value; ``make`` computes them if they are not cached.

        Raises:
            UserError: a cached file cannot be read, or a new one cannot be written.
        """
        name = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:16]
        path = self._folder / group / f"{name}.npz"
        if path.exists():
            return _read(path)
        arrays = make()
        buffer = BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        write(path, buffer.getvalue())
        return arrays


def _read(path: Path) -> Arrays:
    try:
        with np.load(BytesIO(path.read_bytes())) as file:
            return {key: file[key] for key in file.files}
    except Exception as error:  # numpy evaluates the header, which may raise anything
        raise UserError(f"{path} is damaged; delete it and run again") from error
