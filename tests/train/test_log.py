"""Notes of a run that earlier versions wrote are read; damaged ones are said to be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fewstep.core.types import UserError
from fewstep.train import best_checkpoint, run_owner
from fewstep.train.log import Log

ABOUT: dict[str, Any] = {"recipe": "r", "made_of": {"teacher": "t"}}


def lines(folder: Path) -> list[dict[str, float]]:
    text = (folder / "log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_log_with_figures_that_are_no_numbers_goes_on(tmp_path: Path) -> None:
    there = [{"step": 1, "time": 1.5, "loss": math.nan}, {"step": 2, "loss": math.inf}, {"step": 3}]
    text = "".join(json.dumps(line) + "\n" for line in there)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 4, "lo')
    log = Log(tmp_path, "r", ABOUT, 2)
    log.close()
    assert [line["step"] for line in log.earlier] == [1, 2] == [line["step"] for line in lines(tmp_path)]
    assert math.isnan(lines(tmp_path)[0]["loss"])
    assert [type(line["step"]) for line in lines(tmp_path)] == [int, int]  # the file says what it said


@pytest.mark.parametrize("line", ["{", "[]", '{"step": "1"}', '{"loss": [1]}', "\0" * 9, "[" * 10**5])
def test_a_damaged_line_is_not_dropped_without_a_word(tmp_path: Path, line: str) -> None:
    text = f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"log\.jsonl, line 2, is damaged"):
        Log(tmp_path, "r", ABOUT, 2)
    assert (tmp_path / "log.jsonl").read_text() == text


@pytest.mark.parametrize("text", ["", "[]", '{"recipe": 3}', '{"made_of": ["t"]}', "[" * 10**5, "\xff"])
def test_a_damaged_run_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"run\.json is damaged") as caught:
        run_owner.check_owner(tmp_path, ABOUT)
    assert "\n" not in str(caught.value)


def test_a_run_that_says_what_json_cannot_is_known(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({**ABOUT, "lr": math.nan, "out": "a\udcff"}))
    run_owner.check_owner(tmp_path, ABOUT)


def test_a_damaged_note_of_the_best_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    note = tmp_path / "best" / "best.json"
    odd = ('{"step": 1, "metric": "m", "value": "0.5"}', '{"step": 1.5, "metric": "m", "value": 1}')
    for text in ("", "{}", *odd):
        note.write_text(text)
        with pytest.raises(UserError, match=r"best\.json is damaged"):
            best_checkpoint.read(tmp_path)
    note.write_text('{"step": 1, "metric": "m", "value": 0.5}')
    assert best_checkpoint.read(tmp_path) == {"step": 1, "metric": "m", "value": 0.5}
    note.unlink()
    assert best_checkpoint.read(tmp_path) is None


@pytest.mark.parametrize("data", [b"\x80\x04\x95\0\0", b"\0" * 64, b"PK\x03\x04", b"text", b'{"step": "1"}'])
def test_what_is_no_log_stays_and_is_said(tmp_path: Path, data: bytes) -> None:
    for before in (b"", b'{"step": 1}\n'):
        (tmp_path / "log.jsonl").write_bytes(before + data)
        with pytest.raises(UserError, match=r"log\.jsonl, line \d, is damaged"):
            Log(tmp_path, "r", ABOUT, 2)
        assert (tmp_path / "log.jsonl").read_bytes() == before + data


def test_a_last_line_without_an_end_is_kept(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}')
    log = Log(tmp_path, "r", ABOUT, 2)
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
