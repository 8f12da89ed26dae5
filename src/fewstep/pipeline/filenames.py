"""Where generated images go: names that never overwrite by accident."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING

from fewstep.core import atomic
from fewstep.core.types import UserError

if TYPE_CHECKING:
    from PIL import Image

    from fewstep.images.record import Record

FIELDS = ("index", "seed", "prompt", "model", "steps")
DEFAULT = "{prompt}-{seed}.png"
NAME_BYTES = 255
"""Of a file's name, on all common file systems."""
PATH_BYTES = 4095
"""Of a whole path, on Linux; other systems say themselves what is too long."""
SLUG = 60
"""Most characters of a slug."""


@dataclass(frozen=True)
class FilenamePattern:
    """Names images after ``-o``, and writes them.

    * nothing: ``PROMPT-SEED.png`` in the current folder;
    * a folder (it exists, or has no suffix): the same in that folder, which is made if need be;
    * a pattern with ``{index} {seed} {prompt} {model} {steps}``: that name;
    * a pipe or device that is there: one image through it, a PNG where it has no suffix;
    * one image file: exactly that file, which alone may be overwritten; several images of one call
      become ``NAME-1.png``, ``NAME-2.png``, ….

    In all cases but the exact file a name that is taken gets ``-2``, ``-3``, … behind it. What is too long
    for a file's name is shortened before its number.

    Attributes:
        make: index and record to the wanted path.
        exact: whether that path is overwritten.
        suffix: of all paths; it decides the format.
    """

    make: Callable[[int, Record], Path]
    exact: bool
    suffix: str
    _numbers: dict[Path, Iterator[int]] = field(default_factory=dict[Path, "Iterator[int]"])
    """By wanted path: the numbers that were not tried yet, so that many of one name take linear time."""

    def save(self, image: Image.Image, index: int, record: Record) -> Path:
        """Write an image with its metadata under the first name that is free.

        No other process gets the same name. The folder is made if need be.

        Args:
            image: what to write.
            index: its number in this call, from 1.
            record: how it was made.

        Returns:
            The path that was written.

        Raises:
            UserError: the folder cannot be made, or the file cannot be written.
        """
        from fewstep.images.io import encode, save

        path = self.make(index, record)
        if atomic.is_stream(path):
            atomic.write(path, encode(image, Path(f"image{self.suffix}")))
            return path
        _make_folder(path.parent)
        if not self.exact:
            return atomic.write_new(self._candidates(path), encode(image, path))
        save(image, path)
        return path

    def _candidates(self, path: Path) -> Iterator[Path]:
        for number in self._numbers.setdefault(path, count(1)):
            yield path if number == 1 else numbered(path, number)


def names(output: str | None, images: int) -> FilenamePattern:
    """Read the ``-o`` option for a call that writes ``images`` files.

    Raises:
        UserError: an unknown field, a suffix of another format, or a name that is missing or too long.
    """
    if output is None:
        return _pattern(DEFAULT)
    if "{" in output:
        return _pattern(output)
    path = Path(output)
    _check_length(path)
    _check_name(output, path)
    if atomic.is_stream(path):
        if images > 1:
            raise UserError(f"{output} is no file and takes one image: give -o a name for {images} images")
        return FilenamePattern(
            lambda index, record: path,
            exact=True,
            suffix=_checked_suffix(path.with_suffix(path.suffix or ".png")),
        )
    if path.is_dir() or output.endswith("/") or not path.suffix:
        return _pattern(DEFAULT, path)
    suffix = _checked_suffix(path)
    if images == 1:
        return FilenamePattern(lambda index, record: path, exact=True, suffix=suffix)
    return FilenamePattern(lambda index, record: numbered(path, index), exact=False, suffix=suffix)


def slug(text: str) -> str:
    """Words of ``text`` joined by hyphens, safe in every file system, at most :data:`SLUG` characters."""
    return re.sub(r"\W+", "-", text.lower())[:SLUG].strip("-") or "picture"


def numbered(path: Path, number: int) -> Path:
    """``NAME-NUMBER.SUFFIX``; a name that gets too long so loses its last characters before the number."""
    stem, end = path.stem, f"-{number}{path.suffix}"
    while len(os.fsencode(stem + end)) > NAME_BYTES:
        stem = stem[:-1]
    return path.with_name(stem + end)


def _pattern(output: str, folder: Path | None = None) -> FilenamePattern:
    def fill(index: int, seed: int, steps: int, prompt: str, model: str) -> Path:
        path = Path(output.format(index=index, seed=seed, steps=steps, prompt=prompt, model=model))
        return path if folder is None else folder / path

    def make(index: int, record: Record) -> Path:
        words = slug(record.prompt), slug(record.model)
        # Letters take up to 4 bytes each: what does not fit gets shorter.
        tried = (
            fill(index, record.seed, record.steps, *(word[:most] for word in words))
            for most in range(SLUG, 0, -1)
        )
        return next((path for path in tried if _fits(path)), fill(index, record.seed, record.steps, "a", "a"))

    try:
        parsed = list(Formatter().parse(output))
        if not all(_known(field, form, conversion) for _, field, form, conversion in parsed):
            raise ValueError(output)
        trial = fill(1, 0, 1, "a", "a")
    except (LookupError, ValueError, TypeError):
        fields = " ".join(f"{{{name}}}" for name in FIELDS)
        raise UserError(f"cannot read the pattern {output!r}; its fields are {fields}") from None
    _check_length(trial)
    return FilenamePattern(make, exact=False, suffix=_checked_suffix(trial))


def _known(field: str | None, form: str | None, conversion: str | None) -> bool:
    """Whether a part of a pattern is plain text, one of our fields, or one padded to at most 99 digits."""
    if field is None:
        return True
    return field in FIELDS and conversion is None and bool(re.fullmatch(r"(\d{1,2}d?)?", form or ""))


def _checked_suffix(path: Path) -> str:
    from fewstep.images.io import format_of

    format_of(path)
    return path.suffix


def _fits(path: Path) -> bool:
    return (
        all(len(os.fsencode(part)) <= NAME_BYTES for part in path.parts)
        and len(os.fsencode(path)) <= PATH_BYTES
    )


def _check_length(path: Path) -> None:
    if not _fits(path):
        text = f"{str(path)[:60]}… is too long: a name may have {NAME_BYTES} bytes, a path {PATH_BYTES}"
        raise UserError(f"cannot write there: {text}")


def _check_name(output: str, path: Path) -> None:
    """Refuse a blank, and a suffix alone unless it is said or known to be a folder."""
    from fewstep.images.io import SUFFIXES

    there = bool(output) and path.is_dir()
    named = path.stem.strip() and (path.name.lower() not in SUFFIXES or output.endswith("/"))
    if not (there or named):
        raise UserError(
            f"a name is missing in -o {output[-40:]!r}: give a file such as image.png, or a folder"
        )


def _make_folder(folder: Path) -> None:
    """Make a folder; a link that points at none yet stays, and what it points at is made."""
    try:
        Path(os.path.realpath(folder)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {atomic.reason(folder, error)}") from None
