"""What a thing in a picture looks like: compared with all renderings, coarsely, as one sees from afar.

Features of a net trained on photographs read the soft strokes of a small model as another thing: of 20 single
things, most of which the eye could name, they put 2 among the first three concepts, this puts 18. So what is
cut out is compared as GRID x GRID means of colour, over the picture's own background, at a few places and
sizes. It is blind to finer detail.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewstep.pocket.render import Renderings

GRID = 16
"""Cells either way of what is compared."""

FILLED = 0.855
"""Share of a cut's side that its thing fills; the rest is background, which tells its outline."""

SIZES = (0.92, 1.0, 1.08)
PLACES = ((0.0, 0.0), (0.04, 0.0), (-0.04, 0.0), (0.0, 0.04), (0.0, -0.04))
"""Boxes are tried at these sizes and these shifts, in units of their side; the likest counts."""

RIM = 1.0
"""How far a picture's border goes on beyond it, in units of its side: boxes may reach over."""


@dataclass(frozen=True)
class Box:
    """A square around a thing: its centre from the left and the top and its side, in units of the picture's;
    ``heat`` is how sure it is that there is a thing, 0..1."""

    x: float
    y: float
    side: float
    heat: float


class TemplateBank:
    """All renderings, ready to be compared with.

    Attributes:
        concepts: name -> place in a likeness.
    """

    def __init__(self, renderings: Renderings) -> None:
        self.concepts = {concept.name: place for place, concept in enumerate(renderings.concepts)}
        self._at = np.array([index for index, _ in renderings.pairs])
        cells = np.stack([_cells(picture) for picture in renderings.images])
        self._colour = np.ascontiguousarray(cells[..., :3].transpose(0, 3, 1, 2)).reshape(len(cells), -1)
        self._cover = cells[..., 3].reshape(len(cells), -1)
        # |x|^2 of a rendering x = colour - cover * ground is a polynomial in the ground.
        parts = self._colour.reshape(len(cells), 3, -1)
        self._square = np.square(self._colour).sum(1)
        self._cross = np.einsum("nck,nk->nc", parts, self._cover)
        self._covered = np.square(self._cover).sum(1)

    def likeness(
        self, image: NDArray[np.uint8], box: Box, ground: NDArray[np.floating]
    ) -> NDArray[np.float64]:
        """How like the box's content is to the likest rendering of each concept, ``[K]``.

        With both as differences from the background, x and y, this is 2 x.y / (|x|^2 + |y|^2): 1 for the
        same, 0 for what has nothing in common.

        Args:
            image: uint8 ``[3, h, w]``.
            box: where.
            ground: colour of the picture's background, 0..255, ``[3]``.
        """
        tone = (np.asarray(ground, np.float32) / 255)[:, None, None]
        tries = np.stack([cut(image, moved) / np.float32(255) - tone for moved in _around(box)])
        flat = tries.reshape(len(tries), -1)
        shade = (tries * tone).sum(1).reshape(len(tries), -1)
        product = self._colour @ flat.T - self._cover @ shade.T
        tone = tone[:, 0, 0]
        # What is all background, as white things on white are, is like nothing.
        own = self._square - 2 * self._cross @ tone + self._covered * float(tone @ tone)
        alike = (2 * product / (own[:, None] + np.square(flat).sum(1) + 1e-6)).max(1)
        found = np.full(len(self.concepts), -np.inf)
        np.maximum.at(found, self._at, alike)
        return found


def cut(image: NDArray[np.uint8], box: Box) -> NDArray[np.float32]:
    """What a box holds, with some background around: uint8 ``[3, h, w]`` -> ``[3, GRID, GRID]`` in 0..255."""
    height, width = image.shape[1:]
    rim = round(RIM * max(height, width))
    wide = np.pad(image, ((0, 0), (rim, rim), (rim, rim)), mode="edge").transpose(1, 2, 0)
    half = box.side / FILLED / 2
    left, right = (max(0.0, min(v * width + rim, width + 2 * rim)) for v in (box.x - half, box.x + half))
    top, bottom = (max(0.0, min(v * height + rim, height + 2 * rim)) for v in (box.y - half, box.y + half))
    picture = Image.fromarray(np.ascontiguousarray(wide))
    fitted = picture.resize((GRID, GRID), Image.Resampling.BOX, box=(left, top, right, bottom))
    return np.asarray(fitted, np.float32).transpose(2, 0, 1)


def _around(box: Box) -> list[Box]:
    return [
        replace(box, x=box.x + across * box.side, y=box.y + down * box.side, side=box.side * size)
        for size in SIZES
        for across, down in PLACES
    ]


def _cells(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A rendering as a cut would show it: premultiplied RGBA ``[GRID, GRID, 4]`` in 0..1."""
    side = picture.shape[0]
    rim = round(side * (1 / FILLED - 1) / 2)
    framed = np.pad(np.asarray(picture), ((rim, rim), (rim, rim), (0, 0)))
    small = Image.fromarray(framed).convert("RGBa").resize((GRID, GRID), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / np.float32(255)
