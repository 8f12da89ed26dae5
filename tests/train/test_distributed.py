"""Two processes learn what one does, and either goes on where the other stopped."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import pair
from tests.helpers.held import held

from fewstep.train.best_checkpoint import read
from fewstep.train.checkpoint import last_step

pytestmark = pytest.mark.slow(35)

ROOT = Path(__file__).parents[2]
HALF = pair.STEPS["full"] // 2


def two(folder: Path, stage: str) -> tuple[int, str]:
    """Two processes of :mod:`tests.helpers.pair` as torchrun starts it: a status, and both's words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    paths = os.pathsep.join(
        [os.environ.get("PYTHONPATH", ""), *(str(ROOT / p) for p in ("tests", "tests/helpers"))]
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.pair", str(folder), stage],
            cwd=ROOT,
            env=os.environ | told | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": paths},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    words = [process.communicate(timeout=300)[1] for process in started]
    return started[0].returncode, words[0] + words[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two; the last is killed at a random step and goes on."""
    folder = tmp_path_factory.mktemp("pair") / f"killed-{random.randrange(6)}"
    folder.mkdir()
    for name in ("full", "roles"):
        told = pair.losses(pair.run_of(folder / f"{name}1", name))
        (folder / f"{name}1.json").write_text(json.dumps(told))
    pair.losses(pair.run_of(folder / "one", "full", HALF))
    status, words = two(folder, "first")
    assert status == -9, words
    assert (folder / "half.json").exists(), words
    status, words = two(folder, "second")
    assert status == 0, words
    return folder


def figures(path: Path) -> list[dict[str, float]]:
    return json.loads(path.read_text())


def same(one: dict[str, Any], other: dict[str, Any], atol: float = 0.0) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[key].float(), other[key].float(), atol=atol, rtol=0) for key in one
    )


@pytest.mark.parametrize("kind", ["full", "roles"])
def test_two_processes_have_the_losses_of_one(made: Path, kind: str) -> None:
    one, two = figures(made / f"{kind}1.json"), figures(made / f"{kind}.json")
    assert len(one) == len(two) == pair.STEPS[kind]
    for mine, theirs in zip(one, two, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert one[-1] != pytest.approx(one[0], abs=1e-3)


@pytest.mark.parametrize("kind", ["full", "roles"])
def test_the_first_process_finishes_with_whole_nets(made: Path, kind: str) -> None:
    one, two = (torch.load(made / f"{kind}{n}" / "finished.pt", weights_only=True) for n in (1, 2))
    assert one.keys() == two.keys()
    for name in one:
        assert same(one[name], two[name], 2e-4), name


def test_one_process_goes_on_where_two_stopped_and_two_where_one_did(made: Path) -> None:
    there = figures(made / "resharded.json")  # by two, after ten steps by one
    for mine, theirs in zip(figures(made / "full1.json")[HALF:], there, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    back = pair.losses(pair.run_of(made / "full2", "full", 2 * HALF + 5))
    straight = pair.losses(pair.run_of(made / "full1", "full", 2 * HALF + 5))
    assert len(back) == len(straight) == 5
    for mine, theirs in zip(back, straight, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


def test_two_killed_processes_go_on_bit_for_bit(made: Path) -> None:
    whole, cut = figures(made / "whole.json"), figures(made / "cut.json")
    assert 4 <= len(whole) - len(cut) < 10
    assert whole[-len(cut) :] == cut
    assert last_step(made / "cut") == last_step(made / "whole") == pair.STEPS["roles"]
    one, other = held(made / "cut"), held(made / "whole")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_half_precision_learns(made: Path) -> None:
    told = figures(made / "half.json")
    exact = figures(made / "full1.json")
    assert told[0]["flow"] == pytest.approx(exact[0]["flow"], rel=0.02) and told[0] != exact[0]


def test_sheets_scores_and_notes_are_of_the_run_and_not_of_a_process(made: Path) -> None:
    assert (made / "full2" / "sheets" / "0000020.png").exists()
    best, alone = read(made / "full2"), read(made / "full1")
    assert best and alone and best["metric"] == "score" and best["step"] in (10, 20, 25)
    assert json.loads((made / "cut" / "run.json").read_text())["processes"] == 2
    lines = [json.loads(line)["step"] for line in (made / "full2" / "log.jsonl").read_text().splitlines()]
    assert lines[:3] == [10, 20, 20]
