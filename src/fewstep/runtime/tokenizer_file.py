"""A ``tokenizer.json`` checked before the ``tokenizers`` library reads it.

The library is written in Rust. Some files make it panic, which in Python is an exception that no ``except
Exception`` catches, and some make it ask for more memory than there is, which ends the process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta

from fewstep import formats
from fewstep.types import UserError

T = TypeVar("T")

MOST_TOKENS = 4096
"""Of a prompt."""
MOST_STEPS = 64
"""Normalizers, pre-tokenizers and post-processors of a file, each kind."""
MOST_GROWTH = 64
"""Times by which normalizers that replace text may lengthen a prompt."""
MOST_PATTERN = 1000
"""Characters of a regular expression."""
_REPEATED_GROUP = re.compile(r"\)[*+{]")
"""What can make a search take time that grows as a power of the prompt's length."""

Identifier = Annotated[int, Meta(ge=0, lt=2**24)]
Count = Annotated[int, Meta(ge=1, le=MOST_TOKENS)]
Side = Literal["Left", "Right"]


@dataclass(frozen=True)
class _Truncation:
    max_length: Count
    strategy: Literal["LongestFirst", "OnlyFirst", "OnlySecond"]
    stride: Annotated[int, Meta(ge=0, le=0)] = 0
    direction: Side = "Right"


@dataclass(frozen=True)
class _Fixed:
    Fixed: Count


@dataclass(frozen=True)
class _Padding:
    strategy: Literal["BatchLongest"] | _Fixed
    pad_id: Identifier
    pad_token: str
    direction: Side = "Right"
    pad_to_multiple_of: Count | None = None
    pad_type_id: Identifier = 0


@dataclass(frozen=True)
class _Added:
    id: Identifier
    content: Annotated[str, Meta(min_length=1)]


@dataclass(frozen=True)
class _Model:
    vocab: dict[str, Identifier] | list[tuple[str, float]]
    unk_id: Identifier | None = None
    max_input_chars_per_word: Annotated[int, Meta(ge=0, le=2**16)] | None = None


@dataclass(frozen=True)
class _File:
    """The shape of what is looked at in ``tokenizer.json``."""

    model: _Model
    added_tokens: list[_Added] = field(default_factory=list[_Added])
    truncation: _Truncation | None = None
    padding: _Padding | None = None
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    post_processor: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Special:
    ids: list[Identifier]
    tokens: list[str]


@dataclass(frozen=True)
class _Template:
    """What the library does not check itself: each special token of a template must be known."""

    single: list[dict[str, dict[str, Any]]]
    special_tokens: dict[str, _Special]
    pair: list[dict[str, dict[str, Any]]] = field(default_factory=list[dict[str, dict[str, Any]]])


@dataclass(frozen=True)
class _Replace:
    pattern: dict[str, str]
    content: str


def check(path: Path) -> bytes:
    """The file, once it is known that the library can take it.

    Raises:
        UserError: it cannot be read, has another shape, or is beyond the limits of this module.
    """
    data = formats.read_bytes(path)
    where = str(path)
    told = formats.parse(data, _File, where)
    growth = 1
    for name in ("normalizer", "pre_tokenizer", "post_processor"):
        steps = list(_steps(getattr(told, name)))
        if len(steps) > MOST_STEPS:
            raise UserError(f"{where} has {len(steps)} parts of its {name}: at most {MOST_STEPS} are taken")
        for step in steps:
            _check_patterns(step, where)
            kind = step.get("type")
            if name == "normalizer" and kind == "Replace":
                growth *= max(1, len(formats.convert(step, _Replace, where).content))
            if name == "post_processor" and kind == "TemplateProcessing":
                _check_template(formats.convert(step, _Template, where), where)
    if growth > MOST_GROWTH:
        raise UserError(f"{where} replaces text by text that is {growth} times as long")
    return data


def guarded(function: Callable[..., T], *arguments: Any, where: str) -> T:
    """Call the library; what it raises is one line, its panics too.

    Raises:
        UserError: it raised something.
    """
    try:
        return function(*arguments)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where} cannot be loaded as a tokenizer: {reason}") from None


def _steps(tree: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A part and, where it is a sequence, the parts in it."""
    todo = [tree] if tree else []
    while todo:
        step = todo.pop()
        yield step
        for inner in ("normalizers", "pretokenizers", "processors"):
            found = step.get(inner)
            todo += [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _check_patterns(step: dict[str, Any], where: str) -> None:
    pattern = step.get("pattern")
    text = pattern.get("Regex") if isinstance(pattern, dict) else None
    if not isinstance(text, str):
        return
    if len(text) > MOST_PATTERN or _REPEATED_GROUP.search(text):
        raise UserError(f"{where} has a regular expression that may search for ever: {text[:60]}")


def _check_template(template: _Template, where: str) -> None:
    if sum("Sequence" in piece for piece in template.single) != 1:  # what is cut off grows as a power of it
        raise UserError(f"{where} has a template that does not hold the prompt once")
    for piece in (*template.single, *template.pair):
        name = piece.get("SpecialToken", {}).get("id")
        if name is not None and (not isinstance(name, str) or name not in template.special_tokens):
            raise UserError(f"{where} has a template with the unknown token {str(name)[:40]!r}")
    for token in template.special_tokens.values():
        if len(token.ids) != len(token.tokens) or len(token.ids) > MOST_TOKENS:
            raise UserError(f"{where} has a template whose tokens and their numbers are not as many")
