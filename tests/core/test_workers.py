"""Worker processes end with the process that they work for, and leave its locks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fewstep.core import atomic
from fewstep.core.workers import pool

PARENT = """
import os, sys, time
from pathlib import Path
from fewstep.core import atomic as files, signals
from fewstep.core.workers import pool

def work(folder):
    with files.replacing_file(Path(folder) / f"{os.getpid()}.tar") as fresh:
        fresh.touch()
        os.write(1, f"{os.getpid()}\\n".encode())
        time.sleep(60)

signals.listen()
try:
    with files.held(Path(sys.argv[1]), "filled"), pool(2) as executor:
        list(executor.map(work, [sys.argv[1]] * 6))
except signals.Stop as stop:
    sys.exit(stop.status)
"""


def begun(folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A parent, and its workers, which work."""
    command = [sys.executable, "-c", PARENT, str(folder)]
    parent = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout is not None
    return parent, [int(parent.stdout.readline()) for _ in range(2)]


def ended(process: int) -> bool:
    """Whether it has; one that nobody has waited for yet has, too."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_workers_of_a_killed_parent_end_and_let_go_of_its_folder(tmp_path: Path) -> None:
    parent, workers = begun(tmp_path)
    parent.kill()  # alone
    parent.communicate()
    until = time.monotonic() + 20
    while not all(map(ended, workers)):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".part")]
    with atomic.held(tmp_path, "filled"):
        assert [path.name for path in tmp_path.iterdir()] == [atomic.LOCK]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("group", [False, True], ids=["the parent alone", "all, as a terminal does"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_ends_workers_at_once_and_without_a_word(tmp_path: Path, number: int, group: bool) -> None:
    parent, _ = begun(tmp_path)
    (os.killpg if group else os.kill)(parent.pid, number)
    _, said = parent.communicate(timeout=20)
    assert (parent.returncode, said) == (128 + number, "")
    assert not list(tmp_path.iterdir())


def test_an_error_of_a_worker_is_the_parents_and_the_others_end(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), pool(2) as executor:
        list(executor.map(divmod, [1, 1, 1], [1, 0, 1]))
    with pool(1) as executor:
        assert list(executor.map(abs, [-1, 2])) == [1, 2]
