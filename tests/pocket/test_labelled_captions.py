"""Captions with their truth, read without the pictures."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from fewstep.core.types import UserError
from fewstep.data.captions import prompts_of, truths_of


def shard(path: Path, entries: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def test_captions_are_cleaned_and_hidden_files_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = {
        "./a.txt": b"\xef\xbb\xbfa red\r\napple",
        "._b.txt": b"\0\5\x16\7",
        "b.txt": "a “cat”".encode("utf-16"),
        "c.json": '{"prompt": "a dog’s  hat", "similarity": NaN}'.encode(),
        "d.json": b'{"prompt": "another"}',
        "d.TXT": b"the caption",
    }
    told = [truth["prompt"] for truth in truths_of([shard(tmp_path / "a.tar", entries)])]
    assert told == ["a red apple", 'a "cat"', "a dog's hat", "the caption"]
    assert "skipped 1 hidden file in" in capsys.readouterr().err


def test_captions_are_drawn_by_chance_that_the_seed_decides(tmp_path: Path) -> None:
    first = shard(tmp_path / "a.tar", {f"{i}.txt": f"a disc {i}\n".encode() for i in range(20)})
    truth = {"x.png": b"", "x.txt": b"a ring", "x.json": b'{"objects": []}'}
    second = shard(tmp_path / "b.tar", truth)
    assert list(truths_of([second])) == [{"prompt": "a ring", "objects": []}]
    drawn = prompts_of([first, second], 21, 0)
    assert sorted(drawn) == sorted(["a ring", *(f"a disc {i}" for i in range(20))])
    assert prompts_of([first, second], 30, 0)[:21] == drawn != prompts_of([first, second], 21, 1)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({}, "no captions"),
        ({"x.png": b"picture"}, "no captions"),
        ({"x.json": b'{"objects": []}'}, r"x has no caption \(\.txt\)"),
        ({"a.txt": b"a", "x.txt": b"caf\xe9"}, "x.txt is not UTF-8 text: save it as UTF-8"),
        ({"x.txt": b"\xff\xfea"}, "x.txt is not UTF-8 text"),
        ({"x.txt": "a cat".encode("utf-16-le")}, "x.txt is not UTF-8 text"),
        ({"x.txt": "a cat".encode("utf-32")}, "x.txt is not UTF-8 text"),
        ({"x.txt": b"a", "x.json": b"{"}, "x.json is damaged"),
        ({"x.txt": b"a", "x.json": b"[1]"}, "x.json is damaged"),
        ({"x.txt": b"a", "x.json": b"[" * 100_000}, "x.json is damaged"),
        ({"x.json": b'{"prompt": 5}'}, r"x has no caption \(\.txt\)"),
    ],
)
def test_what_is_no_shard_of_captions_is_one_clear_line(
    tmp_path: Path, entries: dict[str, bytes], said: str
) -> None:
    with pytest.raises(UserError, match=f"broken.tar: .*{said}"):
        prompts_of([shard(tmp_path / "broken.tar", entries)], 3, 0)


@pytest.mark.parametrize("kept", [0, 100, 700])
def test_a_shard_cut_short_is_one_clear_line(tmp_path: Path, kept: int) -> None:
    path = shard(tmp_path / "a.tar", {"x.txt": b"a" * 600})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="cut short"):
        prompts_of([path], 3, 0)
