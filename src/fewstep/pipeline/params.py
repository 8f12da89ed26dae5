"""Checks the options of a generation: every bad value becomes an error of one line."""

from __future__ import annotations

import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

from fewstep.core.prompt_text import PromptWarning, clean, syntax
from fewstep.core.types import Model, UserError
from fewstep.core.validate import MANY, check_float, check_int

SEEDS = 2**32
MOST = 2**16
"""Most images of a prompt in one call."""
FEW = 8
"""Most steps of a few-step model. A guided model, or one of more steps, takes up to
:data:`fewstep.core.validate.MANY`."""
STRENGTH = 0.95

LONGEST = 10_000
"""Most characters of a prompt, as in the Stability REST API. Models read far fewer."""


@dataclass(frozen=True)
class Request:
    """Checked values; see ``Pipeline.__call__`` for what they mean.

    Attributes:
        jobs: (prompt, seed) of each image, in order.
        steps: number of steps.
        guidance: guidance scale, of a second pass or embedded; ``None`` for a model without.
        negative: negative prompt, or ``None``.
        image: the input image: a path, a Pillow image, or ``None``.
        strength: 0 keeps the input image, 1 ignores it.
    """

    jobs: tuple[tuple[str, int], ...]
    steps: int
    guidance: float | None
    negative: str | None
    image: object
    strength: float


class Diffusers(TypedDict, total=False):
    """diffusers' names for arguments of ``Pipeline.__call__``."""

    prompt: str | Sequence[str] | None
    negative_prompt: str | None
    num_inference_steps: int | None
    guidance_scale: float | None
    num_images_per_prompt: int | None
    width: int | None
    height: int | None


ALIASES = {
    "prompt": "prompts",
    "negative_prompt": "negative",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "num_images_per_prompt": "n",
}
INSTEAD = {"generator": "seed", "callback_on_step_end": "on_step", "num_images": "n", "cfg_scale": "guidance"}
"""Arguments of other libraries, and those of fewstep that do the same."""


class ArgumentError(UserError, TypeError):
    """A keyword argument is unknown, or given under two names."""


def own_names(given: Mapping[str, object]) -> dict[str, Any]:
    """Return arguments under fewstep's names, without those that are ``None``.

    Raises:
        ArgumentError: one is given under both its names.
    """
    said = {name: value for name, value in given.items() if value is not None}
    for alias, name in ALIASES.items():
        if alias in said and name in said:
            raise ArgumentError(f"{alias} is another name of {name}: give one of them")
    return {ALIASES.get(name, name): value for name, value in said.items()}


def check_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse unknown keyword arguments.

    Raises:
        ArgumentError: one is unknown. The message names the nearest known one.
    """
    names = list(known)
    for name in given:
        if name not in names:
            from difflib import get_close_matches

            near = [INSTEAD[name]] if INSTEAD.get(name) in names else get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(names))}"
            raise ArgumentError(f"{what} takes no {name}: {hint}")


def check_size(size: tuple[int, int], width: object, height: object, other: str) -> None:
    """Refuse another size than the model's, in pixels. ``other`` says how to get another size.

    Raises:
        UserError: the size differs, or is no size.
    """
    asked = tuple(
        own if value is None else check_int(name, value, 1, 2**16)
        for name, value, own in zip(("width", "height"), (width, height), size, strict=True)
    )
    if asked != size:
        there, here = (f"{side[0]}x{side[1]}" for side in (size, asked))
        raise UserError(f"this model generates {there} pixels, not {here}: {other.format(size=here)}")


def check(
    model: Model,
    styles: Sequence[str],
    prompts: str | Sequence[str],
    *,
    seed: int | None = None,
    n: int = 1,
    steps: int | None = None,
    style: str | None = None,
    guidance: float | None = None,
    negative: str | None = None,
    image: object = None,
    strength: float | None = None,
) -> Request:
    """Check options for ``model``, fill in its defaults, and draw a seed if there is none.

    Raises:
        UserError: a value is out of its range, or not for this model.
    """
    texts, count, first = _values(prompts, seed, n, strength, image)
    lines = [_style(text, style, styles) for text in texts]
    scale, away = _guidance(model, guidance, negative)
    most = FEW if model.guidance is None and model.steps <= FEW else MANY
    return Request(
        jobs=tuple((text, first + index) for text in lines for index in range(count)),
        steps=check_int("steps", model.steps if steps is None else steps, 1, most),
        guidance=scale,
        negative=away,
        image=str(image) if isinstance(image, Path) else image,
        strength=check_float("strength", STRENGTH if strength is None else strength, 0, 1),
    )


def check_values(
    prompts: str | Sequence[str],
    *,
    seed: int | None = None,
    n: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    image: object = None,
    strength: float | None = None,
    **others: object,
) -> None:
    """Refuse values that no model takes, before one is loaded. ``others`` depend on the model.

    Raises:
        UserError: a value is out of its range, or the input image cannot be read.
    """
    _values(prompts, seed, n, strength, image)
    if steps is not None:
        check_int("steps", steps, 1, MANY)
    if guidance is not None:
        check_float("guidance", guidance, 0, 100)
    if isinstance(image, str):
        from fewstep.images.io import open_image

        open_image(image)


def _values(
    prompts: object, seed: int | None, n: int, strength: float | None, image: object
) -> tuple[list[str], int, int]:
    """Return the prompts, the number of images of each, and the first seed, which is random by default."""
    texts = _texts(prompts)
    if not texts:
        raise UserError('there is no prompt: say what to generate, as in "a red apple, 3D style"')
    count = check_int("n", n, 1, MOST)
    first = _draw(SEEDS - count + 1) if seed is None else check_int("seed", seed, 0, SEEDS - 1)
    check_int("the last seed (seed + n - 1)", first + count - 1, 0, SEEDS - 1)
    clean = [_prompt(text) for text in texts]
    if strength is not None and image is None:
        raise UserError("strength is for image-to-image: give an image with image (--image)")
    check_float("strength", STRENGTH if strength is None else strength, 0, 1)
    return clean, count, first


def _draw(limit: int) -> int:
    """Return a random number below ``limit`` from the operating system."""
    return int.from_bytes(os.urandom(8)) % limit


_SINGLE = (str, bytes, bytearray, memoryview, Mapping)
"""Types that Python can iterate over, but that are no list of prompts."""


def _texts(prompts: object) -> list[object]:
    """Return one prompt or several as a list; :func:`_prompt` then refuses what is no text."""
    single = isinstance(prompts, _SINGLE) or not isinstance(prompts, Iterable)
    return [prompts] if single else list(cast("Iterable[object]", prompts))


def _prompt(text: object) -> str:
    if not isinstance(text, str):
        raise UserError(f"a prompt must be text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("a prompt is not valid UTF-8: check the encoding of the terminal or file") from None
    line = clean(text)
    if not any(unicodedata.category(sign)[0] not in "CPZ" for sign in line):  # only invisible characters
        raise UserError('a prompt is empty: say what to generate, as in "a red apple, 3D style"')
    if len(line) > LONGEST:
        raise UserError(f"a prompt has {len(line)} characters; at most {LONGEST} are taken: shorten it")
    if parts := syntax(line):
        warnings.warn(
            f"{', '.join(parts[:4])}: read as text, as all of a prompt is", PromptWarning, stacklevel=2
        )
    return line


def _style(prompt: str, style: object, styles: Sequence[str]) -> str:
    """Return ``PROMPT, STYLE style``, in place of another style in the prompt."""
    if style is None:
        return prompt
    if not isinstance(style, str):
        raise UserError(f"style must be text, not {type(style).__name__}")
    known = {name.casefold(): name for name in styles}
    if style.casefold() not in known:
        have = ", ".join(styles) or "none: say the style in the prompt"
        raise UserError(f"unknown style {style!r}; the styles of this model: {have}")
    phrase = f"{known[style.casefold()]} style"
    if phrase.casefold() in prompt.casefold():
        return prompt
    others = "|".join(re.escape(name) for name in styles)
    rest = re.sub(rf",? *\b({others}) style\b", "", prompt, flags=re.IGNORECASE).strip(" ,")
    return f"{rest}, {phrase}" if rest else phrase


def _guidance(model: Model, guidance: float | None, negative: object) -> tuple[float | None, str | None]:
    if model.guidance is None:
        embedded = model.embedded_guidance
        for name, value in (("guidance", guidance if embedded is None else None), ("negative", negative)):
            if value is not None:
                raise UserError(f"model {model.name} takes no {name}: guidance is distilled into it")
        if embedded is None:
            return None, None
        return check_float("guidance", embedded if guidance is None else guidance, 0, 100), None
    if negative is not None and not isinstance(negative, str):
        raise UserError(f"negative must be text, not {type(negative).__name__}")
    scale = check_float("guidance", model.guidance if guidance is None else guidance, 0, 100)
    return scale, _prompt(negative) if negative and negative.strip() else None
