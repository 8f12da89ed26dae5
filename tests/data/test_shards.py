"""Shards: whole or refused, the same whoever wrote them, and somebody else's pictures too."""

from __future__ import annotations

import json
import resource
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.cli import app as cli
from fewstep.core.types import UserError
from fewstep.data import image_folder, shards
from fewstep.pocket import stickers, write_shards
from fewstep.pocket.compose import Composer
from fewstep.pocket.concepts import Concept, held_out, held_out_scene
from fewstep.pocket.render import Renderings


def renderings() -> Renderings:
    """Coloured discs, enough of them that both sides of the held-out split have some."""
    concepts = [
        Concept(f"disc {i}", (f"dot {i}",), ("round",), f"{i:x}", "test", ("3d", "flat")) for i in range(30)
    ]
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    inside = (x**2 + y**2 < 0.9).astype(np.uint8)
    pairs = [(i, style) for i in range(30) for style in ("3d", "flat")]
    pictures = np.stack(
        [np.stack([inside * c for c in (7 * k % 255, 90, 200, 255)], -1) for k in range(len(pairs))]
    )
    return Renderings(concepts, pairs, pictures.astype(np.uint8))


def test_shards_do_not_depend_on_workers_and_resume(tmp_path: Path) -> None:
    composer = Composer(renderings(), size=32, seed=3)
    one = write_shards.write(composer, tmp_path / "one", "train", 25, 10, 1)
    two = write_shards.write(composer, tmp_path / "two", "train", 25, 10, 2)
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    lost = two[1].read_bytes()
    two[1].unlink()
    write_shards.write(composer, tmp_path / "two", "train", 25, 10, 1)
    assert two[1].read_bytes() == lost
    read = [example for path in one for example in shards.read(path)]
    assert len(read) == 25
    assert read[7].prompt == composer(7).prompt
    assert np.array_equal(np.asarray(read[7].image), np.asarray(composer(7).image))


def test_held_out_pairs_and_sets_are_never_trained_on() -> None:
    train = Composer(renderings(), size=32, scenes=0.5)
    held = Composer(renderings(), size=32, scenes=0.0, training=False)
    for index in range(200):
        sample = train(index)
        assert not any(held_out(o.concept, o.style) for o in sample.objects)
        if sample.kind == "several":
            assert not held_out_scene(o.concept for o in sample.objects)
    assert all(held_out(held(i).objects[0].concept, held(i).objects[0].style) for i in range(40))


def test_relations_are_true() -> None:
    composer = Composer(renderings(), size=32, scenes=1.0)
    seen: set[str] = set()
    for index in range(150):
        sample = composer(index)
        if sample.relation is None:
            continue
        seen.add(sample.relation)
        (ax, ay), (bx, by) = [((o.box[0] + o.box[2]) / 2, (o.box[1] + o.box[3]) / 2) for o in sample.objects]
        truth = {"to the left of": ax < bx, "to the right of": ax > bx, "above": ay < by, "below": ay > by}
        assert truth[sample.relation]
        assert sample.relation in sample.prompt.lower() or len(sample.prompt) > 0
    assert len(seen) == 4


def test_counts_are_true() -> None:
    composer = Composer(renderings(), size=32, scenes=1.0)
    counted = [s for s in map(composer, range(150)) if s.kind == "counted"]
    assert {len(s.objects) for s in counted} == {2, 3, 4}
    assert all(len({o.concept for o in s.objects}) == 1 for s in counted)


@pytest.mark.parametrize("keep", [0, 700, 2000])
def test_a_truncated_shard_is_one_clear_line(tmp_path: Path, keep: int) -> None:
    [path] = write_shards.write(Composer(renderings(), size=32), tmp_path, "train", 3, 10, 1)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=str(path)):
        list(shards.read(path))


def test_a_folder_of_pictures_becomes_shards(tmp_path: Path) -> None:
    source = tmp_path / "mine"
    source.mkdir()
    Image.new("RGB", (90, 60), (200, 10, 10)).save(source / "a.png")
    (source / "a.txt").write_text("a red wall\n")
    [path] = image_folder.write_folder(source, tmp_path / "out", 48, 100)
    [example] = shards.read(path)
    assert (example.prompt, example.image.size) == ("a red wall", (48, 48))


def test_changed_pictures_are_written_anew_and_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    source, out = tmp_path / "mine", tmp_path / "out"
    for name in ("a", "b/a", "b/c"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(source / f"{name}.png")
        (source / f"{name}.txt").write_text(name)
    one, two = image_folder.write_folder(source, out, 48, 2)
    assert [e.prompt for path in (one, two) for e in shards.read(path)] == ["a", "b/a", "b/c"]
    before = one.stat().st_mtime_ns
    two.unlink()
    image_folder.write_folder(source, out, 48, 2)
    assert two.exists() and one.stat().st_mtime_ns == before
    (source / "a.txt").write_text("another")
    (source / "b/c.png").unlink()
    [one] = image_folder.write_folder(source, out, 48, 2)
    assert [e.prompt for e in shards.read(one)] == ["another", "b/a"] and not two.exists()


@pytest.mark.parametrize("letter", ["a", "é", "汉"])
def test_shards_of_folders_with_the_longest_names_have_names(tmp_path: Path, letter: str) -> None:
    name = letter * (250 // len(letter.encode()))
    for place in ("one", "two"):
        source = tmp_path / place / name
        source.mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(source / "a.png")
        (source / "a.txt").write_text(place)
    made = [
        image_folder.write_folder(tmp_path / place / name, tmp_path / "out", 48, 2)
        for place in ("one", "two")
    ]
    assert [e.prompt for paths in made for path in paths for e in shards.read(path)] == ["one", "two"]
    assert all(path.name.startswith(letter * 70) for paths in made for path in paths)


def test_two_pictures_of_one_name_are_refused(tmp_path: Path) -> None:
    for ending in ("png", "jpg"):
        Image.new("RGB", (9, 9)).save(tmp_path / f"a.{ending}")
    (tmp_path / "a.txt").write_text("a thing")
    with pytest.raises(UserError, match="two images would both be named a"):
        image_folder.write_folder(tmp_path, tmp_path / "out", 48, 100)


def test_a_caption_that_is_no_text_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8"):
        image_folder.write_folder(tmp_path, tmp_path / "out", 48, 100)


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "mine"
    source.mkdir()
    with pytest.raises(UserError, match="no images"):
        image_folder.write_folder(source, tmp_path / "out", 48, 100)
    (source / "b.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="caption"):
        image_folder.write_folder(source, tmp_path / "out", 48, 100)
    (source / "b.txt").write_text("a thing")
    with pytest.raises(UserError, match="not an image that can be read"):
        image_folder.write_folder(source, tmp_path / "out", 48, 100)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_what_a_killed_writer_left_is_no_shard(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    (tmp_path / ".b.123.part.tar").touch()
    assert shards.find(tmp_path) == shards.find(tmp_path / "*.tar") == [tmp_path / "a.tar"]


def test_a_shard_without_captions_is_refused(tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(picture)
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(picture, "x.png")
    with pytest.raises(UserError, match="caption"):
        list(shards.read(tmp_path / "s.tar"))


def photos(folder: Path, *names: str, caption: bytes | None = None) -> Path:
    """A folder of small images, each with a caption: its name, if not given."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {"jpg": "JPEG", "tif": "TIFF"}.get(path.suffix[1:].lower(), path.suffix[1:].upper())
        Image.new("RGB", (9, 9), "red").save(path, kind)
        path.with_suffix(".txt").write_bytes(name.encode() if caption is None else caption)
    return folder


def prompts(paths: list[Path]) -> list[str]:
    return [example.prompt for path in paths for example in shards.read(path)]


@pytest.mark.parametrize(
    "caption",
    [
        b"\xef\xbb\xbfa \xe2\x80\x9cred\xe2\x80\x9d apple\r\n",
        "a “red” apple".encode("utf-16"),
        "a\u00a0“red”\tapple".encode(),
    ],
    ids=["BOM", "UTF-16", "blanks"],
)
def test_a_caption_is_learnt_as_its_prompt_is_read(tmp_path: Path, caption: bytes) -> None:
    source = photos(tmp_path / "photos", "a.png", caption=caption)
    made = image_folder.write_folder(source, tmp_path / "out", 16, 10)
    assert prompts(made) == ['a "red" apple']
    raw = tmp_path / "raw.tar"  # written by others
    with tarfile.open(raw, "w") as tar:
        shards.add_file(tar, "a.png", (source / "a.png").read_bytes())
        shards.add_file(tar, "a.txt", caption)
    assert prompts([raw]) == ['a "red" apple']


def test_a_caption_in_another_encoding_is_named_in_a_shard(tmp_path: Path) -> None:
    source, raw = photos(tmp_path / "photos", "a.png", "b.png"), tmp_path / "raw.tar"
    with tarfile.open(raw, "w") as tar:
        for name, caption in (("a", b"a cat"), ("b", b"caf\xe9")):
            shards.add_file(tar, f"{name}.png", (source / f"{name}.png").read_bytes())
            shards.add_file(tar, f"{name}.txt", caption)
    with pytest.raises(UserError, match=r"raw\.tar: b\.txt is not UTF-8 text: save it as UTF-8"):
        prompts([raw])


def test_links_are_followed_and_hidden_leftovers_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = photos(tmp_path / "photos", "a.png", ".ipynb_checkpoints/a-checkpoint.png", "b/.c.png")
    photos(tmp_path / "elsewhere", "d.png", "e/f.png")
    (source / "._a.png").write_bytes(b"\0\5\x16\7Mac OS X")
    (source / "more").symlink_to("../elsewhere")
    (source / "more/back").symlink_to(source)
    (source / "g.png").symlink_to(tmp_path / "elsewhere/d.png")
    (source / "g.txt").write_text("g")
    (source / "alone.txt").write_text("notes")
    assert cli.run(["data", "folder", str(source), "-o", str(tmp_path / "out"), "--size", "16"]) == 0
    [path] = shards.find(tmp_path / "out")
    assert [e.key for e in shards.read(path)] == ["a", "g", "more_d", "more_e_f"]
    said = capsys.readouterr().err
    assert "skipped 4 hidden files or folders" in said
    assert "skipped 1 link to a folder that is listed" in said
    assert "skipped 1 caption without an image" in said


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", "a.png")
    (source / "a.png").unlink()
    (source / "a.png").symlink_to("gone.png")
    with pytest.raises(UserError, match=r"a\.png"):
        image_folder.write_folder(source, tmp_path / "out", 16, 10)


@pytest.mark.parametrize("again", [False, True])
def test_folders_of_one_name_keep_their_shards_apart(tmp_path: Path, again: bool) -> None:
    one, two = photos(tmp_path / "x/photos", "a.png", "b.png"), photos(tmp_path / "y/photos", "c.png")
    near = photos(tmp_path / "z/photos-2", "d.png")
    out = tmp_path / "out"
    for source in (one, two, near):
        image_folder.write_folder(source, out, 16, 10)
    if again:  # each writes its own anew, and no other's
        (one / "a.txt").write_text("a new caption")
        (two / "c.txt").write_text("another")
        for source in (two, one):
            image_folder.write_folder(source, out, 16, 10)
    expected = ["a new caption", "b.png", "another"] if again else ["a.png", "b.png", "c.png"]
    assert sorted(prompts(shards.find(out))) == sorted([*expected, "d.png"])
    assert (out / "photos-00000.tar").exists() and (out / "photos-2-00000.tar").exists()


@pytest.mark.parametrize("number", [0, 1, 7, 100_000])
def test_shards_that_we_did_not_make_are_neither_removed_nor_taken_for_ours(
    tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = photos(tmp_path / "photos", "a.png"), tmp_path / "out"
    out.mkdir()
    other = out / f"photos-{number:05d}.tar"
    other.write_bytes(b"of somebody else")
    [made] = image_folder.write_folder(source, out, 16, 10)
    assert other.name in capsys.readouterr().err
    (source / "a.txt").write_text("a new caption")
    assert image_folder.write_folder(source, out, 16, 10) == [made]
    assert other.read_bytes() == b"of somebody else" and prompts([made]) == ["a new caption"]
    full = tmp_path / "full"
    full.mkdir()
    for name in (other.name, made.name):
        (full / name).write_bytes(b"of somebody else")
    assert cli.run(["data", "folder", str(source), "-o", str(full), "--size", "16"]) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert [path.read_bytes() for path in full.iterdir()] == [b"of somebody else"] * 2


def test_a_shard_put_beside_ours_is_neither_removed_nor_taken_for_ours(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "photos", "a.png", "b.png", "c.png"), tmp_path / "out"
    whole = image_folder.write_folder(source, out, 16, 1)
    other = out / "photos-00003.tar"
    other.write_bytes(b"of somebody else")
    assert image_folder.write_folder(source, out, 16, 1) == whole  # nothing is in the way
    (source / "c.txt").write_text("a new caption")
    assert prompts(image_folder.write_folder(source, out, 16, 1)) == ["a.png", "b.png", "a new caption"]
    photos(source, "d.png")
    with pytest.raises(UserError, match=r"photos-00003\.tar was made by something else"):
        image_folder.write_folder(source, out, 16, 1)
    assert other.read_bytes() == b"of somebody else"
    assert prompts(whole) == ["a.png", "b.png", "a new caption"]


def test_fewer_images_leave_no_shard_of_the_earlier_ones(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "photos", "a.png", "b.png"), tmp_path / "out"
    image_folder.write_folder(source, out, 16, 1)
    for name in ("b.png", "b.txt"):
        (source / name).unlink()
    assert image_folder.write_folder(source, out, 16, 1) == shards.find(out)


def test_a_full_disk_is_said_of_the_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under a limit on the size of files, which the system enforces as it does a disk's."""
    source, out = photos(tmp_path / "photos", "a.png"), tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        status = cli.run(["data", "folder", str(source), "-o", str(out), "--size", "64"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2
    assert f"cannot write {out / 'photos-00000.tar'}: File too large" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["photos.made-of"]


@pytest.mark.parametrize(
    "name", ["LICENCES.md", "renderings-128.npy", "train/train-00000.tar", "heldout/heldout-00000.tar"]
)
def test_stickers_take_nothing_of_others_for_theirs(tmp_path: Path, name: str) -> None:
    other = tmp_path / name
    other.parent.mkdir(exist_ok=True)
    other.write_bytes(b"of somebody else")
    with pytest.raises(UserError, match="was not made by fewstep data stickers"):
        stickers.build(
            tmp_path, size=128, num_images=1, scenes=0, seed=0, workers=1, progress=lambda *_: None
        )
    assert other.read_bytes() == b"of somebody else" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("name", "shard"), [(".photos", "photos"), ("..photos", "photos"), (".", "here")])
def test_a_folder_with_a_leading_dot_writes_shards_that_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, shard: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    photos(Path(name), "a.png")
    image_folder.write_folder(Path(name), tmp_path / "out", 16, 10)
    assert [path.name for path in shards.find(tmp_path / "out")] == [f"{shard}-00000.tar"]


def test_a_note_of_fewstep_0_1_is_read_and_another_one_refused(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", "a.png")
    [path] = image_folder.write_folder(source, tmp_path / "out", 16, 10)
    note, before = tmp_path / "out/photos.made-of", path.stat().st_mtime_ns
    note.write_text(json.loads(note.read_text())["digest"])
    image_folder.write_folder(source, tmp_path / "out", 16, 10)
    assert path.stat().st_mtime_ns == before
    note.write_text("0" * 64)
    with pytest.raises(UserError, match=r"made-of is damaged .*; remove it and the shards beside it"):
        image_folder.write_folder(source, tmp_path / "out", 16, 10)
    assert path.exists()


def test_names_may_be_of_any_case_and_hold_dots(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", "a.v1.PNG", "b.JPG", "c.tif", "d.Webp")
    (source / "b.txt").rename(source / "b.TXT")
    made = image_folder.write_folder(source, tmp_path / "out", 16, 10)
    assert [(e.key, e.prompt) for e in shards.read(made[0])] == [
        ("a_v1", "a.v1.PNG"), ("b", "b.JPG"), ("c", "c.tif"), ("d", "d.Webp")
    ]  # fmt: skip
    (source / "b.txt").write_text("two")
    with pytest.raises(UserError, match=r"b\.JPG: its caption b\.TXT could be b\.txt too"):
        image_folder.write_folder(source, tmp_path / "out", 16, 10)


def test_hidden_shards_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tar").touch()
    (tmp_path / ".photos-00000.tar").touch()
    assert shards.find(tmp_path) == [tmp_path / "a.tar"]
    assert "skipped 1 hidden shard" in capsys.readouterr().err


def test_a_file_that_says_it_is_enormous_is_not_read(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("a.png")
    entry.size = 2**40
    (tmp_path / "s.tar").write_bytes(entry.tobuf() + bytes(10_240))
    with pytest.raises(UserError, match=r"s\.tar: a\.png has more than 256 MiB"):
        list(shards.read(tmp_path / "s.tar"))


def test_shards_of_others_are_read_as_webdataset_groups_them(tmp_path: Path) -> None:
    source, path = photos(tmp_path / "photos", "a.png"), tmp_path / "s.tar.gz"
    data = (source / "a.png").read_bytes()
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {
            "__meta__": b"x", "x/1.PNG": data, "x/1.seg.png": data, "x/1.cls": b"3", "x/1.txt": b"one",
            "x/1.json": b'{"score": NaN}', "x/2.jpg": data, "x/2.txt": b"two",
        }.items():  # fmt: skip
            shards.add_file(tar, name, content)
    assert [(e.key, e.prompt) for e in shards.read(path)] == [("x/1", "one"), ("x/2", "two")]
