"""Where generated pictures go (floor 4): names that never overwrite by accident."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING

from fewstep.types import UserError

if TYPE_CHECKING:
    from fewstep.picture import Record

FIELDS = ("index", "seed", "prompt", "model", "steps")


@dataclass(frozen=True)
class Names:
    """Names pictures after ``-o``.

    * nothing: ``PROMPT-SEED.png`` in the current folder;
    * a folder (it exists, or has no suffix): the same in that folder, which is made if need be;
    * a pattern with ``{index} {seed} {prompt} {model} {steps}``: that name;
    * one ``.png`` file: exactly that file, which alone may be overwritten; several pictures of one call
      become ``NAME-1.png``, ``NAME-2.png``, ….

    In all cases but the exact file a name that is taken gets ``-2``, ``-3``, … behind it.
    """

    make: Callable[[int, Record], Path]
    exact: bool

    def __call__(self, index: int, record: Record) -> Path:
        """The path of the picture with number ``index``, from 1; its folder exists on return.

        Raises:
            UserError: the folder cannot be made.
        """
        path = self.make(index, record)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {path.parent}: {error.strerror}") from None
        return path if self.exact else _free(path)


def names(output: str | None, pictures: int) -> Names:
    """Read the ``-o`` option for a call that writes ``pictures`` files.

    Raises:
        UserError: an unknown field, or a suffix other than ``.png``.
    """
    if output is None:
        return Names(lambda index, record: Path(_default(record)), exact=False)
    if "{" in output:
        return _pattern(output)
    path = Path(output)
    if path.is_dir() or output.endswith("/") or not path.suffix:
        return Names(lambda index, record: path / _default(record), exact=False)
    _check_suffix(path)
    if pictures == 1:
        return Names(lambda index, record: path, exact=True)
    return Names(lambda index, record: path.with_stem(f"{path.stem}-{index}"), exact=False)


def slug(text: str) -> str:
    """Words of ``text`` joined by hyphens, safe in every file system, at most 60 characters."""
    return re.sub(r"\W+", "-", text.lower())[:60].strip("-") or "picture"


def _default(record: Record) -> str:
    return f"{slug(record.prompt)}-{record.seed}.png"


def _pattern(output: str) -> Names:
    def fill(index: int, seed: int, steps: int, prompt: str, model: str) -> Path:
        words = {"prompt": slug(prompt), "model": slug(model)}
        return Path(output.format(index=index, seed=seed, steps=steps, **words))

    def make(index: int, record: Record) -> Path:
        return fill(index, record.seed, record.steps, record.prompt, record.model)

    try:
        parsed = list(Formatter().parse(output))
        if not all(_known(field, form, conversion) for _, field, form, conversion in parsed):
            raise ValueError(output)
        trial = fill(1, 0, 1, "a", "a")
    except (LookupError, ValueError, TypeError):
        fields = " ".join(f"{{{name}}}" for name in FIELDS)
        raise UserError(f"cannot read the pattern {output!r}; its fields are {fields}") from None
    _check_suffix(trial)
    return Names(make, exact=False)


def _known(field: str | None, form: str | None, conversion: str | None) -> bool:
    """Whether a part of a pattern is plain text, one of our fields, or one padded to at most 99 digits."""
    if field is None:
        return True
    return field in FIELDS and conversion is None and bool(re.fullmatch(r"(\d{1,2}d?)?", form or ""))


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise UserError(f"pictures are written as PNG: give {path.stem}.png instead of {path.name}")


def _free(path: Path) -> Path:
    if not path.exists():
        return path
    tries = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return next(attempt for attempt in tries if not attempt.exists())
