"""Where exports go."""

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
    """A name beside ``out`` that takes its place if the block ends well; an earlier export there is replaced.

    Args:
        out: where the file goes.
        suffix: what its name must end in.
        ours: whether a file is an earlier export.

    Raises:
        UserError: another name, or something else lies there.
    """
    check_file(out, suffix, ours)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(out) as fresh:
        yield fresh


def check_file(out: Path, suffix: str, ours: Callable[[Path], bool]) -> None:
    """Refuse a place where that file must not go, as :func:`fresh_file` does."""
    if out.suffix != suffix:
        raise UserError(f"this target writes a {suffix} file: {out} must end so")
    if out.exists() and not (out.is_file() and ours(out)):
        raise UserError(f"{out} exists and is no export of fewstep: choose another place")


@contextmanager
def write_errors(out: Path) -> Generator[None]:
    """Say of an export that cannot be written where it was to go.

    Raises:
        UserError: the block met an ``OSError``, or the library of weights did.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {out}: {_reason(error)}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # whose library is not always there
            raise
        raise UserError(f"cannot write {out}: {str(error).splitlines()[0]}") from error


def _reason(error: OSError) -> str:
    """What the system said; of a folder that could not be copied, of its first file."""
    if isinstance(error, shutil.Error):
        return str(error.args[0][0][2])
    return error.strerror or str(error)


def check_folder(out: Path) -> None:
    """Refuse a folder that cannot be made or written to, before hours are spent on what it is for."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{there} is a file: give a folder")
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {there} ({error.strerror}): give another folder") from error
