"""Resuming is exact, stopping is clean, divergence is said, and only the nets whose turn it is move."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.worker import run_of

from fewstep.train.checkpoint import LAST
from fewstep.train.trainer import State, train
from fewstep.types import UserError

WORKER = Path(__file__).with_name("worker.py")


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / LAST, weights_only=True)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def interrupted(folder: Path, number: signal.Signals, steps: int) -> int:
    """Start the worker, send it a signal once a checkpoint is there, and tell how it ended."""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.train.worker", str(folder), str(steps), "0.02"], cwd=root
    )
    until = time.monotonic() + 60
    while not (folder / LAST).exists() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait(60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_ends_bit_identical(tmp_path: Path, number: signal.Signals) -> None:
    assert interrupted(tmp_path / "cut", number, 400) != 0
    reached = checkpoint(tmp_path / "cut")["step"]
    assert 0 < reached < 400
    train(run_of(tmp_path / "cut", reached + 7))
    train(run_of(tmp_path / "whole", reached + 7, save_minutes=60.0))
    assert same(checkpoint(tmp_path / "cut"), checkpoint(tmp_path / "whole"))


def test_a_checkpoint_cut_short_is_said_and_kept(tmp_path: Path) -> None:
    train(run_of(tmp_path, 3))
    whole = (tmp_path / LAST).read_bytes()
    (tmp_path / LAST).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be resumed"):
        train(run_of(tmp_path, 5))
    assert (tmp_path / LAST).stat().st_size == len(whole) // 2


@pytest.mark.parametrize("data", [b"", b"junk", b"PK\x03\x04"])
def test_a_broken_checkpoint_is_one_line(tmp_path: Path, data: bytes) -> None:
    tmp_path.joinpath(LAST).write_bytes(data)
    with pytest.raises(UserError, match="cannot be resumed") as caught:
        train(run_of(tmp_path, 2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_broken_note_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        train(run_of(tmp_path, 2))


def test_other_frozen_parts_are_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, 1)
    run.about["made_of"] = {"codec": "one"}
    train(run)
    again = run_of(tmp_path, 2)
    again.about["made_of"] = {"codec": "another"}
    with pytest.raises(UserError, match="another codec"):
        train(again)


def test_the_folder_says_how_it_was_trained(tmp_path: Path) -> None:
    train(run_of(tmp_path, 2))
    assert json.loads((tmp_path / "run.json").read_text())["options"]["steps"] == 2


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    train(run_of(tmp_path, 1))
    (tmp_path / "run.json").write_text(json.dumps({"recipe": "other"}))
    with pytest.raises(UserError, match="holds a run of other"):
        train(run_of(tmp_path, 2))


def test_divergence_stops_and_the_last_checkpoint_resumes(tmp_path: Path) -> None:
    train(run_of(tmp_path, 3))
    broken = run_of(tmp_path, 6)
    object.__setattr__(broken, "batches", lambda step, share: torch.full((8, 4), float("nan")))
    with pytest.raises(UserError, match="not finite"):
        train(broken)
    train(run_of(tmp_path, 6))
    assert checkpoint(tmp_path)["step"] == 6


def test_a_turn_moves_only_its_net(tmp_path: Path) -> None:
    state = State(run_of(tmp_path, 4))
    before = {name: [p.clone() for p in net.parameters()] for name, net in state.nets.items()}
    state.advance()  # step 0: only the first net's turn
    moved = {n: any(not torch.equal(p, q) for p, q in zip(before[n], net.parameters(), strict=True))
             for n, net in state.nets.items()}  # fmt: skip
    assert moved == {"first": True, "second": False}


def test_the_log_is_readable_and_goes_on(tmp_path: Path) -> None:
    train(run_of(tmp_path, 40))
    train(run_of(tmp_path, 60))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert lines[-1]["square"] < lines[0]["square"]


def test_the_average_trails_the_net(tmp_path: Path) -> None:
    state = State(run_of(tmp_path, 50, ema=0.9))
    for _ in range(30):
        state.advance()
    net, average = state.nets["first"].weight, state.averaged()["first"].weight
    assert not torch.equal(net, average)
    assert (net - average).abs().max() < 0.1
