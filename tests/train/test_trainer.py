"""Resuming is exact, stopping is clean, divergence is said, and only the nets whose turn it is move."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers.held import held
from tests.helpers.worker import run_of

from fewstep.core.types import BatchSlice, UserError
from fewstep.train.checkpoint import FOLDER, last_step
from fewstep.train.device import rows_on_device as on_device
from fewstep.train.run import TrainOptions
from fewstep.train.train_step import State
from fewstep.train.trainer import USED, WARMUP_STEPS, TimeBudget, train

pytestmark = pytest.mark.slow(10)

WORKER = Path(__file__).with_name("worker.py")


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
        [sys.executable, "-m", "tests.helpers.worker", str(folder), str(steps), "0.02"], cwd=root
    )
    until = time.monotonic() + 120
    while not last_step(folder) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait(60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_ends_bit_identical(tmp_path: Path, number: signal.Signals) -> None:
    assert interrupted(tmp_path / "cut", number, 400) != 0
    reached = last_step(tmp_path / "cut")
    assert 0 < reached < 400
    train(run_of(tmp_path / "cut", reached + 7))
    train(run_of(tmp_path / "whole", reached + 7, save_minutes=60.0))
    assert same(held(tmp_path / "cut"), held(tmp_path / "whole"))


def test_a_cluster_that_asks_twice_to_stop_is_a_clean_stop(tmp_path: Path) -> None:
    run = run_of(tmp_path, 9, save_minutes=60.0)

    def batches(step: int, share: BatchSlice) -> torch.Tensor:
        for _ in range(2 * (step == 4)):
            os.kill(os.getpid(), signal.SIGTERM)
        return run.batches(step, share)

    with pytest.raises(KeyboardInterrupt):
        train(replace(run, batches=batches))
    assert last_step(tmp_path) == 5
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_checkpoint_before_a_broken_one_is_taken_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(run_of(tmp_path / "cut", 4))
    capsys.readouterr()
    last = tmp_path / "cut" / FOLDER / "00000004"
    for name, words in (
        ("__0_0.distcp", "is cut short"),
        (".metadata", "is missing"),
        ("whole.json", "is missing"),
    ):
        path = last / name
        whole = path.read_bytes()
        if words == "is missing":
            path.unlink()
        else:
            path.write_bytes(whole[: len(whole) // 2])
        assert State(run_of(tmp_path / "cut", 6)).step == 3
        said = capsys.readouterr().err
        assert f"{name} {words}" in said and said.count("\n") == 1
        path.write_bytes(whole)
    last.joinpath("__0_0.distcp").write_bytes(b"")
    train(run_of(tmp_path / "cut", 6))
    train(run_of(tmp_path / "whole", 6))
    assert same(held(tmp_path / "cut"), held(tmp_path / "whole"))


def test_a_checkpoint_with_other_bytes_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(run_of(tmp_path, 4))
    for path in (tmp_path / FOLDER / "00000004").glob("*.distcp"):
        path.write_bytes(b"x" * path.stat().st_size)
    assert State(run_of(tmp_path, 6)).step == 3
    assert "going on from the one before" in capsys.readouterr().err


def test_two_are_kept_and_none_readable_is_one_line(tmp_path: Path) -> None:
    train(run_of(tmp_path, 4))
    there = sorted((tmp_path / FOLDER).iterdir())
    assert [path.name for path in there] == ["00000003", "00000004"]
    for path in there:
        path.joinpath(".metadata").write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be resumed") as caught:
        train(run_of(tmp_path, 5))
    assert "\n" not in str(caught.value)
    assert sorted((tmp_path / FOLDER).iterdir()) == there


def test_a_full_disk_costs_the_new_checkpoint_alone(tmp_path: Path) -> None:
    state = State(run_of(tmp_path, 6))
    state.train_step()
    from fewstep.train.checkpoint import save

    save(tmp_path, state.all(), state.step)
    state.train_step()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # no file may grow beyond this
    try:
        with pytest.raises(UserError, match="the earlier checkpoint is kept") as caught:
            save(tmp_path, state.all(), state.step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["00000001"]
    assert State(run_of(tmp_path, 6)).step == 1


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    left = tmp_path / FOLDER / ".00000009.part"
    left.mkdir(parents=True)
    train(run_of(tmp_path, 2))
    assert not left.exists()


def test_other_nets_are_refused_and_nothing_is_dropped(tmp_path: Path) -> None:
    train(run_of(tmp_path, 2))
    other = run_of(tmp_path, 4)
    other.method.nets["first"] = torch.nn.Linear(4, 5)  # type: ignore[index]
    with pytest.raises(UserError, match="of other nets"):
        train(other)
    assert State(run_of(tmp_path, 4)).step == 2


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_broken_note_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        train(run_of(tmp_path, 2))


def test_other_frozen_parts_are_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, 1)
    run.record["made_of"] = {"codec": "one"}
    train(run)
    again = run_of(tmp_path, 2)
    again.record["made_of"] = {"codec": "another"}
    with pytest.raises(UserError, match="another codec"):
        train(again)


def test_the_folder_says_how_it_was_trained(tmp_path: Path) -> None:
    train(run_of(tmp_path, 2))
    told = json.loads((tmp_path / "run.json").read_text())
    assert told["options"]["steps"] == 2 and told["processes"] == 1
    assert told["versions"]["torch"] == torch.__version__.split("+")[0] or told["versions"]["torch"]
    assert {"python", "fewstep", "diffusers", "numpy"} <= told["versions"].keys() and told["device"]


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
    assert last_step(tmp_path) == 6


def test_a_turn_moves_only_its_net(tmp_path: Path) -> None:
    state = State(run_of(tmp_path, 4))
    before = {name: [p.clone() for p in net.parameters()] for name, net in state.nets.items()}
    state.train_step()  # step 0: only the first net's turn
    moved = {n: any(not torch.equal(p, q) for p, q in zip(before[n], net.parameters(), strict=True))
             for n, net in state.nets.items()}  # fmt: skip
    assert moved == {"first": True, "second": False}


def test_the_log_is_readable_and_goes_on(tmp_path: Path) -> None:
    train(run_of(tmp_path, 40))
    train(run_of(tmp_path, 60))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert lines[-1]["square"] < lines[0]["square"]


def test_a_killed_runs_unsaved_lines_leave_the_log(tmp_path: Path) -> None:
    train(run_of(tmp_path, 4, log_every=1))
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "square": 9}\n{"step": 6, "squ')
    train(run_of(tmp_path, 6, log_every=1))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[4]["square"] != 9


def test_the_average_trails_the_net_and_looking_at_it_changes_nothing(tmp_path: Path) -> None:
    state = State(run_of(tmp_path, 50, ema=0.9))
    for _ in range(30):
        state.train_step()
    before = {key: value.clone() for key, value in state.nets["first"].state_dict().items()}
    with state.averaged() as nets:
        average = nets["first"].weight.clone()
        assert not nets["first"].training and not nets["first"](torch.zeros(1, 4)).requires_grad
    assert state.nets["first"].training and same(before, dict(state.nets["first"].state_dict()))
    assert torch.equal(state.averages["first"].values["weight"], average)
    assert not torch.equal(before["weight"], average)
    assert (before["weight"] - average).abs().max() < 0.1


def test_sheets_and_scores_do_not_change_what_is_learnt(tmp_path: Path) -> None:
    train(run_of(tmp_path / "plain", 6))
    scored = run_of(
        tmp_path / "scored", 6, score=lambda nets: float(nets["first"].weight.norm()), validate_every=2
    )
    train(scored)
    assert same(held(tmp_path / "plain"), held(tmp_path / "scored"))


def test_micro_batches_are_the_batch(tmp_path: Path) -> None:
    whole, pieces = (
        State(run_of(tmp_path / str(many), 9, gradient_accumulation_steps=many, precision="fp32"))
        for many in (1, 4)
    )
    for state in (whole, pieces):  # dropout alone is drawn for each piece on its own
        state.nets["second"][1].p = 0.0
    for _ in range(8):
        one, other = whole.train_step(), pieces.train_step()
        assert one == pytest.approx(other, abs=1e-5)
    assert torch.allclose(whole.nets["first"].weight, pieces.nets["first"].weight, atol=1e-5)


def test_a_batch_that_cannot_be_cut_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="8 cannot be cut into 3"):
        train(run_of(tmp_path, 2, gradient_accumulation_steps=3))


def test_a_run_of_minutes_ends_by_itself(tmp_path: Path) -> None:
    train(replace(run_of(tmp_path, 10**6, max_minutes=0.02), preview=None))
    reached = last_step(tmp_path)
    assert 2 * WARMUP_STEPS <= reached < 10**6
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == reached


def test_steps_fit_into_the_minutes_whatever_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("fewstep.train.trainer.time.monotonic", lambda: now[0])
    options, clock = TrainOptions(10**6, 1e-3, max_minutes=10.0), TimeBudget(100, 0.0)
    seconds = {101: 60.0}  # the first step compiles, the others take half a second
    for step in range(101, 100 + 10**4):
        now[0] += seconds.get(step, 0.5)
        options = clock.limit(options, step)
    assert options.steps == 100 + 1 + int((USED * 600 - 60) / 0.5)
    assert TrainOptions(10, 1e-3, max_minutes=0).max_minutes == 0
    with pytest.raises(UserError, match="--max-minutes"):
        TrainOptions(10, 1e-3, max_minutes=-1)


def test_rows_are_read_where_they_lie() -> None:
    array = np.arange(12, dtype=np.float16).reshape(4, 3)
    rows = on_device(array, "cpu")([3, 0, 3])
    assert rows.dtype == torch.float32 and rows[:, 0].tolist() == [9, 0, 9]
