"""Pictures come in from anywhere, and go out with their record."""

from __future__ import annotations

import dataclasses
import json
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import fewstep
from fewstep.core.types import UserError
from fewstep.images import io as image_io
from fewstep.images.decode import decode, to_rgb
from fewstep.images.grid import check_sheet, contact_sheet, sheet_size
from fewstep.images.metadata import CHUNK, PARAMETERS
from fewstep.images.record import SHEET, Record, RecordWarning, read_info, read_records

RECORD = Record(prompt="a cat", seed=1, steps=4, model="pocket", hash="ab", size=(8, 8))


def test_the_record_is_written_and_read(tmp_path: Path) -> None:
    fewstep.save(RECORD.stamp(Image.new("RGB", (8, 8))), tmp_path / "a.png")
    assert read_records(tmp_path / "a.png") == [RECORD]
    assert read_info(tmp_path / "a.png")[PARAMETERS].startswith("a cat\nSteps: 4")


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
        assert to_rgb(image).getpixel((4, 4)) == (128, 128, 128)  # half black on white
    else:
        assert to_rgb(image).getpixel((4, 4)) == (128, 128, 128)


def test_what_is_transparent_is_white() -> None:
    assert to_rgb(Image.new("RGBA", (3, 3), (200, 0, 0, 0))).getpixel((1, 1)) == (255, 255, 255)


def test_broken_exif_is_passed_over(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "x.png", exif=b"garbage!garbage!")
    assert to_rgb(image_io.open_image(tmp_path / "x.png")).getpixel((3, 3)) == (255, 0, 0)


def with_record(path: Path, facts: Any) -> Path:
    """A file with these facts as the metadata of ours; text stands there as it is."""
    image = Image.new("RGB", (8, 8))
    image.info[CHUNK] = facts if isinstance(facts, str) else json.dumps(facts)
    image_io.save(image, path)
    return path


FACTS = json.loads(RECORD.json())


@pytest.mark.parametrize(
    "change",
    [{"image": 5}, {"image": ["x"]}, {"seed": "1"}, {"seed": True}, {"seed": 1.5}, {"size": "ab"},
     {"size": [1, 2, 3]}, {"version": 5}, {"guidance": [1.0]}, {"guidance": "much"},
     {"prompt": None}, {"batch": None}],
)  # fmt: skip
@pytest.mark.parametrize("suffix", image_io.SUFFIXES)
def test_a_record_that_is_none_of_ours_is_refused(
    tmp_path: Path, change: dict[str, Any], suffix: str
) -> None:
    path = with_record(tmp_path / f"a{suffix}", {**FACTS, **change})
    with pytest.raises(UserError, match=f"the metadata of .*damaged.*: {next(iter(change))}") as error:
        read_records(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "5", "null", "[" * 100_000, '{"a":' * 100_000, '{"seed": 1' + "0" * 5000 + "}", "{}",
     '{"seed": NaN}', '{"guidance": 1e999}',
     '{"sheet": 5}', '{"sheet": []}', '{"sheet": [5]}', '{"sheet": [{}]}', '{"sheet": {}}', "\0\x1b[31m"],
    ids=lambda text: text[:20],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_damaged_metadata_is_one_line(tmp_path: Path, text: str, suffix: str) -> None:
    path = with_record(tmp_path / f"a{suffix}", text)
    with pytest.raises(UserError, match=r"the metadata of .*damaged|has lost its metadata"):
        read_records(path)


def test_what_a_later_version_adds_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    path = with_record(tmp_path / "a.png", {**FACTS, "planet": "Mars"})
    with pytest.warns(RecordWarning, match="does not know, which is left out: planet"):
        assert read_records(path) == [RECORD]


def test_records_keep_paths_that_are_no_text(tmp_path: Path) -> None:
    record = dataclasses.replace(RECORD, model="caf\udce9", image="\udcff.png")
    for suffix in image_io.SUFFIXES:
        fewstep.save(record.stamp(Image.new("RGB", (8, 8))), tmp_path / f"a{suffix}")
        assert read_records(tmp_path / f"a{suffix}") == [record]


def test_a_sheet_has_the_records_of_its_images(tmp_path: Path) -> None:
    many = [dataclasses.replace(RECORD, seed=seed) for seed in range(5)]
    path = with_record(tmp_path / "a.webp", {SHEET: [json.loads(each.json()) for each in many]})
    assert read_records(path) == many


def test_a_sheet_shows_all_images() -> None:
    colours = ["red", "green", "blue", "black", "yellow"]
    sheet = contact_sheet([Image.new("RGB", (20, 10), colour) for colour in colours])
    assert sheet.size == sheet_size(5, (20, 10)) == (3 * 24 + 4, 2 * 14 + 4)
    for index, colour in enumerate(colours):
        row, column = divmod(index, 3)
        left, top = 4 + 24 * column, 4 + 14 * row
        assert set(sheet.crop((left, top, left + 20, top + 10)).get_flattened_data()) == {
            Image.new("RGB", (1, 1), colour).getpixel((0, 0))
        }


@pytest.mark.parametrize(
    ("number", "size", "suffix"),
    [(2**16, (1024, 1024), ".png"), (2, (40_000, 100), ".jpg"), (2, (9000, 100), ".WEBP")],
)
def test_a_sheet_that_no_format_holds_is_refused_before(
    number: int, size: tuple[int, int], suffix: str
) -> None:
    with pytest.raises(UserError, match="too large for"):
        check_sheet(number, size, suffix)
    check_sheet(4, (1024, 1024), suffix)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "I", "I;16", "F", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"]
)
@pytest.mark.parametrize("suffix", [*image_io.SUFFIXES, ".PNG", ".JpG"])
def test_every_mode_is_written_in_the_format_of_the_suffix(tmp_path: Path, mode: str, suffix: str) -> None:
    fewstep.save(RECORD.stamp(Image.new(mode, (8, 8))), str(tmp_path / f"a{suffix}"))
    with Image.open(tmp_path / f"a{suffix}") as image:
        image.load()
        assert image.format == image_io.SUFFIXES[suffix.lower()]
    assert read_records(tmp_path / f"a{suffix}") == [RECORD]


def test_an_image_that_was_opened_keeps_its_record_in_another_format(tmp_path: Path) -> None:
    fewstep.save(RECORD.stamp(Image.new("RGB", (8, 8))), tmp_path / "a.png")
    for before, after in (("a.png", "b.jpg"), ("b.jpg", "c.webp"), ("c.webp", "d.png")):
        with Image.open(tmp_path / before) as image:
            fewstep.save(image, tmp_path / after)
        assert read_info(tmp_path / after) == read_info(tmp_path / "a.png")


def test_png_and_webp_keep_all_pixels_and_jpeg_nearly() -> None:
    rng = np.random.default_rng(0)
    smooth = np.repeat(np.repeat(rng.integers(0, 256, (4, 4, 3), np.uint8), 16, 0), 16, 1)
    for suffix, most in {".png": 0, ".webp": 0, ".jpg": 30}.items():
        back = decode(image_io.encode(Image.fromarray(smooth), Path(f"a{suffix}")), "a").convert("RGB")
        assert np.abs(np.asarray(back, int) - smooth.astype(int)).max() <= most


@pytest.mark.parametrize("name", ["a.bmp", "a", "a.png.txt", ".png", "a.gif", "a.tif", "a.jp2", ""])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"images are written as \.png, \.jpg, \.jpeg or \.webp"):
        fewstep.save(Image.new("RGB", (8, 8)), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", image_io.SUFFIXES)
def test_what_cannot_be_encoded_leaves_what_was_there(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"earlier")
    with pytest.raises(UserError, match="cannot write"):
        fewstep.save(Image.new("RGB", (0, 5)), path)
    assert path.read_bytes() == b"earlier" and len(list(tmp_path.iterdir())) == 1


ENTRY = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def a1111(text: str) -> dict[str, str]:
    """What AUTOMATIC1111's web UI reads in ``parameters`` (its parse_generation_parameters)."""
    *lines, last = text.strip().split("\n")
    if len(ENTRY.findall(last)) < 3:
        lines.append(last)
        last = ""
    prompt, negative, done = "", "", False
    for line in lines:
        line = line.strip()
        if line.startswith("Negative prompt:"):
            done, line = True, line[16:].strip()
        if done:
            negative += ("" if negative == "" else "\n") + line
        else:
            prompt += ("" if prompt == "" else "\n") + line
    found = {"Prompt": prompt, "Negative prompt": negative}
    for name, value in ENTRY.findall(last):
        found[name] = json.loads(value) if value[:1] == value[-1:] == '"' else value
    return found


SIGNS = st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"])
WORDS = st.lists(
    st.sampled_from(["Negative prompt:", "Steps: 9,", "Seed: 2", "Model:", '"', ",", ":", "\\", "a cat"])
    | st.text(SIGNS, max_size=9),
    min_size=1,
    max_size=9,
)
PROMPT = WORDS.map(lambda words: " ".join(" ".join(words).split())).filter(bool)
MODEL = WORDS.map(" ".join).filter(bool) | st.text(min_size=1, max_size=20).filter(
    lambda text: not any("\ud800" <= sign <= "\udfff" for sign in text)
)


@given(prompt=PROMPT, negative=st.none() | PROMPT, model=MODEL, guidance=st.none() | st.floats(0, 100))
@example(prompt="Negative prompt: a cat", negative=None, model="a", guidance=None)
@example(prompt="Steps: 9, Seed: 2, Size: 1x1", negative=None, model="a", guidance=None)
@example(prompt="a", negative="Negative prompt: b", model='my "best", v2: Steps: 9\nSeed: 3', guidance=4.5)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_other_programs_read_the_parameters(
    prompt: str, negative: str | None, model: str, guidance: float | None
) -> None:
    record = dataclasses.replace(RECORD, prompt=prompt, negative=negative, model=model, guidance=guidance)
    found = a1111(record.parameters())
    expected = prompt
    if prompt.startswith("Negative prompt:"):
        expected = f"n{prompt[1:]}"
    assert found["Prompt"] == expected.strip()
    assert found["Model"] == model
    assert (found["Steps"], found["Seed"], found["Size"], found["Model hash"]) == ("4", "1", "8x8", "ab")
    assert float(found["CFG scale"]) == (1 if guidance is None else guidance)
    if negative is not None:
        assert found["Negative prompt"] == negative.strip()


@pytest.mark.parametrize("image", [[1], None, b"x", "a.png", np.zeros((2, 2, 3), np.uint8)])
def test_save_refuses_what_is_no_image(tmp_path: Path, image: Any) -> None:
    with pytest.raises(UserError, match=f"save takes a Pillow image, not {type(image).__name__}"):
        image_io.save(image, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [BytesIO(), 3, None, b"x.png", ["x.png"]])
def test_save_refuses_what_is_no_path(path: Any) -> None:
    with pytest.raises(UserError, match=f"save takes a path to write to, not {type(path).__name__}"):
        image_io.save(Image.new("RGB", (2, 2)), path)


def test_save_refuses_a_zero_byte(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*null byte"):
        image_io.save(Image.new("RGB", (2, 2)), tmp_path / "a\0.png")
