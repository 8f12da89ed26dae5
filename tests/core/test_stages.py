"""What is told of long work, and when."""

from __future__ import annotations

import time

import pytest

from fewstep.core import progress, signals
from fewstep.core.progress import stage


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST", 0.05)
    monkeypatch.setattr(progress, "EVERY", 0.1)


def test_a_stage_is_named_with_its_place_again_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("training") as here:
        time.sleep(0.1)
        here(34, 40)
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fewstep: training"
    assert 2 <= sum(line.startswith("fewstep: training, 34 of 40") for line in lines) <= 4
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_of_nested_stages_the_inner_one_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("preparing"):
        with stage("loading"):
            time.sleep(0.2)
        inner = capsys.readouterr().err
        time.sleep(0.2)
    outer = capsys.readouterr().err
    assert set(inner.splitlines()) == {"fewstep: loading"}
    assert set(outer.splitlines()) == {"fewstep: preparing"}


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), stage("loading"):
        raise ValueError
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_a_stop_that_was_lost_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_last", None)
    with stage("training") as here:
        try:
            signals._raise(15, None)
        except BaseException:
            pass  # as some libraries do
        with pytest.raises(signals.Stop) as caught:
            here(1, 2)
    assert caught.value.status == 143
    with pytest.raises(signals.Stop), signals.handled(lambda number, frame: None):
        pass
