"""The files of a folder and its subfolders, the same wherever a folder is listed."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.core.types import UserError


@dataclass(frozen=True)
class Listing:
    """What lies below a folder.

    Attributes:
        files: everything that is no folder, sorted; their paths begin with the folder's.
        hidden: files and folders that were passed over, for their names begin with a dot.
        repeated: links to folders that were passed over, for what they point at is taken already, or holds
            the link itself.
    """

    files: list[Path]
    hidden: list[Path]
    repeated: list[Path]

    def say(self, folder: Path) -> None:
        """Print to standard error what was passed over, if anything: a line for either kind."""
        say_passed_over(self.hidden, "hidden file or folder", "hidden files or folders", folder)
        say_passed_over(
            self.repeated, "link to a folder that is taken", "links to folders that are taken", folder
        )


def list_files(folder: Path) -> Listing:
    """List a folder and its subfolders. Links to files and folders are followed.

    A folder that several links lead to is taken once: under its own place, where that lies below ``folder``,
    else by the first link in the order of depth and name. So links in a circle come to an end.

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


def say_passed_over(paths: Sequence[Path | str], one: str, many: str, where: Path | str) -> None:
    """Print to standard error how many things were passed over, and the first of them; nothing for none."""
    if paths:
        what = f"1 {one}" if len(paths) == 1 else f"{len(paths)} {many}"
        print(f"fewstep: passed over {what} in {where}, such as {paths[0]}", file=sys.stderr)


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
