"""Writes files and folders atomically, and locks folders for one process.

Unfinished files are in a part: a hidden folder ``.NAME.RANDOM.part`` beside the target, which its process
keeps locked. The lock ends with the process, so the next writer of the same target recognizes a leftover part
and removes it. A replacement keeps the permissions of the old file. Other users cannot read a part.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import sys
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from fewstep.core.types import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of a full or read-only disk."""
LOCK = ".lock"
"""The lock of a folder, and of a part."""
_PART = re.compile(r"\.(.+\.)?[0-9a-f-]{8,}\.part(\.tar)?")
"""Name of a part of any target. Other programs name unfinished files ``.part``, too."""
_DEPTH = 3
"""Levels of folders below a locked one that are searched: it may be a home folder."""
_OLD = ".old"
"""In a part: the folder that held the target before, where the two cannot be exchanged at once."""
_NAME_BYTES = 200
"""Of a target's name in the name of its part, which must not exceed 255 bytes itself."""


def write(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole, and make its folder. A link stays, and its target is written.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path = _pointed_at(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a device or a pipe, which nothing can replace
            _write_through(path, data)
        elif not _write_unnamed(path, data):
            with replacing_file(path) as fresh:
                fresh.write_bytes(data)
    except OSError as error:
        raise _unwritten(path, error) from error
    except ValueError as error:  # a zero byte in the name
        raise UserError(f"cannot write {str(path)!r}: {error}") from None


def write_new(paths: Iterable[Path], data: bytes | memoryview) -> Path:
    """Write a file under the first name that nothing has yet, whichever processes try the same names.

    Args:
        paths: names in the order in which they are tried; their folders exist.
        data: what to write.

    Returns:
        The name that was free.

    Raises:
        UserError: it cannot be written.
    """
    path = Path()
    try:
        for path in paths:
            if _write_if_free(path, data):
                return path
    except OSError as error:
        raise _unwritten(path, error) from error
    raise UserError(f"cannot write {path}: all names are taken")


@contextmanager
def replacing_file(target: Path) -> Generator[Path]:
    """A name that takes the place of ``target`` if the block ends well; else nothing changes but its folder.

    The name is that of ``target``, in a folder of its own. A link stays, and what it points at is replaced.
    """
    target = _pointed_at(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _part(target) as part:
        fresh = part / target.name
        yield fresh
        if (mode := _mode(target)) is not None:
            fresh.chmod(mode)
        os.replace(fresh, target)


@contextmanager
def replacing_folder(target: Path) -> Generator[Path]:
    """An empty folder that takes the place of ``target`` if the block ends well; else nothing changes.

    Where the system can exchange two names at once, there is no moment without the one or the other.
    Elsewhere a process killed between the two renames leaves the earlier folder in its part, and the next
    call for the same target puts it back. A link stays, and what it points at is replaced.
    """
    target = _pointed_at(target)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    with _part(target) as part:
        fresh = part / target.name
        fresh.mkdir()
        yield fresh
        if (mode := _mode(target)) is not None:
            fresh.chmod(mode | 0o700)  # a folder that its owner cannot change cannot be moved either
        if target.exists() and _exchange(fresh, target):
            return
        old = part / _OLD / target.name
        if target.exists():
            old.parent.mkdir()
            target.rename(old)
        try:
            fresh.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise


def remove(folder: Path) -> None:
    """Remove a folder: it is whole, or gone with what is in it. Nothing happens where there is none."""
    if folder.exists():
        with _part(folder) as part:
            folder.rename(part / folder.name)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove from a folder what killed processes left unfinished there; what living ones write stays.

    Args:
        folder: where to look; it need not exist.
        name: of a file or folder in it whose leftovers are meant; ``None`` means all.
    """
    if name is None:
        parts = [path for path in folder.glob(".*") if _PART.fullmatch(path.name)]
    else:
        parts = list(folder.glob(f".{glob.escape(_short(name))}.*.part"))
    for part in parts:
        with suppress(OSError):
            if not part.is_dir():
                part.unlink()
            elif (lock := _lock(part)) is not None:
                with lock:
                    for old in part.glob(f"{_OLD}/*"):
                        if not (folder / old.name).exists():
                            old.rename(folder / old.name)
                    _remove(part)


@contextmanager
def held(folder: Path, doing: str, lock: str = LOCK) -> Generator[None]:
    """Lock a folder for this process, and remove unfinished files that killed processes left in it.

    The lock ends with the process, however that ends.

    Args:
        folder: created if it does not exist, and removed at the end if it is empty. Leftovers are
            searched in the folders below it, too.
        doing: what happens to the folder, for the error of another process, such as ``trained``.
        lock: name of the lock in the folder, for processes that share the folder.

    Raises:
        UserError: another process holds it, or the folder cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = _lock(folder, lock)
    except OSError as error:
        raise UserError(f"cannot use the folder {folder}: {error.strerror}") from error
    if taken is None:
        raise UserError(f"{folder} is being {doing} by another process: let it end, or stop it first")
    with taken:
        try:
            _sweep_all(folder)
            yield
        except BaseException:
            _sweep_all(folder)  # of workers that were killed
            raise
        finally:
            # While it is still locked: whoever opened the file before knows it for one without a name.
            with suppress(OSError):
                (folder / lock).unlink()
            with suppress(OSError):  # not empty
                for path in missing:
                    path.rmdir()


def _sweep_all(folder: Path) -> None:
    for below, folders, _ in os.walk(folder):
        sweep(Path(below))
        if len(Path(below).relative_to(folder).parts) >= _DEPTH:
            folders.clear()


def _lock(folder: Path, name: str = LOCK) -> AbstractContextManager[object] | None:
    """The lock of a folder, taken; ``None`` where another process has it. Its context gives it back."""
    from filelock import FileLock, Timeout  # 30 ms of which drawing an image has no use

    lock = FileLock(folder / name)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        return None


@contextmanager
def _part(target: Path) -> Generator[Path]:
    """A locked folder beside ``target`` for what is unfinished; it goes with the block."""
    sweep(target.parent, target.name)
    while True:
        part = _new_part(target)
        part.mkdir(0o700)
        # Another process may take it for a leftover before it is locked, at any place of what follows.
        with suppress(FileNotFoundError, FileExistsError):
            if (lock := _lock(part)) is not None:
                break
    with lock:
        try:
            yield part
        except OSError as error:
            # What writes into an open file says no name, and that of a part says nothing to anybody.
            if error.errno in FULL and (error.filename is None or str(part) in str(error.filename)):
                error.filename = str(target)
            raise
        finally:
            _remove(part)


def _new_part(target: Path) -> Path:
    return target.with_name(f".{_short(target.name)}.{os.urandom(4).hex()}.part")


def shortened(name: str, most: int) -> str:
    """A name cut to so many bytes at the end of a character. One that is short enough stays as it is."""
    data = os.fsencode(name)
    return name if len(data) <= most else data[:most].decode(errors="ignore")


def _short(name: str) -> str:
    return name.encode(errors="surrogateescape")[:_NAME_BYTES].decode(errors="ignore")


def _remove(folder: Path) -> None:
    import shutil  # 4 ms of which drawing an image has no use

    shutil.rmtree(folder, ignore_errors=True)


def _pointed_at(path: Path) -> Path:
    """Return the path itself, or the final target of a link."""
    if path.is_symlink():
        path = Path(os.path.realpath(path))
        if path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return path if path.name else path.absolute()


def _mode(path: Path) -> int | None:
    """The permissions of what is to be replaced; ``None`` where nothing is there."""
    try:
        return path.stat().st_mode & 0o777
    except FileNotFoundError:
        return None


def is_stream(path: Path) -> bool:
    """Whether something is there that is written through, such as a pipe or a device."""
    return path.exists() and not path.is_file() and not path.is_dir()


def reason(path: Path, error: OSError) -> str:
    """Why a path cannot be written: what the system says, or that links lead in a circle."""
    if error.errno == errno.ELOOP or os.path.islink(os.path.realpath(path)):
        return "it is a loop of links"
    return str(error.strerror)


def _unwritten(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {reason(path, error)}")


def _write_through(path: Path, data: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)


def _write_if_free(path: Path, data: bytes | memoryview) -> bool:
    """Write a whole file under a name, unless something has it; whether it was free."""
    if os.path.lexists(path):
        return False
    with suppress(OSError):  # some systems only claim support; the other way raises a clear error
        if (unnamed := _unnamed(path.parent)) is not None:
            with _holding(unnamed, data):
                return _name(unnamed, path)
    with _part(path) as part:
        fresh = part / path.name
        fresh.write_bytes(data)
        try:
            os.link(fresh, path)
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
    return _write_exclusively(path, data)  # a file system without links


def _write_exclusively(path: Path, data: bytes | memoryview) -> bool:
    try:
        with path.open("xb") as file:
            try:
                file.write(data)
            except BaseException:
                path.unlink()
                raise
    except FileExistsError:
        return False
    return True


def _unnamed(folder: Path) -> int | None:
    """A file without a name, which vanishes with its process; ``None`` where the system has none."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    return os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666)


def _name(unnamed: int, path: Path) -> bool:
    """Give a file without a name a name, unless something has it; whether it was free."""
    try:
        # Only with a folder given does Python ask for the link in /proc to be followed.
        os.link(f"/proc/self/fd/{unnamed}", path, src_dir_fd=unnamed, follow_symlinks=True)
    except FileExistsError:
        return False
    return True


@contextmanager
def _holding(unnamed: int, data: bytes | memoryview) -> Generator[None]:
    """Within the block a file without a name holds ``data``; it is closed afterwards."""
    with os.fdopen(unnamed, "wb") as file:
        file.write(data)
        file.flush()
        yield


def _write_unnamed(path: Path, data: bytes | memoryview) -> bool:
    """Write a file that has no name until it is whole; whether the system can."""
    with suppress(OSError):  # as above
        while (unnamed := _unnamed(path.parent)) is not None:
            with _holding(unnamed, data):
                if _name(unnamed, path):
                    return True
                # Nothing links over a name. Between the next two calls the file is a part without a lock:
                # whoever sweeps the folder just then removes it, and it is written once more.
                if (mode := _mode(path)) is not None:
                    os.fchmod(unnamed, mode)
                sweep(path.parent, path.name)
                part = _new_part(path)
                if _name(unnamed, part):
                    with suppress(FileNotFoundError):
                        os.replace(part, path)
                        return True
    return False


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once, where the system can."""
    if sys.platform != "linux":
        return False
    import ctypes

    at_cwd, exchange = -100, 2
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # glibc before 2.28
        return False
    if rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # the file system or the kernel cannot
        return False
    raise OSError(number, os.strerror(number), str(other))
