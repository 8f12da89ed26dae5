"""Contact sheets hold every picture, unchanged, where it belongs."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.images.grid import FONT, GAP, LINES, sheet


def test_pictures_are_where_they_belong() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 20, 30), np.uint8)
    page = sheet(images, ["a", "b " * 80, "", "文字 🍎", "e"], columns=2)
    cell = 30 + GAP, 20 + GAP + LINES * (FONT + 3)
    assert page.size == (2 * cell[0] + GAP, 3 * cell[1] + GAP)
    array = np.asarray(page).transpose(2, 0, 1)
    for index, image in enumerate(images):
        x, y = GAP + index % 2 * cell[0], GAP + index // 2 * cell[1]
        assert np.array_equal(array[:, y : y + 20, x : x + 30], image)


@pytest.mark.parametrize(("count", "labels", "columns"), [(0, 0, 1), (2, 1, 1), (1, 1, 0)])
def test_refuses(count: int, labels: int, columns: int) -> None:
    with pytest.raises(ValueError, match="make no sheet"):
        sheet(np.zeros((count, 3, 4, 4), np.uint8), [""] * labels, columns)
