"""Trainings in processes of their own, with a stand-in for ``fewstep``: failures, stops, costs, locks."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from fewstep.core import atomic
from fewstep.core.signals import Stop
from fewstep.core.types import UserError
from fewstep.experiments import subprocesses
from fewstep.experiments.subprocesses import ProcessGroup, run_training

STAND_IN = """#!/usr/bin/env bash
# python -m fewstep distill WHAT ... --output FOLDER
folder=${@: -1}
trap 'touch "$folder/saved"; exit 130' TERM
touch "$folder/begun"
case $4 in
  fails) echo "a line before" >&2; echo "fewstep: it is out of tune" >&2; exit 2 ;;
  dies) kill -KILL $$ ;;
  waits) [ -e "$folder/saved" ] || while true; do sleep 0.02; done ;;
esac
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    monkeypatch.setattr(subprocesses.sys, "executable", str(path))


def carry_out(at: Path, *names: str, jobs: int = 1, more: Sequence[str] = ()) -> None:
    children = ProcessGroup()
    children.all(
        [partial(run_training, children, at / name, [name, *more], ["--device", "cpu"]) for name in names],
        jobs,
    )


def cost(folder: Path, name: str = "cost.json") -> dict[str, object]:
    return json.loads((folder / name).read_text())


def when(path: Path, number: int) -> threading.Thread:
    """Send this process a signal once a file is there."""

    def send() -> None:
        while not path.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def test_a_cell_that_fails_is_one_line_with_its_name_and_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^fails failed: it is out of tune$"):
        carry_out(tmp_path, "fails", "after")
    assert not (tmp_path / "after").exists()
    assert not (tmp_path / "fails/cost.json").exists()


def test_where_one_fails_the_others_save(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^fails failed"):
        carry_out(tmp_path, "waits", "fails", jobs=2)
    assert (tmp_path / "waits/saved").exists() or not (tmp_path / "waits/begun").exists()


def test_a_killed_cell_says_so_and_its_time_counts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^dies failed: ended by SIGKILL$"):
        carry_out(tmp_path, "dies")
    spent = cost(tmp_path / "dies", "spent.json")
    assert spent["since"] is None and spent["begun"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_asked_to_stop_children_save_and_go_on_the_next_time(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    thread = when(tmp_path / "waits/begun", number)
    with pytest.raises(Stop) as caught:
        carry_out(tmp_path, "waits", "after")
    thread.join()
    assert caught.value.number == number
    assert signal.getsignal(number) is before
    assert (tmp_path / "waits/saved").exists() and not (tmp_path / "after").exists()
    spent = cost(tmp_path / "waits", "spent.json")
    carry_out(tmp_path, "waits", "after")
    done = cost(tmp_path / "waits")
    assert done["begun"] == 2 and not done["cut"]
    assert float(str(done["seconds"])) > float(str(spent["seconds"])) > 0
    assert not (tmp_path / "waits/spent.json").exists()


def test_time_of_a_process_that_was_killed_with_its_parent_is_a_lower_bound(tmp_path: Path) -> None:
    folder = tmp_path / "ends"
    folder.mkdir()
    since = time.time() - 100
    note = {"command": ["ends", "--device", "cpu"], "seconds": 5.0, "bytes": 7, "begun": 1, "since": since}
    (folder / "spent.json").write_text(json.dumps(note))
    os.utime(folder / "spent.json", (since, since))
    (folder / "log.jsonl").touch()
    os.utime(folder / "log.jsonl", (since + 30, since + 30))
    carry_out(tmp_path, "ends")
    done = cost(folder)
    assert done["cut"] and 35 <= float(str(done["seconds"])) < 45


def test_what_was_trained_otherwise_is_refused_and_where_does_not_matter(tmp_path: Path) -> None:
    carry_out(tmp_path, "ends", more=["--steps", "3"])
    note = {"seconds": 1.0, "bytes": 1, "command": ["ends", "--steps", "3", "--device", "cuda"]}
    (tmp_path / "ends/cost.json").write_text(json.dumps(note))
    (tmp_path / "ends/begun").unlink()
    carry_out(tmp_path, "ends", more=["--steps", "3"])
    assert not (tmp_path / "ends/begun").exists()
    with pytest.raises(UserError, match="was trained with other options; move it away"):
        carry_out(tmp_path, "ends", more=["--steps", "4"])


def test_a_folder_is_trained_by_one_at_a_time(tmp_path: Path) -> None:
    with (
        atomic.held(tmp_path / "ends", "trained"),
        pytest.raises(UserError, match="trained by another process"),
    ):
        carry_out(tmp_path, "ends")
