"""Files that are either whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

from fewstep.types import UserError


def write(path: Path, data: bytes) -> None:
    """Write ``data`` beside ``path``, then rename: a reader or an interrupted run never meets half a file.

    Raises:
        UserError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        if partial.exists():  # unlike unlink, quiet where the folder turned out to be a file
            partial.unlink()
