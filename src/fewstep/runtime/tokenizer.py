"""Prompts to token numbers, and what to say of prompts that do not fit."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from fewstep.core.prompt_text import PromptWarning, clean, prompt_name, unknown_words
from fewstep.core.types import UserError
from fewstep.runtime.tokenizer_check import check, guarded

__all__ = ["PromptWarning", "Tokens", "normalize_text"]

TRAINED = 4096
"""A vocabulary of this size keeps words of its training whole; a smaller one splits all words."""


MOST_WARNINGS = 5
"""Of unknown words, from one tokenizer: an evaluation reads hundreds of prompts."""


class Tokens:
    """The tokenizer of a bundle.

    Args:
        path: its ``tokenizer.json``, truncation and padding to ``length`` set in it.
        length: tokens of a prompt, ``L``.
        warns: whether to say that a prompt is too long.

    Raises:
        UserError: the file is no tokenizer.
    """

    def __init__(self, path: Path, length: int, warns: bool = True) -> None:
        self.length = length
        self.warns = warns
        self._warned = 0
        self._where = str(path)
        text = check(path).decode()
        self._tokenizer: Tokenizer = guarded(Tokenizer.from_str, text, where=self._where)

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Return token ids, int64 ``[B, L]``.

        A :class:`fewstep.core.prompt_text.PromptWarning` names what is cut, and words that are hardly known.

        Raises:
            UserError: nothing of a prompt can be read.
        """
        lines = [normalize_text(prompt) for prompt in prompts]
        rows = [guarded(self._tokenizer.encode, line, where=self._where) for line in lines]
        for line in lines if self.warns else ():
            self._warn_of_unknown(line)
        for prompt, row in zip(prompts, rows, strict=True):
            if row.overflowing and self.warns:
                kept, *cut = [part.special_tokens_mask.count(0) for part in (row, *row.overflowing)]
                _warn(f"{prompt_name(prompt)} is too long: {kept} of {kept + sum(cut)} tokens were kept")
        tokens = np.array([row.ids for row in rows], np.int64)
        if tokens.shape != (len(prompts), self.length):
            raise UserError(f"the tokenizer gives {tokens.shape[-1]} tokens a prompt, not {self.length}")
        return tokens

    def _warn_of_unknown(self, line: str) -> None:
        if self._warned == MOST_WARNINGS or self._tokenizer.get_vocab_size() < TRAINED:
            return
        if words := unknown_words(line, self._count):
            self._warned += 1
            some = ", ".join(dict.fromkeys(words[:6]))
            last = "; such words in further prompts are not named" if self._warned == MOST_WARNINGS else ""
            _warn(f"the model may not know these words: {some} (it has learnt English{last})")

    def _count(self, word: str) -> int:
        """How many tokens a word is, up to the length of a prompt."""
        return self._tokenizer.encode(word).special_tokens_mask.count(0)


def normalize_text(prompt: str) -> str:
    """Write a prompt in letters that an English tokenizer knows.

    A pictograph becomes its Unicode name (an apple emoji becomes "red apple"), which is what a person
    who types one means; accented Latin letters stay; other scripts are left out with a warning.

    Raises:
        UserError: nothing is left of the prompt.
    """
    what, prompt = prompt_name(prompt), clean(prompt)
    if prompt.isascii():
        return prompt
    spelled = [_spell(sign) for sign in prompt]
    foreign = "".join(sign for sign, text in zip(prompt, spelled, strict=True) if text is None)
    text = " ".join("".join(text or "" for text in spelled).split())
    if foreign:
        if not any(sign.isalnum() for sign in text):
            raise UserError(f"the model knows English only, and {what} has none: {prompt[:60]!r}")
        _warn(f"the model knows English only: {foreign[:40]!r} was left out of {what}")
    return text


def _spell(sign: str) -> str | None:
    """One sign as text; ``""`` where it only joins or tints others, ``None`` where it is foreign."""
    if sign.isascii():
        return sign
    kind = unicodedata.category(sign)
    if kind == "So":
        return f" {unicodedata.name(sign, '').lower()} "
    if kind in ("Sk", "Mn", "Me", "Cf"):  # skin tones, accents set apart, variation selectors, joiners
        return sign if kind == "Mn" and not 0xFE00 <= ord(sign) <= 0xFE0F else ""
    if kind[0] in "PZ" or unicodedata.normalize("NFKD", sign)[0].isascii():
        return unicodedata.normalize("NFKC", sign)  # a wide or circled letter becomes a plain one
    return None


def _warn(message: str) -> None:
    warnings.warn(message, PromptWarning, stacklevel=2)
