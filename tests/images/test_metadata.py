"""What an image says of how it was made survives its file, and a stranger's metadata does no harm."""

from __future__ import annotations

import io
import json
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fewstep.core.types import UserError
from fewstep.images import io as image_io
from fewstep.images import metadata
from fewstep.images.decode import decode
from fewstep.images.metadata import CHUNK, PARAMETERS
from fewstep.images.record import SHEET, Record, RecordWarning, read_json, read_records, records_of

KINDS = ("PNG", "JPEG", "WEBP")
quick = settings(max_examples=100, deadline=None, derandomize=True)


def written(texts: dict[str, str], kind: str, **more: Any) -> bytes:
    image = Image.new("RGB", (8, 8), "red")
    data = io.BytesIO()
    image.save(data, kind, **{**metadata.save_options(texts, kind), **more})
    return data.getvalue()


def read(data: bytes) -> dict[str, str]:
    return metadata.texts(decode(data, "x"))


# A mark of the byte order in front of a text is no part of it.
TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters="\ufeff"), max_size=99
)


@pytest.mark.parametrize("kind", KINDS)
@given(parameters=TEXT, facts=st.dictionaries(st.text(max_size=9), st.text(max_size=99)))
@quick
def test_both_texts_survive_every_format(kind: str, parameters: str, facts: dict[str, str]) -> None:
    texts = {PARAMETERS: f"{parameters}\nSteps: 4, Seed: 1", CHUNK: json.dumps(facts)}
    assert read(written(texts, kind)) == texts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [65_000, 65_502, 66_000, 500_000], ids=str)
def test_texts_larger_than_a_segment_survive(kind: str, size: int) -> None:
    texts = {CHUNK: json.dumps({"a": "<&>" * (size // 12)}), PARAMETERS: "a\nSteps: 4"}
    assert read(written(texts, kind)) == texts


@pytest.mark.parametrize("kind", KINDS)
def test_what_utf8_cannot_hold_is_no_error(kind: str) -> None:
    assert read(written({PARAMETERS: "a \udcff\nSteps: 4"}, kind)) == {PARAMETERS: "a ?\nSteps: 4"}


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_says_nothing_has_no_metadata(kind: str) -> None:
    assert read(written({}, kind)) == {}
    assert b"fewstep" not in written({}, kind) and b"xmp" not in written({}, kind)


def user_comment(value: bytes, endian: str | None = None) -> bytes:
    exif = Image.Exif()
    exif.endian = endian
    exif.get_ifd(0x8769)[0x9286] = value
    return exif.tobytes()


@pytest.mark.parametrize(
    "value",
    [
        b"UNICODE\0" + "a cat\nSteps: 4".encode("utf-16-be"),
        b"UNICODE\0" + "a cat\nSteps: 4".encode("utf-16-le"),
        b"UNICODE\0" + "a cat\nSteps: 4".encode("utf-16"),
        b"ASCII\0\0\0a cat\nSteps: 4",
        b"\0\0\0\0\0\0\0\0a cat\nSteps: 4",
        b"a cat\nSteps: 4",
    ],
)
@pytest.mark.parametrize("endian", ["<", ">"])
def test_user_comments_of_other_programs_are_read(value: bytes, endian: str) -> None:
    assert read(written({}, "JPEG", exif=user_comment(value, endian))) == {PARAMETERS: "a cat\nSteps: 4"}


def test_the_comment_of_a_photo_says_nothing() -> None:
    assert read(written({}, "JPEG", exif=user_comment(b"ASCII\0\0\0holidays"))) == {}


RDF = 'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'


@pytest.mark.parametrize(
    "xmp",
    [
        f'<rdf:RDF {RDF}><rdf:Description xmlns:q="urn:fewstep:1.0:" q:record="{{}}"/></rdf:RDF>',
        f'<rdf:RDF {RDF}><rdf:Description xmlns:q="urn:fewstep:1.0:"><q:record>{{}}</q:record>'
        "</rdf:Description></rdf:RDF>\0\0  ",
    ],
)
def test_xmp_that_another_program_rewrote_is_read(xmp: str) -> None:
    assert read(written({}, "WEBP", xmp=xmp.encode())) == {CHUNK: "{}"}


GROWING = (
    '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">'
    + "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    + ']><x xmlns:f="urn:fewstep:1.0:"><f:record>&i;</f:record></x>'
)


@pytest.mark.parametrize(
    "xmp",
    [
        b"", b"\xff\xfe", b"<x", GROWING.encode(), GROWING.encode("utf-16"), b"<x>" * 300_000,
        b"<x>" * 100_000 + b"</x>" * 100_000, b"<x/>" * 1000,
    ],
    ids=["empty", "no text", "cut", "growing", "growing in UTF-16", "open", "deep", "many"],
)  # fmt: skip
def test_hostile_xmp_counts_as_none(xmp: bytes) -> None:
    begun = time.perf_counter()
    assert read(written({}, "WEBP", xmp=xmp)) == {}
    assert time.perf_counter() - begun < 5


@given(st.binary(max_size=200), st.integers(0, 100), st.sampled_from(KINDS))
@quick
def test_any_exif_is_passed_over(noise: bytes, cut: int, kind: str) -> None:
    exif = user_comment(b"UNICODE\0\0a")
    for broken in (noise, exif[:cut] + noise, exif[:cut] + noise + exif[cut + len(noise) :]):
        read(written({}, kind, exif=b"Exif\0\0" + broken.removeprefix(b"Exif\0\0")))


def test_extended_xmp_with_a_part_missing_counts_as_none() -> None:
    data = written({CHUNK: json.dumps({"a": "x" * 200_000})}, "JPEG")
    start = data.index(b"\xff\xe1", data.index(b"http://ns.adobe.com/xmp/extension/"))
    length = int.from_bytes(data[start + 2 : start + 4])
    assert CHUNK in read(data) and read(data[:start] + data[start + 2 + length :]) == {}


def test_the_record_of_a_sheet_of_thousands_fits_every_format(tmp_path: Path) -> None:
    record = Record("字" * 200, 1, 4, "pocket", "ab", (8, 8))
    text = json.dumps({SHEET: [json.loads(record.json())] * 3000})
    for suffix in image_io.SUFFIXES:
        image = Image.new("RGB", (8, 8))
        image.info[CHUNK] = text
        image_io.save(image, tmp_path / f"a{suffix}")
        assert read_records(tmp_path / f"a{suffix}") == [record] * 3000


RECORD = json.loads(Record("a cat", 1, 4, "pocket", "ab", (8, 8), guidance=4.5, negative="b").json())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*RECORD, "sheet"]), inner),
    max_leaves=9,
)


CHANGES = st.dictionaries(st.sampled_from(sorted(RECORD)), JSON, max_size=3)


@given(CHANGES, JSON, st.booleans(), st.integers(0, 999))
@quick
def test_any_record_is_read_or_refused_in_one_line(
    changes: dict[str, Any], other: Any, sheet: bool, cut: int
) -> None:
    facts: Any = {**RECORD, **changes}
    for each in ({"sheet": [RECORD, facts]} if sheet else facts, other, {"sheet": other}):
        text = json.dumps(each)
        for damaged in (text, text[:cut]):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RecordWarning)
                try:
                    for record in records_of(read_json(damaged, "x"), "x"):
                        assert Record.parse(record.json()) == record
                        record.parameters()
                except UserError as error:
                    assert "\n" not in str(error)


FILES = {kind: written({CHUNK: json.dumps(RECORD), PARAMETERS: "a\nSteps: 4"}, kind) for kind in KINDS}


NOISE = st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=4)), max_size=4)


@given(st.sampled_from(KINDS), NOISE, st.data())
@quick
def test_any_file_is_read_or_refused_in_one_line(
    kind: str, changes: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    damaged = bytearray(FILES[kind])
    for at, noise in changes:
        at %= len(damaged)
        damaged[at : at + data.draw(st.integers(0, 4))] = noise
    with TemporaryDirectory() as folder:
        (path := Path(folder, "x")).write_bytes(damaged)
        try:
            read_records(path)
        except UserError as error:
            assert "\n" not in str(error)
        except RecordWarning:  # a field's name was changed
            pass
