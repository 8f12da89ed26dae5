"""Preview images of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fewstep.core.types import Array
from fewstep.families.base import Family

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image


SHOWN = (
    "a red apple, 3D style",
    "noto style guitar on a pale blue background",
    "cat face, flat style",
    "a rocket",
    "draw me a pizza",
    "twemoji octopus",
    "two blue books on a yellow background",
    "a key to the left of a lock",
    "sun above a house, 3D style",
    "a photo of a dog",
    "three strawberries, flat style",
    "a violin, 3D render",
)
"""Prompts of the contact sheets."""


def decode_grid(family: Family, latents: Array, prompts: Sequence[str]) -> Image:
    """Decode latents ``[B, C, H, W]`` to one Pillow image, each part with its prompt."""
    from fewstep.images.grid import sheet

    return sheet(decode_uint8(family, latents), list(prompts), columns=4)


def decode_uint8(family: Family, latents: Array) -> NDArray[np.uint8]:
    """Decode latents ``[B, C, H, W]`` to images, numpy uint8 ``[B, 3, h, w]``.

    Raises:
        UserError: a pixel is NaN or infinite.
    """
    import torch

    from fewstep.images.pixels import to_uint8

    with torch.no_grad():
        return to_uint8(family.codec.decode(latents))
