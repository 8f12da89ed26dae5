"""Long work says what it does, on a terminal and elsewhere, and no text of the user's steers a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import fewstep
from fewstep.core.progress import Progress, duration, printable, say

Capture = pytest.CaptureFixture[str]
WORK = """
import time
from fewstep.core.progress import Progress
with Progress() as progress:
    progress("opening")
    time.sleep(0.3)
    for done in range(4):
        progress("drawing [bold]\\x1b]0;title\\x07", done, 3)
        time.sleep(0.2)
"""


def test_elsewhere_a_stage_is_named_once_and_its_count_is_repeated(capsys: Capture) -> None:
    with Progress(first=0.05, every=0.1) as progress:
        progress("opening")
        progress("opening")
        time.sleep(0.12)
        for done in range(6):
            progress("drawing", done, 5)
            time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("fewstep: ") for line in lines)
    assert lines[0] == "fewstep: opening" and lines.count("fewstep: opening") <= 2
    assert sum(line.startswith("fewstep: drawing") and "of 5" in line for line in lines) >= 2


def test_a_short_stage_says_nothing_so_that_a_refusal_is_one_line(capsys: Capture) -> None:
    with Progress() as progress:
        progress("opening")
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_one_long_call_is_spoken_of_too(capsys: Capture) -> None:
    with Progress(first=0.05, every=0.05) as progress:
        progress("converting")
        time.sleep(0.3)
    assert capsys.readouterr().err.count("fewstep: converting") >= 3


def test_it_falls_silent_with_its_block(capsys: Capture) -> None:
    with pytest.raises(ZeroDivisionError), Progress(first=0.02, every=0.02) as progress:
        progress("dividing")
        raise ZeroDivisionError
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_bars_and_no_controls_of_ours() -> None:
    shown = bytearray()
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(Path(fewstep.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", WORK], stderr=theirs, env=environment)
    os.close(theirs)
    reader = threading.Thread(target=drain, args=(ours, shown))
    reader.start()
    assert process.wait(60) == 0
    reader.join()
    assert b"drawing [bold] ]0;title" in shown and b"\x1b]0;" not in shown and b"\x07" not in shown
    assert b"3/3" in shown


def drain(terminal: int, into: bytearray) -> None:
    try:
        while data := os.read(terminal, 4096):
            into += data
    except OSError:  # so Linux says that the other side is gone
        os.close(terminal)


@pytest.mark.parametrize("text", ["a\x1b[31mb", "a\x00b", "a\nb", "a\u202eb", "a\x9bb", "a\x7fb"])
def test_a_line_is_one_line_without_controls(text: str, capsys: Capture) -> None:
    assert printable(text).isprintable()
    say(text)
    shown = capsys.readouterr().err
    assert shown == f"fewstep: {printable(text)}\n"


def test_durations() -> None:
    assert [duration(s) for s in (4, 119, 125, 7200)] == ["4 s", "2 min", "2 min", "2 h 0 min"]
