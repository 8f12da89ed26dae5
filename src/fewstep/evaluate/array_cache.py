"""Arrays on disk by what they were made from, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.core.atomic import sweep, write
from fewstep.core.types import UserError

Arrays = dict[str, NDArray[Any]]


class Cache:
    """A folder of ``.npz`` files named after a digest of their origin."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for below in (folder, *folder.glob("*/")):
            sweep(below)

    def get(self, group: str, origin: Any, make: Callable[[], Arrays]) -> Arrays:
        """The arrays made from ``origin`` (anything JSON can say); ``make`` makes them if they are not there.

        Raises:
            UserError: a kept file cannot be read, or a new one cannot be written.
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
    except Exception as error:  # a header is read by Python's own parser, which has errors of its own
        raise UserError(f"{path} is damaged; delete it and run again") from error
