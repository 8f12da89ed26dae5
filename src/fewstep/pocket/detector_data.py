"""Pictures for a detector to learn from: renderings anywhere, at any size, and where they lie.

They are wider than what a composer draws (places, sizes, slants, soft and noisy copies), since what a model
draws is near a scene but never just one. They hold no generated picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from fewstep.images.decode import decode
from fewstep.pocket.captions import COLOURS
from fewstep.pocket.render import Renderings

Rng = np.random.Generator
_ROOM = 0.04  # how far things may reach over the border, or into each other, in units of the picture's side


@dataclass(frozen=True)
class Found:
    """A thing in a picture: its centre from the left and the top, and its side, in units of the picture's."""

    x: float
    y: float
    side: float


class DetectionDataset:
    """Draws pictures with one to seven things; picture ``i`` of a seed is always the same one.

    Args:
        renderings: the stickers; those of held-out pairs too: the judge knows everything.
        size: side of the pictures in pixels.
        seed: what tells one set from another.
    """

    def __init__(self, renderings: Renderings, size: int = 128, seed: int = 0) -> None:
        self._renderings, self._size, self._seed = renderings, size, seed

    def __call__(self, index: int) -> tuple[NDArray[np.uint8], list[Found]]:
        """Picture ``index``, uint8 ``[size, size, 3]``, and what is in it."""
        rng = np.random.Generator(np.random.Philox(key=[self._seed, index]))
        canvas = _ground(self._size, rng)
        spots = _spots(rng)
        row = self._row(rng)
        alike = len(spots) > 1 and rng.random() < 0.35
        found: list[Found] = []
        for x, y, side in spots:
            row = row if alike else self._row(rng)
            pixels = max(8, round(side * self._size))
            drawn = _slanted(Image.fromarray(np.asarray(self._renderings.pictures[row])), pixels, rng)
            canvas.paste(
                drawn, (round(x * self._size - pixels / 2), round(y * self._size - pixels / 2)), drawn
            )
            found.append(Found(x, y, side))
        return _worn(canvas, rng), found

    def _row(self, rng: Rng) -> int:
        return int(rng.integers(len(self._renderings.pairs)))


def _spots(rng: Rng) -> list[tuple[float, float, float]]:
    """Centres and sides of one large thing, or of up to seven that hardly touch."""
    if rng.random() < 0.18:
        side = float(rng.uniform(0.55, 0.98))
        play = max(0.0, (1 - side) / 2 + _ROOM / 2)
        x, y = (0.5 + rng.uniform(-play, play, 2)).tolist()
        return [(x, y, side)]
    many, spots = int(rng.integers(2, 8)), list[tuple[float, float, float]]()
    base = float(rng.uniform(0.27, 0.52 if many < 5 else 0.34))
    for _ in range(12 * many):
        side = base * float(rng.uniform(0.9, 1.1))
        x, y = rng.uniform(side / 2 - _ROOM, 1 - side / 2 + _ROOM, 2).tolist()
        if all(max(abs(x - a), abs(y - b)) > (side + s) / 2 - _ROOM for a, b, s in spots):
            spots.append((x, y, side))
        if len(spots) == many:
            break
    return spots


def _ground(size: int, rng: Rng) -> Image.Image:
    """White half of the time, else about one of the composer's colours, plain or graded to another."""
    names = list(COLOURS)
    first = np.array(COLOURS[names[int(rng.integers(len(names)))]] if rng.random() < 0.5 else (255, 255, 255))
    second = np.array(COLOURS[names[int(rng.integers(len(names)))]]) if rng.random() < 0.1 else first
    ramp = np.linspace(0, 1, size)[:, None, None]
    rows = first * (1 - ramp) + second * ramp + rng.normal(0, 5, 3)
    return Image.fromarray(np.broadcast_to(rows, (size, size, 3)).clip(0, 255).astype(np.uint8))


def _slanted(sticker: Image.Image, pixels: int, rng: Rng) -> Image.Image:
    """The sticker at its size; half of the time a little turned and stretched."""
    if rng.random() < 0.5:
        return sticker.resize((pixels, pixels), Image.Resampling.BILINEAR, reducing_gap=2.0)
    wide, high = (max(8, round(pixels * v)) for v in rng.uniform(0.88, 1.0, 2))
    small = sticker.resize((wide, high), Image.Resampling.BILINEAR, reducing_gap=2.0)
    square = Image.new("RGBA", (pixels, pixels))
    square.paste(small, ((pixels - wide) // 2, (pixels - high) // 2))
    return square.rotate(float(rng.normal(0, 5)), Image.Resampling.BILINEAR)


def _worn(canvas: Image.Image, rng: Rng) -> NDArray[np.uint8]:
    """As models and files leave pictures: softer, noisier, off in colour, through JPEG; a third untouched."""
    if rng.random() < 0.33:
        return np.asarray(canvas)
    if rng.random() < 0.6:
        canvas = canvas.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 1.5))))
    if rng.random() < 0.25:
        file = BytesIO()
        canvas.save(file, "JPEG", quality=int(rng.integers(30, 90)))
        canvas = decode(file.getvalue(), "a JPEG of our own")
    pixels: Any = np.asarray(canvas)
    if rng.random() < 0.4:
        pixels = pixels * rng.normal(1, 0.05, 3).astype(np.float32) + np.float32(rng.normal(0, 6))
    if rng.random() < 0.3:
        pixels = pixels + rng.standard_normal(pixels.shape, np.float32) * np.float32(rng.uniform(2, 10))
    return np.asarray(pixels).clip(0, 255).astype(np.uint8)
