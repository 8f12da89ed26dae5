"""Contact sheets: pictures on a grid, each with a line or two of text under it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

GAP = 6
FONT = 11
LINES = 2


def sheet(images: NDArray[np.uint8], labels: Sequence[str], columns: int) -> Image:
    """A contact sheet, row by row.

    Args:
        images: uint8 ``[N, 3, h, w]``, N at least 1.
        labels: the text under each picture, ``[N]``; cut to two lines of the picture's width.
        columns: pictures in a row.

    Raises:
        ValueError: no pictures, a label count that differs, or no columns.
    """
    from PIL import Image, ImageDraw, ImageFont

    count, _, height, width = images.shape
    if count == 0 or len(labels) != count or columns < 1:
        raise ValueError(f"{count} pictures, {len(labels)} labels and {columns} columns make no sheet")
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
