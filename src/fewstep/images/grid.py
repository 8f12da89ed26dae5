"""Contact sheets: images on a grid, with labels under them or without."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewstep.core.types import UserError
from fewstep.images.io import MOST_SIDE, SUFFIXES

GAP = 6
"""Pixels between the images of a labelled sheet."""
FONT = 11
"""Height of the labels' font in pixels."""
LINES = 2
"""Lines of a label."""
BARE_GAP = 4
"""Pixels between the images of a sheet without labels."""
SHEET_PIXELS = 2 * 89_478_485
"""Most pixels of a sheet without labels: Pillow opens no larger image."""


def sheet(images: NDArray[np.uint8], labels: Sequence[str], columns: int) -> Image.Image:
    """Return a contact sheet with a label under each image, row by row.

    Args:
        images: uint8 ``[N, 3, h, w]``, N at least 1.
        labels: the text under each image, ``[N]``; cut to two lines of the image's width.
        columns: images in a row.

    Raises:
        ValueError: no images, a label count that differs, or no columns.
    """
    from PIL import ImageDraw, ImageFont

    count, _, height, width = images.shape
    if count == 0 or len(labels) != count or columns < 1:
        raise ValueError(f"{count} images, {len(labels)} labels and {columns} columns make no sheet")
    text = LINES * (FONT + 3)
    rows = -(-count // columns)
    cell = width + GAP, height + text + GAP
    page = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(FONT)
    letters = max(4, int(width / (FONT * 0.52)))
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = GAP + index % columns * cell[0], GAP + index // columns * cell[1]
        page.paste(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))), (x, y))
        lines = textwrap.wrap(label, letters, max_lines=LINES, placeholder=" ...")
        pen.multiline_text((x, y + height + 1), "\n".join(lines), fill="black", font=font, spacing=1)
    return page


def contact_sheet(images: Sequence[Image.Image]) -> Image.Image:
    """Return a white sheet of all images, which have one size, without labels (:func:`sheet_size`)."""
    columns = _columns(len(images))
    width, height = (side + BARE_GAP for side in images[0].size)
    sheet = Image.new("RGB", sheet_size(len(images), images[0].size), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (BARE_GAP + column * width, BARE_GAP + row * height))
    return sheet


def sheet_size(number: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return width and height of a sheet of ``number`` images without labels, as square as possible."""
    columns = _columns(number)
    rows = math.ceil(number / columns)
    return columns * (size[0] + BARE_GAP) + BARE_GAP, rows * (size[1] + BARE_GAP) + BARE_GAP


def check_sheet(number: int, size: tuple[int, int], suffix: str) -> None:
    """Refuse a contact sheet that is too large to write or to read, before its images are made.

    Raises:
        UserError: it is too large.
    """
    width, height = sheet_size(number, size)
    if width * height > SHEET_PIXELS or max(width, height) > MOST_SIDE[SUFFIXES[suffix.lower()]]:
        raise UserError(
            f"a sheet of {width} x {height} pixels is too large for {suffix}: generate fewer images"
        )


def _columns(number: int) -> int:
    return math.ceil(math.sqrt(number))
