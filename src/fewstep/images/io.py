"""Reads and writes image files."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any, cast

from PIL import Image

from fewstep.core import atomic
from fewstep.core.types import UserError
from fewstep.images import metadata
from fewstep.images.decode import decode, reason, to_rgb

Image.preinit()  # Pillow does this at the first save; here it runs while the model loads

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Suffixes of the files that are written, and their formats. PNG and WebP keep all pixels, JPEG is lossy."""
MOST_SIDE = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 16383}
"""Most pixels along a side that a format can hold."""
MOST_BYTES = 2**28
"""Most bytes of an image file that is read."""
_MODES = {
    "PNG": ("1", "L", "LA", "P", "I;16", "RGB", "RGBA"),
    "JPEG": ("L", "RGB"),
    "WEBP": ("RGB", "RGBA"),
}
"""Modes that a format keeps as they are."""
JPEG_QUALITY = 95


def open_image(path: str | Path) -> Image.Image:
    """Open and decode an image file; see :func:`fewstep.images.decode.decode`.

    Raises:
        UserError: it cannot be read, is no image, or is damaged.
    """
    return decode(read(path), str(path))


def read(path: str | Path) -> bytes:
    """Return the bytes of an image file, which may be a pipe.

    Raises:
        UserError: it cannot be read, or has more than :data:`MOST_BYTES`.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"there is no image {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not an image that can be read: {reason(error)}") from None
    if len(data) > MOST_BYTES:
        raise UserError(f"{path} is not an image that can be read: it has more than {MOST_BYTES >> 20} MiB")
    return data


def format_of(path: Path) -> str:
    """Return the format that a path's suffix stands for.

    Raises:
        UserError: no such format is written here.
    """
    if path.suffix.lower() not in SUFFIXES:
        *most, last = SUFFIXES
        raise UserError(f"images are written as {', '.join(most)} or {last}, not as {path.name[-40:]!r}")
    return SUFFIXES[path.suffix.lower()]


def encode(image: Image.Image, path: Path) -> bytes:
    """Encode an image with its records (:func:`fewstep.images.metadata.texts`) as the bytes of a file.

    PNG and WebP keep all pixels. JPEG has the quality :data:`JPEG_QUALITY` and full colour resolution, and
    transparent pixels become white.

    Args:
        image: of any Pillow mode.
        path: its suffix decides the format.

    Raises:
        UserError: another suffix, or an image that the format cannot hold.
    """
    kind = format_of(path)
    how: dict[str, Any] = {
        "JPEG": {"quality": JPEG_QUALITY, "subsampling": 0},
        "WEBP": {"lossless": True, "exact": True},
    }.get(kind, {})
    pixels = image if image.mode in _MODES[kind] else to_rgb(image)
    data = io.BytesIO()
    try:
        pixels.save(data, kind, **how, **metadata.save_options(metadata.texts(image), kind))
    except (OSError, ValueError, SystemError, MemoryError) as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from None
    return data.getvalue()


def save(image: Image.Image, path: str | Path) -> None:
    """Write an image with its record, all of it or nothing. The suffix decides the format.

    Args:
        image: any Pillow image; a generated one has a record.
        path: ends in ``.png``, ``.jpg``, ``.jpeg`` or ``.webp``; see :func:`encode`. A link stays, and
            its target is written.

    Raises:
        UserError: another suffix, it cannot be written, or the arguments are no image and no path.
    """
    given = cast("object", image)
    if not isinstance(given, Image.Image):
        raise UserError(f"save takes a Pillow image, not {type(given).__name__}")
    try:
        path = Path(path)
    except TypeError:
        raise UserError(f"save takes a path to write to, not {type(path).__name__}") from None
    atomic.write(path, encode(image, path))


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Raises:
        UserError: it cannot be read.
    """
    return hashlib.sha256(read(path)).hexdigest()
