from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from at_once import WAYS, draw_at_once
from fewstep.core.types import UserError
from fewstep.images.record import Record
from fewstep.pipeline.filenames import FilenamePattern, names, numbered, slug
from tiny_bundle import write_bundle

RECORD = Record("A Red/Apple, 3D style!", 7, 4, "org/name", "", (8, 8))
IMAGE = Image.new("RGB", (8, 8))
LONG = Record("字" * 300, 2**32 - 1, 4, "𠀀" * 300, "", (8, 8))


def save(name: FilenamePattern, index: int = 1, record: Record = RECORD) -> Path:
    """Where an image was written, which is there."""
    path = name.save(IMAGE, index, record)
    assert path.is_file()
    return path


@pytest.mark.parametrize(
    ("output", "images", "expected"),
    [
        (None, 1, "a-red-apple-3d-style-7.png"),
        ("out/", 1, "out/a-red-apple-3d-style-7.png"),
        ("out", 9, "out/a-red-apple-3d-style-7.png"),
        ("x.png", 1, "x.png"),
        ("x.PNG", 2, "x-3.PNG"),
        ("x.jpg", 1, "x.jpg"),
        ("x.JPEG", 2, "x-3.JPEG"),
        ("{seed}/{index:03d}-{prompt}-{model}-{steps}.png", 2, "7/003-a-red-apple-3d-style-org-name-4.png"),
        ("{seed}.webp", 1, "7.webp"),
    ],
)
def test_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str | None, images: int, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert save(names(output, images), 3) == Path(expected)


def test_taken_names_are_numbered_but_for_the_exact_file(tmp_path: Path) -> None:
    for expected in ("", "-2", "-3"):
        path = save(names(str(tmp_path / "{prompt}.png"), 1))
        assert path.name == f"a-red-apple-3d-style{expected}.png"
    exact = names(str(tmp_path / "x.png"), 1)
    assert save(exact).name == save(exact).name == "x.png"


def test_a_name_that_is_taken_in_the_last_moment_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def race(source: str, target: Path, **options: bool) -> None:
        monkeypatch.setattr(os, "link", link)
        target.write_text("another process's")
        link(source, target, **options)

    monkeypatch.setattr(os, "link", race)
    assert save(names(str(tmp_path / "{seed}.png"), 1)).name == "7-2.png"
    assert (tmp_path / "7.png").read_text() == "another process's"


def test_many_images_of_one_name_take_linear_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = 0
    lexists = os.path.lexists

    def count(path: Path) -> bool:
        nonlocal looked
        looked += 1
        return lexists(path)

    for number in range(1, 501):
        (tmp_path / ("7.png" if number == 1 else f"7-{number}.png")).touch()
    monkeypatch.setattr(os.path, "lexists", count)
    name = names(str(tmp_path / "{seed}.png"), 1)
    assert [save(name).name for _ in range(100)] == [f"7-{number}.png" for number in range(501, 601)]
    assert looked <= 700


@pytest.mark.parametrize("way", WAYS)
def test_processes_at_once_leave_an_image_each(
    way: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """``python tests/helpers/at_once.py 100 20`` is the same with many more."""
    bundle = write_bundle(tmp_path_factory.mktemp("bundles") / "tiny").folder
    left = draw_at_once(tmp_path, str(bundle), way, number=4, alive=4)
    assert left.whole(4), left


@pytest.mark.parametrize(
    "output",
    ["x.bmp", "x.tar.gz", "x.jp2", "{x}.png", "{}.png", "{seed.png", "{seed:!}.png", "{seed}.gif", "{seed}",
     "字" * 90 + ".png", "字" * 90, "{seed}" + "字" * 90 + ".png", "a/" * 3000 + "x.png"],
)  # fmt: skip
def test_bad_outputs(output: str) -> None:
    with pytest.raises(UserError):
        names(output, 1)


def test_slugs_are_safe_names() -> None:
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("!!!") == "picture"
    assert slug("a\udcff\x1b\nb") == "a-b"
    assert len(slug("word " * 1000)) <= 60


@pytest.mark.parametrize(
    ("output", "end"),
    [
        ("", "-4294967295"),
        ("{prompt}-{model}-{seed}.png", "-4294967295"),
        ("{index:09}{prompt}{prompt}{prompt}{prompt}.jpg", "字"),
        ("x" * 200 + "{model}.webp", "𠀀"),
    ],
)
def test_long_names_are_cut_to_bytes_and_keep_what_tells_them_apart(
    output: str, end: str, tmp_path: Path
) -> None:
    name = names(str(tmp_path / output), 1)
    made = [save(name, 1, LONG) for _ in range(12)]
    assert len(set(made)) == len(list(tmp_path.iterdir())) == 12
    assert all(len(os.fsencode(path.name)) <= 255 for path in made)
    assert made[0].stem.endswith(end) and made[11].stem.endswith("-12")


def test_the_numbers_of_a_long_exact_name_fit(tmp_path: Path) -> None:
    output = tmp_path / ("字" * 83 + ".png")
    made = [save(names(str(output), 12), index) for index in range(1, 13)]
    assert len(set(made)) == 12 and all(path.stem.startswith("字" * 80) for path in made)


STEMS = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=300)


@given(STEMS, st.integers(2, 10**9))
def test_numbered_names_fit_and_tell_numbers_apart(stem: str, number: int) -> None:
    path = numbered(Path(f"{stem}.png"), number)
    assert len(os.fsencode(path.name)) <= 255 and path.name.endswith(f"-{number}.png")


def test_a_link_stays_and_what_it_points_at_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old.png").touch()
    for link, target in {
        "one.png": "disk/old.png",
        "dangling.jpg": "disk/new/x.jpg",
        "first.webp": "second.webp",
        "second.webp": "disk/y.webp",
        "folder": "disk/images",
    }.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    for output in ("one.png", "dangling.jpg", "first.webp", "folder/", "folder"):
        save(names(str(tmp_path / output), 1))
        assert (tmp_path / output).is_symlink() or output == "folder/"
    assert all((tmp_path / link).is_symlink() for link in ("one.png", "second.webp", "folder"))
    with Image.open(tmp_path / "disk" / "old.png") as image:
        assert image.size == (8, 8)
    assert {path.suffix for path in (tmp_path / "disk").rglob("*.*")} == {".png", ".jpg", ".webp"}
    assert len(list((tmp_path / "disk" / "images").iterdir())) == 2


def test_a_free_name_is_never_that_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "7.png").symlink_to("nowhere.png")
    assert save(names(str(tmp_path / "{seed}.png"), 1)).name == "7-2.png"
    assert not (tmp_path / "nowhere.png").exists()


@pytest.mark.parametrize("output", ["loop.png", "loop.png/", "loop.png/x.png", "loop.png/{seed}.png"])
def test_a_loop_of_links_is_one_line(output: str, tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to("other.png")
    (tmp_path / "other.png").symlink_to("loop.png")
    with pytest.raises(UserError, match="cannot"):
        names(str(tmp_path / output), 1).save(IMAGE, 1, RECORD)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("output", ["", " ", "\t", ".png", ".JPG", "a/ ", "a/.webp", " .png", "a/ .jpeg"])
@pytest.mark.parametrize("images", [1, 2])
def test_a_name_that_is_missing_is_said(output: str, images: int) -> None:
    with pytest.raises(UserError, match="a name is missing in -o"):
        names(output, images)


def test_an_odd_name_that_is_there_or_said_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (".png", " "):
        Path(folder).mkdir()
        assert names(folder, 1).make(1, RECORD).parent == Path(folder)
    for folder in (".webp/", ".", "..", ".hidden", "/"):
        assert names(folder, 1).make(1, RECORD).parent == Path(folder)


@pytest.mark.parametrize("output", ["loop", "loop/", "loop/x.png", "loop/y/x.png", "loop.png"])
def test_a_loop_of_links_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("loop", "loop.png"):
        Path(name).symlink_to(f"other-{name}")
        Path(f"other-{name}").symlink_to(name)
    with pytest.raises(UserError, match=r"cannot .* loop.*: it is a loop of links"):
        names(output, 1).save(Image.new("RGB", (2, 2)), 1, RECORD)
    assert len(list(tmp_path.iterdir())) == 4
