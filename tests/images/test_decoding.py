"""Image files of strangers: only the formats that are meant, no program started, one line, little memory."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fewstep
from fewstep.cli import app as cli
from fewstep.core.types import UserError
from fewstep.data import image_folder, shards
from fewstep.images import io as image_io
from fewstep.images.decode import decode, to_rgb
from fewstep.images.metadata import PARAMETERS
from fewstep.images.record import read_info

pytestmark = pytest.mark.slow(10)

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(canary) print\nshowpage\n%%EOF\n"
WMF = struct.pack("<IHhhhhHIH", 0x9AC6CDD7, 0, 0, 0, 100, 100, 72, 0, 0) + b"\x01\0\x09\0" + bytes(64)
HOSTILE = {
    "EPS": EPS,
    "DOS EPS": struct.pack("<II", 0xC6D3D0C5, 30) + struct.pack("<I", len(EPS)) + bytes(18) + EPS,
    "PostScript": EPS.replace(b" EPSF-3.0", b""),
    "PDF": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n",
    "WMF": WMF,
    "GRIB": b"GRIB\0\0\0\1" + bytes(64),
    "FITS": b"SIMPLE  =                    T".ljust(2880),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "text": b"no image at all",
    "nothing": b"",
}


def png(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def shard(path: Path, entries: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in entries.items():
            shards.add_file(tar, name, data)
    return path


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears as soon as a program of one of these names is started."""
    programs, sign = tmp_path / "programs", tmp_path / "canary"
    programs.mkdir()
    for name in ("gs", "gswin32c", "gswin64c", "djpeg", "netpbm", "ppmtogif", "convert"):
        (programs / name).write_text(f"#!/bin/sh\necho $0 $@ >> {sign}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    return sign


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "eps"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_image_of_ours_starts_nothing(
    tmp_path: Path, canary: Path, kind: str, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    file = tmp_path / f"a.{ending}"
    file.write_bytes(HOSTILE[kind])
    with pytest.raises(UserError, match=f"a.{ending} is not an image that can be read"):
        image_io.open_image(file)
    if ending != "eps":
        with pytest.raises(UserError, match=r"s\.tar: a is not an image that can be read"):
            list(shards.read(shard(tmp_path / "s.tar", {f"a.{ending}": HOSTILE[kind], "a.txt": b"a"})))
        (tmp_path / "in").mkdir()
        file.rename(tmp_path / "in" / file.name).with_suffix(".txt").write_text("a")
        with pytest.raises(UserError, match=f"a.{ending} is not an image that can be read"):
            image_folder.write_folder(tmp_path / "in", tmp_path / "out", 32, 10)
    assert not canary.exists()


def test_the_command_line_starts_nothing(
    tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(EPS)
    (tmp_path / "in/a.txt").write_text("a")
    for command in (
        ["generate", "a", "--image", str(tmp_path / "in/a.png"), "-o", str(tmp_path / "x.png")],
        ["generate", "--from", str(tmp_path / "in/a.png"), "-o", str(tmp_path / "x.png")],
        ["show", str(tmp_path / "in/a.png")],
        ["data", "folder", str(tmp_path / "in"), "-o", str(tmp_path / "out")],
    ):
        assert cli.run(command) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "a.png is not an image that can be read" in said
    assert not canary.exists() and not (tmp_path / "x.png").exists()


def test_images_are_opened_in_one_place() -> None:
    root = Path(fewstep.__file__).parent
    found = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "open"
        and isinstance(node.value, ast.Name) and node.value.id == "Image"
    ]  # fmt: skip
    assert {*found} == {"images/decode.py"}


SMALL = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "MPO"])
def test_formats_are_told_by_content_and_damage_is_one_line(tmp_path: Path, kind: str) -> None:
    data = png(SMALL, kind)
    file = tmp_path / "a.png"
    file.write_bytes(data)
    assert to_rgb(image_io.open_image(file)).size == (30, 40)
    rng = np.random.default_rng(1)
    for _ in range(40):
        broken = bytearray(data[: rng.integers(1, len(data))] if rng.random() < 0.5 else data)
        for at in rng.integers(0, len(broken), 6):
            broken[at] = rng.integers(256)
        try:
            to_rgb(decode(bytes(broken), "it"))
        except UserError as error:
            assert "\n" not in str(error)


def test_a_decoder_may_raise_what_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import PngImagePlugin

    for error in (struct.error("x"), EOFError(), zlib.error("x"), IndexError("x"), RuntimeError("x\ny")):

        def fails(self: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fails)
        with pytest.raises(UserError, match="it is not an image that can be read: "):
            decode(png(SMALL), "it")


def _levels(pixels: Any, kind: str = "TIFF", **options: Any) -> np.ndarray:
    """What an image's file of these pixels is as RGB: levels ``[h, w, 3]``."""
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    return np.asarray(to_rgb(decode(png(image, kind, **options), "it")), int)


RAMP = np.linspace(0, 1, 256).reshape(16, 16)


@pytest.mark.parametrize(
    ("pixels", "kind", "options"),
    [
        (RAMP.astype(np.float32), "TIFF", {}),
        ((RAMP * 255).round().astype(np.float32), "TIFF", {}),
        ((RAMP * 65535).round().astype(np.uint16), "TIFF", {}),
        ((RAMP * 65535).round().astype(np.uint16), "PNG", {}),
        ((RAMP * 65535).round().astype(np.int32), "TIFF", {}),
        ((RAMP * 255).round().astype(np.uint8), "TIFF", {}),
        ((1 - RAMP).astype(np.float32), "TIFF", {"tiffinfo": {262: 0}}),  # 0 is white
    ],
)
def test_a_ramp_is_a_ramp_in_every_depth(pixels: np.ndarray, kind: str, options: dict[str, Any]) -> None:
    levels = _levels(pixels, kind, **options)
    assert np.abs(levels - (RAMP * 255)[..., None]).max() <= 0.5 + 1e-3


def test_twelve_bits_are_twelve_bits(tmp_path: Path) -> None:
    """Pillow writes none, so the file is made by hand: two pixels, black and white."""
    tags = [(256, 3, 2), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    tags += [(278, 3, 1), (279, 4, 3)]
    ifd = struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, at) for tag, kind, at in tags
    )
    data = b"II*\0" + struct.pack("<I", 12) + b"\x00\x0f\xff\x00" + ifd + bytes(4)
    levels = np.asarray(to_rgb(decode(data, "it")))
    assert levels[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize(
    "pixels",
    [
        np.full((4, 4), np.nan, np.float32),
        np.full((4, 4), np.inf, np.float32),
        np.array([[0.1, 17.3]], np.float32),
        np.array([[-3, 0.5]], np.float32),
        np.array([[0, 300]], np.float32),
        np.array([[0, 200]], np.int32),
        np.array([[0, 70_000]], np.int32),
        np.array([[-5, 70]], np.int32),
    ],
    ids=str,
)
def test_pixels_of_an_unclear_range_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"its pixels are .* from .* to .*; save it with 8"):
        _levels(pixels)


def test_other_colours_are_right_or_refused() -> None:
    assert _levels(Image.new("CMYK", (2, 2), (0, 255, 255, 0)))[0, 0].tolist() == [255, 0, 0]
    assert _levels(Image.new("1", (2, 2), 1))[0, 0].tolist() == [255] * 3
    assert _levels(Image.new("LA", (2, 2), (0, 0)), "PNG")[0, 0].tolist() == [255] * 3
    clear = Image.new("P", (2, 2), 1)
    clear.putpalette([9, 9, 9, 200, 0, 0])
    assert _levels(clear, "PNG")[0, 0].tolist() == [200, 0, 0]
    assert _levels(clear, "PNG", transparency=1)[0, 0].tolist() == [255] * 3
    grey = np.array([[5, 40_000]], np.uint16)
    assert _levels(grey, "PNG", transparency=5)[0, :, 0].tolist() == [255, round(40_000 / 257)]
    with pytest.raises(UserError, match="its colours are LAB"):
        to_rgb(Image.new("LAB", (2, 2)))


def test_images_in_parts_are_those_in_one() -> None:
    rng = np.random.default_rng(2)
    image = Image.fromarray(rng.integers(0, 256, (1100, 4200, 4), dtype=np.uint8))
    whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(whole))


def _bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says it is that large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def test_large_images_are_refused_by_their_declared_size() -> None:
    with pytest.raises(UserError, match=r"it has 81 megapixels \(9000 x 9000\), and at most 67 are read"):
        decode(_bomb(9000, 9000), "it")
    with pytest.raises(UserError, match="it is not an image that can be read"):
        decode(_bomb(60_000, 60_000), "it")


def test_a_large_contact_sheet_still_tells_how_it_was_made(tmp_path: Path) -> None:
    sheet = Image.new("L", (9000, 8000))
    sheet.info[PARAMETERS] = "a cat\nSteps: 4"
    image_io.save(sheet, tmp_path / "a.png")
    assert read_info(tmp_path / "a.png") == {PARAMETERS: "a cat\nSteps: 4"}
    with pytest.raises(UserError, match="it has 72 megapixels"):
        decode((tmp_path / "a.png").read_bytes(), "it")


def test_a_large_jpeg_is_halved_and_a_progressive_one_refused() -> None:
    large = Image.new("L", (10_000, 8_000), 90)
    assert decode(png(large, "JPEG"), "it").size == (5_000, 4_000)
    with pytest.raises(UserError, match="it has 80 megapixels"):
        decode(png(large, "JPEG", progressive=True), "it")


def test_a_file_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_io, "MOST_BYTES", 2**20)
    with pytest.raises(UserError, match="/dev/zero is not an image that can be read: it has more than 1 MiB"):
        image_io.read("/dev/zero")


MEASURE = """
import re, sys
from fewstep.images.io import open_image
from fewstep.images.pixels import center_crop_resize
center_crop_resize(open_image(sys.argv[1]), (128, 128))
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="only there /proc tells; ru_maxrss has the parent's peak in it"
)
@pytest.mark.parametrize(
    ("kind", "mode", "size", "most"),
    [("PNG", "RGBA", (8192, 8192), 1024), ("JPEG", "RGB", (8660, 5773), 500)],
    ids=["the largest PNG", "a camera's 50 megapixels"],
)
def test_peak_memory_in_mib(tmp_path: Path, kind: str, mode: str, size: tuple[int, int], most: int) -> None:
    exif = Image.Exif()
    exif[274] = 6  # to be turned
    file = tmp_path / "a.img"
    options = {"compress_level": 1} if kind == "PNG" else {}
    file.write_bytes(png(Image.new(mode, size, (200, 100, 50, 128)[: len(mode)]), kind, exif=exif, **options))
    done = subprocess.run([sys.executable, "-c", MEASURE, file], capture_output=True, text=True, check=True)
    assert int(done.stdout) / 1024 < most


def test_of_a_broken_tiff_nothing_else_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(png(SMALL.convert("1"), "TIFF", compression="group4"))
    file = tmp_path / "a.tif"
    file.write_bytes(data.replace(data[8:40], bytes(range(200, 232))))
    with contextlib.suppress(UserError):
        image_io.open_image(file)
    print("still there", file=sys.stderr)
    assert capfd.readouterr().err == "still there\n"
