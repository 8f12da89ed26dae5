"""Decodes image files within limits, and brings images of any mode to 8-bit RGB."""

from __future__ import annotations

import importlib
import io
import logging
import os
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from fewstep.core.types import UserError

logging.getLogger("PIL").addHandler(logging.NullHandler())  # it logs what it raises too

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
"""Formats that are read, by Pillow's names. Some others start programs (EPS: Ghostscript)."""
MOST_PIXELS = 2**26
"""Most pixels of a decoded image: 67 megapixels, so that all copies of it take less than 1 GB."""
_SMALLER = {"WEBP": MOST_PIXELS // 2, "AVIF": MOST_PIXELS // 2}
"""Limits of formats whose decoders hold more copies at once."""
_OPAQUE = {"1", "L", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"}
_CLEAR = {"LA", "La", "P", "PA", "RGBA", "RGBa"}
_HALF = 0.5 / 255
_SILENCING = threading.Lock()
_BITS, _PHOTOMETRIC, _ORIENTATION = 258, 262, 274
"""Tags of TIFF and EXIF."""


@contextmanager
def opened(data: bytes, where: str, formats: Sequence[str] = FORMATS) -> Generator[ImageFile.ImageFile]:
    """Open an image file without decoding its pixels. Its content alone decides the format.

    Args:
        data: the file.
        where: its name in errors.
        formats: some of :data:`FORMATS`.

    Raises:
        UserError: the file has none of the formats, or is damaged. Errors in the block count too.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of large images and odd metadata
            with Image.open(io.BytesIO(data), formats=_formats(formats)) as image:
                yield image
    except UserError:
        raise
    except UnidentifiedImageError:
        known = ", ".join(formats)
        raise UserError(f"{where} is not an image that can be read: none of {known}") from None
    except Exception as error:  # a decoder raises whatever goes wrong in it first
        raise UserError(f"{where} is not an image that can be read: {reason(error)}") from None


def decode(data: bytes, where: str) -> Image.Image:
    """Decode the first frame of an image file of one of :data:`FORMATS`.

    Args:
        data: the file.
        where: its name in errors.

    Raises:
        UserError: the file has no such format, is larger than :data:`MOST_PIXELS`, or is damaged.
    """
    with opened(data, where) as image:
        _limit(image, where)
        with _silent() if image.format == "TIFF" else nullcontext():
            image.load()
        return image


@contextmanager
def _silent() -> Generator[None]:
    """Discard standard error within the block: libtiff prints what Pillow raises too."""
    with _SILENCING, ExitStack() as stack:
        with suppress(OSError):  # standard error may be closed
            before = os.dup(2)
            stack.callback(os.close, before)
            with open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), 2)
            stack.callback(os.dup2, before, 2)
        yield


def _formats(names: Iterable[str] = FORMATS) -> list[str]:
    """Return the formats that this Pillow has, and load no other format's module."""
    known: list[str] = []
    for name in dict.fromkeys(names):
        with suppress(ImportError):
            importlib.import_module(f"PIL.{'WebP' if name == 'WEBP' else name.title()}ImagePlugin")
        if name in Image.OPEN:
            known.append(name)
    return known


def _limit(image: ImageFile.ImageFile, where: str) -> None:
    """Refuse a large image before it is decoded. A large JPEG is decoded at half its size instead.

    A progressive JPEG is refused too, because its decoder holds all coefficients at any size.

    Raises:
        UserError: it has more than :data:`MOST_PIXELS`.
    """
    (width, height), most = image.size, _SMALLER.get(image.format or "", MOST_PIXELS)
    if width * height > MOST_PIXELS and image.format in ("JPEG", "MPO") and "progressive" not in image.info:
        image.draft(None, (width // 2, height // 2))
    if image.width * image.height > most:
        size = f"{width * height / 1e6:.0f} megapixels ({width} x {height})"
        raise UserError(f"{where} has {size}, and at most {most / 1e6:.0f} are read: make it smaller")


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image the right way up, bring it to 8 bits a channel and lay it on white: RGB.

    Raises:
        UserError: the colour mode is not supported, or the range of the pixels does not show what is white.
    """
    try:
        tags = getattr(image, "tag_v2", {})
        image = _upright(image)
        if image.mode == "F" or image.mode.startswith("I"):
            image = _eight_bits(image, tags)
        if image.mode in _OPAQUE and "transparency" not in image.info:
            return image if image.mode == "RGB" else image.convert("RGB")
        if image.mode not in _CLEAR | _OPAQUE:
            raise ValueError(f"its colours are {image.mode}; save it as RGB")
        result = Image.new("RGB", image.size)
        for box in _boxes(image.size):
            part = image.crop(box)
            part = (part.convert("LA") if part.mode == "La" else part).convert("RGBA")
            result.paste(
                Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB"), box
            )
        return result
    except (OSError, SyntaxError, ValueError) as error:  # the caller's image may not be decoded yet
        raise UserError(f"that image cannot be used: {reason(error)}") from None


def _boxes(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield the tiles of an image as left, top, right, bottom, so that copies of four channels stay small."""
    width, height = size
    for top in range(0, height, 1024):
        for left in range(0, width, 4096):
            yield left, top, min(left + 4096, width), min(top + 1024, height)


def _eight_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Convert whole numbers of more than 8 bits, or floats, to ``L``; to ``LA`` if a value is transparent.

    Args:
        image: of a mode that is ``F`` or begins with ``I``.
        tags: of a TIFF file, by their numbers.

    Raises:
        ValueError: see :func:`_white`.
    """
    bits = tags.get(_BITS, (16,))
    white = 4095 if image.mode != "F" and tuple(bits) == (12,) else _white(image)
    clear = image.info.get("transparency")
    result = Image.new("L" if clear is None else "LA", image.size)
    for box in _boxes(image.size):
        values = np.asarray(image.crop(box), np.float64)
        levels = np.clip(values * 255 / white, 0, 255).round()
        if tags.get(_PHOTOMETRIC) == 0:  # TIFF: 0 is white; Pillow inverts 8 bits only
            levels = 255 - levels
        part = Image.fromarray(levels.astype(np.uint8))
        if clear is not None:
            part.putalpha(Image.fromarray(np.uint8(255) * (values != clear)))
        result.paste(part, box)
    return result


def _white(image: Image.Image) -> float:
    """Return the value of white, if 0 is black.

    It is 65535 for whole numbers. For floats it is 1, or 255 if all are whole numbers of 8 bits. Filters may
    leave floats half a level beyond the range.

    Raises:
        ValueError: the range of the values does not show it.
    """
    parts = [np.asarray(image.crop(box)) for box in _boxes(image.size)]
    low, high = (float(bound) for bound in (min(p.min() for p in parts), max(p.max() for p in parts)))
    floats = image.mode == "F"
    if floats and -_HALF <= low and high <= 1 + _HALF:
        return 1
    if floats and low >= 0 and high <= 255 and all(np.array_equal(part, np.rint(part)) for part in parts):
        return 255
    # Whole numbers of 32 bits that fit into 8 are ambiguous.
    if not floats and (image.mode != "I" or high > 255 or high == 0) and low >= 0 and high <= 65535:
        return 65535
    kind = "floats" if floats else "whole numbers of 32 bits"
    raise ValueError(f"its pixels are {kind} from {low:g} to {high:g}; save it with 8 or 16 bits a channel")


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Pillow copies an image that needs no turn.
            turned = image.getexif().get(_ORIENTATION) in range(2, 9)
            return ImageOps.exif_transpose(image) if turned else image
    except MemoryError:
        raise
    except Exception:  # broken metadata does not say which way is up
        return image


def reason(error: BaseException) -> str:
    """Return what an error says, in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
