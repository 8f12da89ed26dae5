"""Pictures come in from anywhere, and go out with their record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fewstep
from fewstep import picture
from fewstep.types import UserError

RECORD = picture.Record(prompt="a cat", seed=1, steps=4, model="pocket", hash="ab", size=(8, 8))


def test_the_record_is_written_and_read(tmp_path: Path) -> None:
    fewstep.save(RECORD.stamp(Image.new("RGB", (8, 8))), tmp_path / "a.png")
    assert picture.read_record(tmp_path / "a.png") == RECORD
    assert picture.read_info(tmp_path / "a.png")[picture.PARAMETERS].startswith("a cat\nSteps: 4")


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.full((9, 9), 32896, np.uint16)),
        Image.fromarray(np.full((9, 9), 32896, np.int32)),
        Image.new("L", (9, 9), 128),
        Image.new("RGBA", (9, 9), (0, 0, 0, 127)),
        Image.new("P", (9, 9), 0),
    ],
    ids=["I;16", "I", "L", "RGBA", "P"],
)
def test_grey_is_grey_in_every_mode(image: Image.Image) -> None:
    if image.mode == "P":
        image.putpalette([128] * 3)
    if image.mode == "RGBA":
        assert picture.flat(image).getpixel((4, 4)) == (128, 128, 128)  # half black on white
    else:
        assert picture.flat(image).getpixel((4, 4)) == (128, 128, 128)


def test_what_is_transparent_is_white() -> None:
    assert picture.flat(Image.new("RGBA", (3, 3), (200, 0, 0, 0))).getpixel((1, 1)) == (255, 255, 255)


def test_broken_exif_is_passed_over(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "x.png", exif=b"garbage!garbage!")
    assert picture.flat(picture.open_image(tmp_path / "x.png")).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize(
    "change",
    [{"image": 5}, {"image": ["x"]}, {"seed": "1"}, {"seed": True}, {"size": "ab"}, {"version": 5},
     {"new": 1}, {"guidance": "much"}, {"prompt": None}],
)  # fmt: skip
def test_a_record_that_is_none_of_ours_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    image = Image.new("RGB", (8, 8))
    image.info[picture.CHUNK] = json.dumps({**json.loads(RECORD.json()), **change})
    picture.save(image, tmp_path / "a.png")
    with pytest.raises(UserError, match="not a single picture of this version"):
        picture.read_record(tmp_path / "a.png")
