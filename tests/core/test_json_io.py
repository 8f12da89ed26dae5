"""JSON of any shape is what was asked for, or one line that names file and field."""

from __future__ import annotations

import json
import math
import os
import pickle
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from fewstep.core import json_io
from fewstep.core.types import UserError


@dataclass(frozen=True)
class Latent:
    height: int


@dataclass(frozen=True)
class Model:
    name: str
    latent: Latent
    steps: list[int] = field(default_factory=list[int])


def test_a_dataclass_is_read_and_what_it_lacks_is_passed_over() -> None:
    told = json_io.parse(b'{"name": "a", "latent": {"height": 2, "more": [1]}, "steps": [4]}', Model)
    assert told == Model("a", Latent(2), [4])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"name": "a", "latent": {"height": "2"}}', "latent.height: expected int, got str"),
        ('{"name": "a", "latent": {"height": 2.5}}', "latent.height: expected int, got float"),
        ('{"name": "a", "latent": {"height": true}}', "latent.height: expected int, got bool"),
        ('{"name": "a", "latent": {}}', "latent: object missing required field height"),
        ('{"name": "a", "latent": {"height": 2}, "steps": [1, null]}', r"steps\[1\]|steps\[...\]"),
        ("[]", "expected object, got array"),
        ("", "not JSON"),
        ('{"name": NaN}', "not JSON"),
        ("\ufeff{}", "not JSON"),
        ("[" * 100_000, "expected object, got array"),
        ('{"more": ' + "[" * 100_000, "nested too deeply|truncated"),
        ('{"name": "a", "latent": {"height": ' + "9" * 5000 + "}}", "out of range"),
    ],
)
def test_any_other_text_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        json_io.read(tmp_path / "a.json", Model)
    assert "a.json" in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_nested_without_an_end_is_one_line() -> None:
    with pytest.raises(UserError, match="nested too deeply"):
        json_io.parse(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", where="a.json")


def test_no_file_no_regular_file_and_a_large_one_are_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b" " * 100)
    for name, said in (
        ("none", "cannot read"),
        ("pipe", "is no file"),
        ("", "is no file"),
        ("large", "larger"),
    ):
        with pytest.raises(UserError, match=said):
            json_io.read(tmp_path / name, most=99)


def test_numbers_that_python_gave_are_checked_as_those_of_a_file() -> None:
    assert json_io.convert({"height": 3}, Latent, "it") == Latent(3)
    with pytest.raises(UserError, match="it is damaged or no such file: height: expected int, got str"):
        json_io.convert({"height": "3"}, Latent, "it")


def test_an_array_is_numbers_or_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(3))
    assert json_io.read_array(tmp_path / "a.npy").tolist() == [0, 1, 2]
    np.save(tmp_path / "b.npy", np.array([print]), allow_pickle=True)
    (tmp_path / "c.npy").write_bytes(pickle.dumps(print))
    (tmp_path / "d.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-1])
    for name in ("b.npy", "c.npy", "d.npy", "nowhere.npy"):
        with pytest.raises(UserError, match=f"{name} is damaged") as caught:
            json_io.read_array(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_what_pythons_json_writes_is_read_where_it_was_written(tmp_path: Path) -> None:
    said = [{"loss": float("nan")}, {"loss": float("-inf"), "path": "a\udcff"}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    first, second = json_io.read_lines(tmp_path / "log.jsonl")
    assert math.isnan(first["loss"]) and second == said[1]
    (tmp_path / "log.jsonl").write_text('{"loss": 1}\n{"loss": "x"}\n')
    with pytest.raises(
        UserError, match=r"log\.jsonl, line 2, is damaged or no such file: .*expected float, got str"
    ):
        json_io.read_lines(tmp_path / "log.jsonl", dict[str, float])


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "{", '{"a": "\\ud800"}'])
def test_what_pythons_json_cannot_read_is_one_line(text: str) -> None:
    with pytest.raises(UserError) as caught:
        json_io.parse(text, dict[str, int], "a.json", python=True)
    assert "a.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_takes_as_much_memory_as_it_has_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    tracemalloc.start()
    json_io.read(tmp_path / "a.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
