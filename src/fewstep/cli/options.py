"""Types of options that several commands share, and what an option or an argument reads."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

from cyclopts import Parameter

from fewstep.core.types import UserError

if TYPE_CHECKING:
    from PIL import Image

STREAM = "-"
"""Standard input as a prompt or an input image, and standard output as ``-o``."""

_WORD = re.compile(r"(?=.*[^\W\d_])[\w'’-]+[,.;:!?]?")
"""One word, perhaps with a punctuation mark."""

_FILES = {
    ".safetensors": "with its option, as in --lora A --lora B",
    ".txt": "of prompts with --prompts",
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp"), "with --image, or its name with -o"),
}
"""By suffix: how to give a file of that kind, which stands among the prompts."""


class PromptsWarning(UserWarning):
    """Several prompts may be one prompt without quotes, or a prompt may be a file."""


Flag: TypeAlias = Annotated[bool, Parameter(negative="")]
"""An option without a value, which is off if it is not given."""
Output: TypeAlias = Annotated[Path, Parameter(name=["--output", "-o"])]


def check_quotes(prompts: Sequence[str]) -> None:
    """Warn if all of several prompts are single words: the shell splits a prompt without quotes."""
    if len(prompts) > 1 and all(_WORD.fullmatch(prompt) for prompt in prompts):
        joined = " ".join(prompts)
        joined = joined if len(joined) <= 60 else f"{joined[:60]}…"
        line = f'these are {len(prompts)} prompts of one word each; if one was meant, quote it: "{joined}"'
        warnings.warn(line, PromptsWarning, stacklevel=2)


def check_files(prompts: Sequence[str]) -> None:
    """Warn of prompts that are files: an option takes one value, and what follows it is a prompt."""
    for prompt in prompts:
        suffix = Path(prompt).suffix.lower()
        # A prompt of one word may be the name of a folder by chance.
        exists = os.path.isfile(prompt) or (os.sep in prompt and os.path.exists(prompt))
        if prompt != STREAM and (exists or suffix in _FILES):
            shown = prompt if len(prompt) <= 60 else f"…{prompt[-60:]}"
            how = _FILES.get(suffix, "with the option that it is for")
            line = f"the prompt {shown} looks like a file, and is drawn as text: give a file {how}"
            warnings.warn(line, PromptsWarning, stacklevel=2)


def read_prompts(prompts: Sequence[str], path: str | None) -> list[str]:
    """Return the prompts of the command line, then those of a file. ``-`` stands for the lines of stdin.

    Raises:
        UserError: the file or stdin has no prompt, is not UTF-8 or cannot be read.
    """
    texts: list[str] = []
    for prompt in prompts:
        texts += _lines("standard input", _read_stdin("prompt")) if prompt == STREAM else [prompt]
    if path is not None:
        try:
            texts += _lines(path, Path(path).read_bytes())
        except OSError as error:
            raise UserError(f"cannot read the prompts in {path}: {error.strerror}") from None
    return texts


def read_input_image(image: str | None, prompts: Sequence[str]) -> str | Image.Image | None:
    """Return the value of ``--image``; for ``-`` the image that standard input holds.

    Raises:
        UserError: standard input is no image, is closed, or holds the prompts.
    """
    if image != STREAM:
        return image
    from fewstep.images.decode import decode
    from fewstep.images.io import MOST_BYTES

    if STREAM in prompts:
        raise UserError("standard input holds the prompts or the image: give one of them otherwise")
    data = _read_stdin("image", MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise UserError(f"standard input is not an image that can be read: more than {MOST_BYTES >> 20} MiB")
    return decode(data, "standard input")


def _read_stdin(what: str, limit: int = -1) -> bytes:
    if sys.stdin is None:  # the parent process closed it
        raise UserError(f"there is no {what} in standard input: it is closed")
    try:
        return sys.stdin.buffer.read(limit)
    except OSError as error:
        raise UserError(f"cannot read standard input: {error.strerror}") from None


def _lines(source: str, data: bytes) -> list[str]:
    try:
        lines = [line for line in data.decode("utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"the prompts in {source} are not UTF-8 text") from None
    if not lines:
        raise UserError(f"there is no prompt in {source}")
    return lines
