"""A ``tokenizer.json`` checked before the ``tokenizers`` library reads it.

The library is written in Rust. Some files make it panic, which in Python is an exception that no ``except
Exception`` catches, and some make it ask for more memory than there is, which ends the process.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from msgspec import Meta

from fewstep.core import json_io
from fewstep.core.types import UserError

T = TypeVar("T")

MOST_TOKENS = 4096
"""Of a prompt."""
MOST_STEPS = 64
"""Normalizers, pre-tokenizers and post-processors of a file, each kind."""
MOST_GROWTH = 80
"""Times by which normalizers and pre-tokenizers, one after another, may lengthen a prompt; T5's may by 72."""
MOST_TEXT = 1000
"""Characters of any string that the library may put into text or beside tokens."""
UNICODE_GROWTH = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 3, "StripAccents": 1, "Nmt": 1}
"""Normalizer -> times by which it lengthens a letter at most; after one another they do so once."""
OTHER_GROWTH = {"BertNormalizer": 12, "ByteLevel": 4, "Metaspace": 2}
"""The same of steps whose growth multiplies: they put signs between letters, or make letters of bytes."""
MOST_PATTERN = 1000
"""Characters of a regular expression."""
_REPEATED_GROUP = re.compile(r"\)[*+{]")
"""Patterns whose search time can grow as a power of the prompt's length."""

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
    pad_token: Annotated[str, Meta(max_length=MOST_TEXT)]
    direction: Side = "Right"
    pad_to_multiple_of: Count | None = None
    pad_type_id: Identifier = 0


@dataclass(frozen=True)
class _Added:
    id: Identifier
    content: Annotated[str, Meta(min_length=1, max_length=MOST_TEXT)]


@dataclass(frozen=True)
class _Model:
    vocab: dict[str, Identifier] | list[tuple[str, float]]
    unk_id: Identifier | None = None
    max_input_chars_per_word: Annotated[int, Meta(ge=0, le=2**16)] | None = None


@dataclass(frozen=True)
class _File:
    """The shape of what is looked at in ``tokenizer.json``."""

    model: dict[str, Any]
    added_tokens: list[_Added] = field(default_factory=list[_Added])
    truncation: _Truncation | None = None
    padding: _Padding | None = None
    decoder: dict[str, Any] | None = None
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    post_processor: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Special:
    ids: list[Identifier]
    tokens: list[str]


@dataclass(frozen=True)
class _Template:
    """Check that each special token of a template is known, which the library does not do."""

    single: list[dict[str, dict[str, Any]]]
    special_tokens: dict[str, _Special]
    pair: list[dict[str, dict[str, Any]]] = field(default_factory=list[dict[str, dict[str, Any]]])


@dataclass(frozen=True)
class _Replace:
    pattern: dict[str, str]
    content: str


@dataclass(frozen=True)
class _Prepend:
    prepend: str


@dataclass(frozen=True)
class _Precompiled:
    precompiled_charsmap: str


def check(path: Path) -> bytes:
    """The file, once it is known that the library can take it.

    Raises:
        UserError: it cannot be read, has another shape, or is beyond the limits of this module.
    """
    data = json_io.read_bytes(path)
    where = str(path)
    file = json_io.parse(data, _File, where)
    json_io.convert(file.model, _Model, where)
    _check_strings({name: text for name, text in file.model.items() if isinstance(text, str)}, where)
    growth = 1
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        tree = getattr(file, name)
        _check_strings(tree, where)
        steps = list(_steps(tree))
        if len(steps) > MOST_STEPS:
            raise UserError(f"{where} has {len(steps)} parts of its {name}: at most {MOST_STEPS} are taken")
        for step in steps:
            if not isinstance(step.get("type"), str):  # the library guesses the type from the other fields
                raise UserError(f"{where} has a part of its {name} without a type")
            _check_patterns(step, where)
            if name == "post_processor" and step["type"] == "TemplateProcessing":
                _check_template(json_io.convert(step, _Template, where), where)
        if name in ("normalizer", "pre_tokenizer"):
            growth *= _growth(steps, where)
    if growth > MOST_GROWTH:
        raise UserError(f"{where} makes text {growth} times as long: at most {MOST_GROWTH} times is taken")
    return data


def _growth(steps: Iterable[dict[str, Any]], where: str) -> int:
    """How many times as long a text can be after some steps.

    Raises:
        UserError: a step is damaged.
    """
    growth = within = 1
    for step in steps:
        kind = step["type"]
        if kind in UNICODE_GROWTH:
            within = max(within, UNICODE_GROWTH[kind])
        elif kind in ("Replace", "Prepend", "Precompiled", *OTHER_GROWTH):  # may bring what grows again
            growth, within = growth * within * _factor(step, where), 1
    return growth * within


def _factor(step: dict[str, Any], where: str) -> int:
    kind = step["type"]
    if kind == "Replace":
        replace = json_io.convert(step, _Replace, where)
        pattern = replace.pattern.get("String", "")
        # What may match nothing matches between all letters too.
        return max(1, -(-len(replace.content) // len(pattern))) if pattern else 1 + len(replace.content)
    if kind == "Prepend":
        return 1 + len(json_io.convert(step, _Prepend, where).prepend)
    if kind == "Precompiled":
        return _longest(json_io.convert(step, _Precompiled, where).precompiled_charsmap, where)
    return OTHER_GROWTH.get(kind, 1)


def _longest(charsmap: str, where: str) -> int:
    """Letters of the longest text of a ``Precompiled`` normalizer: a trie, after its size, and the texts."""
    try:
        data = base64.b64decode(charsmap, validate=True)
    except ValueError:
        raise UserError(f"{where} is damaged: its precompiled_charsmap is no base64") from None
    texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
    return max(1, *(len(text.decode("utf-8", "replace")) for text in texts))


def _check_strings(tree: object, where: str) -> None:
    """Refuse long strings wherever they stand, but for the table of a ``Precompiled`` normalizer."""
    todo = [tree]
    while todo:
        each = todo.pop()
        if isinstance(each, dict):
            inner = cast(dict[str, object], each)
            todo += [*inner, *(value for key, value in inner.items() if key != "precompiled_charsmap")]
        elif isinstance(each, list):
            todo += cast(list[object], each)
        elif isinstance(each, str) and len(each) > MOST_TEXT:
            raise UserError(f"{where} has a text of {len(each)} characters: at most {MOST_TEXT} are taken")


def guarded(function: Callable[..., T], *arguments: object, where: str) -> T:
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
        for inner in ("normalizers", "pretokenizers", "processors", "decoders"):
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
    names = [piece.get("SpecialToken", {}).get("id") for piece in template.single]
    if sum(len(template.special_tokens[name].ids) for name in names if name is not None) > MOST_TOKENS:
        raise UserError(f"{where} has a template of more than {MOST_TOKENS} tokens")
