"""Template matching: which concept an object in an image looks like.

A crop is compared with all renderings as CELLS x CELLS mean colours over the image's background, at a few
positions and sizes. The comparison is coarse on purpose. Features of a net that was trained on photographs
misread the soft strokes of a small model, and finer detail does not count here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewstep.pocket.render import Renderings

CELLS = 16
"""Cells per side of a crop that is compared."""

OBJECT_SHARE = 0.855
"""Share of a crop's side that its object fills; the rest is background, which shows the outline."""

SIZES = (0.92, 1.0, 1.08)
SHIFTS = ((0.0, 0.0), (0.04, 0.0), (-0.04, 0.0), (0.0, 0.04), (0.0, -0.04))
"""A box is tried at these sizes and shifts, in units of its side; the most similar counts."""

PADDING = 1.0
"""Padding of an image by its border pixels, in units of its side: boxes may reach over the border."""


@dataclass(frozen=True)
class Box:
    """A square around an object.

    Attributes:
        x: centre from the left, in units of the image's width.
        y: centre from the top, in units of the image's height.
        side: in units of the image's side.
        heat: the detector's confidence, in [0, 1].
    """

    x: float
    y: float
    side: float
    heat: float


class TemplateBank:
    """All renderings as templates.

    Attributes:
        concepts: name -> index in a similarity.
    """

    def __init__(self, renderings: Renderings) -> None:
        self.concepts = {concept.name: index for index, concept in enumerate(renderings.concepts)}
        self._concept_index = np.array([index for index, _ in renderings.pairs])
        cells = np.stack([_cells(image) for image in renderings.images])
        self._colour = np.ascontiguousarray(cells[..., :3].transpose(0, 3, 1, 2)).reshape(len(cells), -1)
        self._cover = cells[..., 3].reshape(len(cells), -1)
        # |x|^2 of a rendering x = colour - cover * background is a polynomial in the background.
        parts = self._colour.reshape(len(cells), 3, -1)
        self._square = np.square(self._colour).sum(1)
        self._cross = np.einsum("nck,nk->nc", parts, self._cover)
        self._covered = np.square(self._cover).sum(1)

    def similarity(
        self, image: NDArray[np.uint8], box: Box, background: NDArray[np.floating]
    ) -> NDArray[np.float64]:
        """Return the similarity of a box's content to the nearest rendering of each concept, ``[K]``.

        With both as differences from the background, x and y, this is 2 x.y / (|x|^2 + |y|^2): 1 for equal
        images, 0 for images that have nothing in common.

        Args:
            image: uint8 ``[3, h, w]``.
            box: the part of the image that is compared.
            background: colour of the image's background, ``[3]`` in 0..255.
        """
        tone = (np.asarray(background, np.float32) / 255)[:, None, None]
        tries = np.stack([crop(image, tried) / np.float32(255) - tone for tried in _tried_boxes(box)])
        flat = tries.reshape(len(tries), -1)
        shade = (tries * tone).sum(1).reshape(len(tries), -1)
        product = self._colour @ flat.T - self._cover @ shade.T
        tone = tone[:, 0, 0]
        # White on white is all background: the constant below makes it similar to nothing.
        own = self._square - 2 * self._cross @ tone + self._covered * float(tone @ tone)
        similar = (2 * product / (own[:, None] + np.square(flat).sum(1) + 1e-6)).max(1)
        nearest = np.full(len(self.concepts), -np.inf)
        np.maximum.at(nearest, self._concept_index, similar)
        return nearest


def crop(image: NDArray[np.uint8], box: Box) -> NDArray[np.float32]:
    """Return a box with a margin: uint8 ``[3, h, w]`` -> float32 ``[3, CELLS, CELLS]`` in 0..255."""
    height, width = image.shape[1:]
    margin = round(PADDING * max(height, width))
    wide = np.pad(image, ((0, 0), (margin, margin), (margin, margin)), mode="edge").transpose(1, 2, 0)
    half = box.side / OBJECT_SHARE / 2
    left, right = (
        max(0.0, min(v * width + margin, width + 2 * margin)) for v in (box.x - half, box.x + half)
    )
    top, bottom = (
        max(0.0, min(v * height + margin, height + 2 * margin)) for v in (box.y - half, box.y + half)
    )
    padded = Image.fromarray(np.ascontiguousarray(wide))
    resized = padded.resize((CELLS, CELLS), Image.Resampling.BOX, box=(left, top, right, bottom))
    return np.asarray(resized, np.float32).transpose(2, 0, 1)


def _tried_boxes(box: Box) -> list[Box]:
    return [
        replace(box, x=box.x + across * box.side, y=box.y + down * box.side, side=box.side * size)
        for size in SIZES
        for across, down in SHIFTS
    ]


def _cells(rendering: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return a rendering as a crop shows it: premultiplied RGBA ``[CELLS, CELLS, 4]`` in 0..1."""
    side = rendering.shape[0]
    margin = round(side * (1 / OBJECT_SHARE - 1) / 2)
    framed = np.pad(np.asarray(rendering), ((margin, margin), (margin, margin), (0, 0)))
    small = Image.fromarray(framed).convert("RGBa").resize((CELLS, CELLS), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / np.float32(255)
