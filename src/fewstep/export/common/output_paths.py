"""Checks of the place where an export is written, and errors of writing it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from fewstep.core.atomic import replacing_file
from fewstep.core.types import UserError


@contextmanager
def fresh_file(out: Path, suffix: str, ours: Callable[[Path], bool]) -> Generator[Path]:
    """Yield a temporary file that replaces ``out`` if the block succeeds.

    Args:
        out: the file to write. An earlier export there is replaced.
        suffix: the required suffix of its name.
        ours: whether a file is an earlier export.

    Raises:
        UserError: the name has another suffix, or something else exists there.
    """
    check_file(out, suffix, ours)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(out) as fresh:
        yield fresh


def check_file(out: Path, suffix: str, ours: Callable[[Path], bool]) -> None:
    """Check that :func:`fresh_file` may write ``out``; the arguments and errors are the same."""
    if out.suffix != suffix:
        raise UserError(f"this target writes a {suffix} file: {out} must end so")
    if out.exists() and not (out.is_file() and ours(out)):
        raise UserError(f"{out} exists and is no export of fewstep: choose another place")


@contextmanager
def write_errors(out: Path) -> Generator[None]:
    """Turn the errors of a block that writes ``out`` into one line that names ``out``.

    Raises:
        UserError: the block raised an ``OSError`` or safetensors' own error.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {out}: {_reason(error)}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # safetensors need not be installed
            raise
        raise UserError(f"cannot write {out}: {str(error).splitlines()[0]}") from error


def _reason(error: OSError) -> str:
    """Return the system's message. A folder that cannot be copied gives the message of its first file."""
    if isinstance(error, shutil.Error):
        return str(error.args[0][0][2])
    return error.strerror or str(error)


def check_folder(out: Path) -> None:
    """Check that a folder can be created and written, before hours of work depend on it.

    Raises:
        UserError: a file is in its place, or the system refuses to write there.
    """
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{existing} is a file: give a folder")
    try:
        with TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {existing} ({error.strerror}): give another folder") from error
