"""The scene detector: boxes of objects, the concepts they look like, and the colour of the background.

A small net (``models/scene-detector``, made by ``fewstep train scene-detector``) finds boxes of any class.
`TemplateBank` compares each box with all renderings. Neither has seen a generated image.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray
from PIL import Image

from fewstep.core import json_io
from fewstep.core.cpu import cores
from fewstep.core.types import UserError
from fewstep.pocket.captions import COLOURS
from fewstep.pocket.template_matching import Box, TemplateBank
from fewstep.runtime.external_data import external_files
from fewstep.runtime.ort import Graph

GRAPH, CONFIG = "detector.onnx", "detector.json"
BATCH = 16
"""Images per call of the net; more only costs memory."""

THRESHOLD = 0.3
"""Heat in 0..1 from which a peak is an object; GenEval's threshold of its detector."""

MAX_IOU = 0.4
"""Intersection over union of two boxes from which the weaker one is suppressed."""

BORDER = 0.04
"""Width of the border that shows the background, in units of the image's side."""


@dataclass(frozen=True)
class _Config:
    """The shape of ``detector.json``: the side of the net's images, pixels."""

    size: Annotated[int, Meta(ge=1, le=4096)]


@dataclass(frozen=True)
class Detection:
    """A box and the similarity of its content to each concept, ``[K]``, at most 1."""

    box: Box
    similarity: NDArray[np.float64]

    def rank(self, concept: int) -> int:
        """Return the number of concepts that are more similar than the one with index ``concept``."""
        return int((self.similarity > self.similarity[concept]).sum())


class BoxDetector:
    """The net in ``folder``: images to boxes.

    Attributes:
        name: of the folder, with a digest of the weights.

    Raises:
        UserError: there is none, it is damaged, or it reads weights from another file.
    """

    def __init__(self, folder: Path) -> None:
        check(folder)
        config, graph = folder / CONFIG, folder / GRAPH
        self._size = json_io.read(config, _Config).size
        for name in external_files(graph):
            raise UserError(f"{graph} reads the file {name[:80]!r}: all weights of a detector are in it")
        self.name = f"{folder.name}-{hashlib.sha256(graph.read_bytes()).hexdigest()[:8]}"
        self._graph = Graph(graph, cores(), convolutions=True)

    def __call__(self, images: NDArray[np.uint8]) -> list[list[Box]]:
        """Return the boxes in each image, the most confident first; uint8 ``[N, 3, h, w]``, any size."""
        found: list[list[Box]] = []
        for at in range(0, len(images), BATCH):
            heat, box = self._graph(images=_resized(images[at : at + BATCH], self._size))
            found += [_boxes(*maps) for maps in zip(heat[:, 0], box, strict=True)]
        return found


def check(folder: Path) -> None:
    """Refuse a folder that holds no detector.

    Raises:
        UserError: it holds none.
    """
    if not ((folder / CONFIG).is_file() and (folder / GRAPH).is_file()):
        raise UserError(
            f"{folder} holds no detector of scenes; name one with --detector, make one with "
            "fewstep train scene-detector, or leave scenes out with --scenes 0"
        )


class Detector:
    """Finds the objects in images and compares each with all renderings.

    Attributes:
        name: of the box detector.
        concepts: name -> index in a similarity.
    """

    def __init__(self, boxes: BoxDetector, templates: TemplateBank) -> None:
        self.name, self.concepts = boxes.name, templates.concepts
        self._boxes, self._templates = boxes, templates

    def __call__(self, images: NDArray[np.uint8]) -> list[list[Detection]]:
        """Return the objects in each image, the most confident first; uint8 ``[N, 3, h, w]`` RGB."""
        return [
            [Detection(box, self._templates.similarity(image, box, border_colour(image))) for box in boxes]
            for image, boxes in zip(images, self._boxes(images), strict=True)
        ]


def border_colour(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the background's colour, ``[3]`` in 0..255: the median of the border of uint8 ``[3, h, w]``."""
    width = max(1, round(BORDER * min(image.shape[1:])))
    ring = np.ones(image.shape[1:], bool)
    ring[width:-width, width:-width] = False
    return np.median(image[:, ring], axis=1)


def background_name(image: NDArray[np.uint8]) -> str:
    """Return the name in ``COLOURS`` that is nearest to the background of uint8 ``[3, h, w]``.

    The distance is Euclidean in CIE L*a*b* (1976), where equal distances look about equally large.
    """
    names = list(COLOURS)
    known = lab(np.array([COLOURS[name] for name in names]))
    return names[int(np.linalg.norm(known - lab(border_colour(image)[None]), axis=1).argmin())]


def lab(colours: NDArray[np.generic]) -> NDArray[np.float64]:
    """Convert sRGB 0..255 ``[N, 3]`` to CIE L*a*b* under D65 (IEC 61966-2-1, CIE 15)."""
    c = np.asarray(colours, np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def _resized(images: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    if images.shape[2:] == (size, size):
        return images.astype(np.float32)
    resized = [
        Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        for image in images
    ]
    return np.stack([np.asarray(image, np.float32).transpose(2, 0, 1) for image in resized])


def _boxes(heat: NDArray[np.float32], box: NDArray[np.float32]) -> list[Box]:
    """Return the boxes of one image from its maps ``[H, W]`` and ``[3, H, W]``: non-maximum suppression."""
    side = heat.shape[0]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(heat, 1, constant_values=-1.0), (3, 3))
    rows, columns = np.nonzero((heat >= THRESHOLD) & (heat >= windows.max((2, 3))))
    found: list[Box] = []
    for row, column in sorted(zip(rows, columns, strict=True), key=lambda cell: -heat[cell]):
        dx, dy, size = (float(value) for value in box[:, row, column])
        x, y = (float(column) + 0.5 + dx) / side, (float(row) + 0.5 + dy) / side
        peak = Box(x, y, float(np.exp(size)), float(heat[row, column]))
        if all(_iou(peak, other) < MAX_IOU for other in found):
            found.append(peak)
    return found


def _iou(a: Box, b: Box) -> float:
    """Return the intersection over union of two squares."""
    wide, high = (
        max(0.0, min(p + a.side / 2, q + b.side / 2) - max(p - a.side / 2, q - b.side / 2))
        for p, q in ((a.x, b.x), (a.y, b.y))
    )
    return wide * high / (a.side**2 + b.side**2 - wide * high)
