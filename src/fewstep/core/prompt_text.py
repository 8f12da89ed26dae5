"""Prompts and captions as plain text: one way to read and clean both.

What a net is trained on and what it is asked later must be the same text, so captions of folders and shards
and the prompts of every model go through :func:`clean`.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar

from fewstep.core.types import UserError

_QUOTES = {"'": "‘’‚‛′´", '"': "“”„‟″«»", "-": "‐‑‒–—―−", "...": "…"}
_UNSEEN = [0x00AD, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2060, *range(0x2066, 0x206A), 0xFEFF]
_PLAIN = str.maketrans(
    {sign: plain for plain, signs in _QUOTES.items() for sign in signs}
    | {chr(code): "" for code in _UNSEEN}
    | {chr(code): " " for code in [*range(32), *range(127, 160)]}
    | {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width signs
)
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_WORD = re.compile(r"(?<![\w'])[^\W\d_]+")
_PIECES = 4
"""From so many tokens on, a word is taken for one that the tokenizer has never been trained on."""

_SYNTAX = re.compile(
    r"[(\[][^()\[\]]*:\s*(?:\d(?:\.\d*)?|\.\d+)\s*[)\]]"  # (red:1.5), [cat:dog:0.5]
    r"|\(\([^()]+\)\)|\[\[[^\[\]]+\]\]"  # ((red))
    r"|<\s*[a-z]+\s*:[^<>]*>"  # <lora:name:1>
    r"|\bBREAK\b"
)


_negative: ContextVar[str | None] = ContextVar("negative", default=None)


class PromptWarning(UserWarning):
    """A part of a prompt is left out, or not read as it may be meant."""


@contextmanager
def negative_prompt(text: str) -> Generator[None]:
    """Within the block warnings and errors call ``text`` the negative prompt (:func:`prompt_name`)."""
    token = _negative.set(text)
    try:
        yield
    finally:
        _negative.reset(token)


def prompt_name(text: str) -> str:
    """Return a prompt's name in warnings and errors: ``the prompt`` or ``the negative prompt``."""
    return "the negative prompt" if text == _negative.get() else "the prompt"


def clean(text: str) -> str:
    """One line of plain signs: what a prompt or a caption says, however it was typed.

    Typographic quotes, dashes and dots become those of a keyboard, full-width letters become narrow, accents
    are composed (NFC), and runs of blanks, line ends and control characters become one blank. Byte order
    marks, soft hyphens and marks of writing direction go. Plain ASCII on one line stays as it is.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.translate(_PLAIN).split())


def decode_caption(data: bytes, where: str) -> str:
    """The text of a caption's file, cleaned: UTF-8, or UTF-16 that begins with its byte order mark.

    Args:
        data: the file.
        where: what it is called in errors.

    Raises:
        UserError: it is in another encoding.
    """
    try:
        text = data.decode("utf-16" if data.startswith(_UTF16) else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 without a mark and UTF-32 read as text, but for these
        raise UserError(f"{where} is not UTF-8 text: save it as UTF-8")
    return clean(text)


def syntax(prompt: str) -> list[str]:
    """The parts of a prompt that are commands for AUTOMATIC1111 and ComfyUI, and plain text here."""
    return _SYNTAX.findall(prompt)


def unknown_words(text: str, tokens: Callable[[str], int]) -> list[str]:
    """The words of a text that a tokenizer of byte pairs breaks up: it was hardly trained on them.

    A word of its training is one token or two. Text in another language breaks up in most words, so two
    broken words that make up half of the text are named; of other text only words of many tokens.

    Args:
        text: a cleaned prompt or caption.
        tokens: how many tokens a word is.
    """
    counts = [(word, tokens(word)) for word in _WORD.findall(text)]
    broken = [word for word, count in counts if count > 1]
    if len(broken) > 1 and 2 * len(broken) >= len(counts):
        return broken
    return [word for word, count in counts if count >= _PIECES - (not word.isascii())]
