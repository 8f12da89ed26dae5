"""Files and folders that are whole or not there (floor 1): what is unfinished goes by another name."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from fewstep.types import UserError


@contextmanager
def replacing_file(target: Path) -> Generator[Path]:
    """A name beside ``target`` that takes its place if the block ends well; else nothing changes.

    The name ends as ``target`` does, for writers that look at it. It is nobody else's: processes of several
    machines may write the same file of a shared folder.
    """
    fresh = target.with_name(f".{target.stem[:30]}.{os.getpid()}-{os.urandom(4).hex()}.part{target.suffix}")
    try:
        yield fresh
        os.replace(fresh, target)
    finally:
        if fresh.exists():  # unlike unlink, quiet where the folder turned out to be a file
            fresh.unlink()


@contextmanager
def replacing_folder(target: Path) -> Generator[Path]:
    """An empty folder beside ``target`` that takes its place if the block ends well; else nothing changes."""
    import shutil  # 4 ms of which drawing a picture has no use

    fresh, old = (target.with_name(f".{target.name}.{os.getpid()}.{kind}") for kind in ("part", "old"))
    try:
        shutil.rmtree(fresh, ignore_errors=True)  # of a process that was killed
        fresh.mkdir(parents=True)
        yield fresh
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(fresh, ignore_errors=True)


def write(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole, and make its folder.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as fresh:
            fresh.write_bytes(data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
