"""List the files of a folder and its subfolders."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.core.progress import say
from fewstep.core.types import UserError


@dataclass(frozen=True)
class Listing:
    """The contents of a folder and its subfolders.

    Attributes:
        files: everything that is no folder, sorted; their paths begin with the folder's.
        hidden: files and folders that were skipped because their names begin with a dot.
        repeated: links to folders that were skipped because their target is listed already, or holds the
            link itself.
    """

    files: list[Path]
    hidden: list[Path]
    repeated: list[Path]

    def say_skipped(self, folder: Path) -> None:
        """Print a line to standard error for each kind of what was skipped."""
        say_skipped(self.hidden, "hidden file or folder", "hidden files or folders", folder)
        say_skipped(
            self.repeated, "link to a folder that is listed", "links to folders that are listed", folder
        )


def list_files(folder: Path) -> Listing:
    """List a folder and its subfolders. Links to files and folders are followed.

    A folder that several links lead to is listed once: at its own path, if that lies below ``folder``, else
    by the first link in the order of depth and name. So circular links end.

    Raises:
        UserError: a folder cannot be listed.
    """
    found = Listing([], [], [])
    seen: set[str] = set()
    folders, links = deque([folder]), deque[Path]()
    while folders or links:
        path = folders.popleft() if folders else links.popleft()
        if _is_repeated(path, seen):
            found.repeated.append(path)
            continue
        seen.add(os.path.realpath(path))
        for entry in _entries(path):
            here = path / entry.name
            if entry.name.startswith("."):
                found.hidden.append(here)
            elif not os.path.isdir(here):
                found.files.append(here)
            elif entry.is_symlink():
                links.append(here)
            else:
                folders.append(here)
    for paths in (found.files, found.hidden, found.repeated):
        paths.sort()
    return found


def say_skipped(paths: Sequence[Path | str], one: str, many: str, where: Path | str) -> None:
    """Print to standard error how many things were skipped, and the first of them; nothing for none."""
    if paths:
        count = f"1 {one}" if len(paths) == 1 else f"{len(paths)} {many}"
        say(f"skipped {count} in {where}, such as {paths[0]}")


def _is_repeated(folder: Path, seen: set[str]) -> bool:
    target = os.path.realpath(folder)
    holds_link = bool(seen) and Path(os.path.realpath(folder.parent)).is_relative_to(target)
    return target in seen or holds_link


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot list the folder {folder}: {error.strerror}") from error
