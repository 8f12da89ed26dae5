"""A command that a signal asks to end saves, tells it by a word and its status, and goes on undisturbed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.helpers.held import held
from tests.helpers.worker import run_of

from fewstep.train.checkpoint import last_step
from fewstep.train.trainer import train

pytestmark = pytest.mark.slow(45)

ROOT = Path(__file__).parents[2]
ENDS = [
    (signal.SIGINT, 130, "interrupted"),
    (signal.SIGTERM, 143, "terminated"),
    (signal.SIGHUP, 129, "hung up"),
]


def begun(folder: Path, steps: int, word: str = "plain", slow: float = 0.05) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.worker", str(folder), str(steps), str(slow), word],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not there():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


def same(one: Path, other: Path) -> bool:
    mine, theirs = held(one), held(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize(("number", "status", "word"), ENDS)
def test_a_stop_in_the_loop_saves_and_the_rest_ends_as_undisturbed(
    tmp_path: Path, number: int, status: int, word: str
) -> None:
    process = begun(tmp_path / "cut", 10**4)
    until((tmp_path / "cut/log.jsonl").exists, process)
    time.sleep(0.2)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    lines = [line for line in said.splitlines() if line.startswith("fewstep:")]
    assert process.returncode == status
    assert lines[0].startswith("fewstep: stopping after this step") and lines[1:] == [f"fewstep: {word}"]
    reached = last_step(tmp_path / "cut")
    assert 0 < reached < 10**4

    process = begun(tmp_path / "cut", reached + 3, slow=0.0)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"fewstep: toy: resuming at step {reached} of {reached + 3}" in said
    train(run_of(tmp_path / "whole", reached + 3))
    assert same(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(("number", "status", "word"), ENDS)
def test_a_stop_within_a_restore_ends_the_command_and_loses_nothing(
    tmp_path: Path, number: int, status: int, word: str
) -> None:
    train(run_of(tmp_path / "cut", 4))
    process = begun(tmp_path / "cut", 6, "restoring")
    until((tmp_path / "cut/restoring").exists, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (status, f"fewstep: {word}\n")
    assert last_step(tmp_path / "cut") == 4
    train(run_of(tmp_path / "cut", 6))
    train(run_of(tmp_path / "whole", 6))
    assert same(tmp_path / "cut", tmp_path / "whole")


def test_a_second_process_in_a_run_s_folder_is_told_so_and_the_first_goes_on(tmp_path: Path) -> None:
    first = begun(tmp_path, 10**4)
    until((tmp_path / "log.jsonl").exists, first)
    second = begun(tmp_path, 10**4)
    _, said = second.communicate(timeout=60)
    line = f"fewstep: {tmp_path} is being trained by another process: let it end, or stop it first\n"
    assert (second.returncode, said) == (2, line)
    assert first.poll() is None
    first.kill()
    first.communicate()
    third = begun(tmp_path, 3, slow=0.0)
    assert third.wait(60) == 0
    third.communicate()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("wait", [0.4, 1.2])
@pytest.mark.parametrize(("number", "status", "word"), ENDS)
def test_a_stop_at_the_start_is_neither_a_traceback_nor_an_error(
    tmp_path: Path, wait: float, number: int, status: int, word: str
) -> None:
    words = [
        "train",
        "pocket-teacher",
        "--init",
        str(ROOT / "models/pocket-teacher"),
        "--data",
        str(tmp_path),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "fewstep", *words, "--output", str(tmp_path / "run")],
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(wait)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if "no .tar shards" in said:  # a quick machine: it ended, for want of data, before it was told to
        assert process.returncode in (2, -number)
    else:
        assert (process.returncode, said) == (status, f"fewstep: {word}\n")
    assert not list(tmp_path.iterdir())


def test_who_is_told_to_ignore_a_hangup_ignores_it(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = begun(tmp_path, 60)
    finally:
        signal.signal(signal.SIGHUP, before)
    until((tmp_path / "log.jsonl").exists, process)
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert last_step(tmp_path) == 60
