"""Converts pixels between the codec's range [-1, 1], 8-bit levels and Pillow images."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fewstep.core.types import Array, UserError
from fewstep.images.decode import to_rgb

NOT_FINITE = (
    "values that are NaN or infinite, so there is no image: its weights are broken, or too large for the "
    "precision that it runs in"
)


def finite(array: Array) -> bool:
    """Return whether no number of a numpy array or torch tensor is NaN or infinite."""
    return bool((np.isfinite(array) if isinstance(array, np.ndarray) else array.isfinite()).all())


def to_uint8(pixels: Array) -> np.ndarray:
    """Convert decoded pixels to 8-bit levels. Rounding runs on the device of the pixels.

    Args:
        pixels: numpy array or torch tensor ``[B, 3, h, w]``, about [-1, 1]; what is beyond is clipped.

    Returns:
        numpy uint8 ``[B, 3, h, w]``.

    Raises:
        UserError: a pixel is NaN or infinite, which would become black or white.
    """
    if not finite(pixels):
        raise UserError(f"the decoder gave {NOT_FINITE}")
    levels = ((pixels + 1) * 127.5).round().clip(0, 255)
    return levels.astype(np.uint8) if isinstance(levels, np.ndarray) else levels.byte().cpu().numpy()


def to_pil(levels: np.ndarray) -> list[Image.Image]:
    """Convert uint8 ``[B, 3, h, w]`` to ``B`` Pillow images."""
    return [Image.fromarray(level) for level in np.ascontiguousarray(levels.transpose(0, 2, 3, 1))]


def center_crop_resize(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Lay an image on white, crop its middle and scale it to ``size``.

    Returns:
        float32 ``[1, 3, h, w]`` in [-1, 1].
    """
    from PIL import ImageOps

    pixels = np.asarray(ImageOps.fit(to_rgb(image), size, Image.Resampling.LANCZOS), np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]) / 127.5 - 1
