"""The best averaged nets are kept, by name of the metric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.worker import run_of

from fewstep.core.types import UserError
from fewstep.train.best_checkpoint import FOLDER, best, read
from fewstep.train.train_step import State
from fewstep.train.trainer import train


def scored(folder: Path, values: list[float], steps: int = 8, **options: Any) -> Any:
    """A run whose scores are these, one every two steps."""
    seen = iter(values)
    options = {"metric": "kid", "validate_every": 2, "log_every": 4} | options
    return run_of(folder, steps, score=lambda nets: next(seen), **options)


@pytest.mark.parametrize(("higher", "step", "value"), [(False, 4, 1.0), (True, 6, 9.0)])
def test_the_best_is_kept_and_named(tmp_path: Path, higher: bool, step: int, value: float) -> None:
    train(scored(tmp_path, [3.0, 1.0, 9.0, 2.0], higher=higher))
    assert read(tmp_path) == {"step": step, "metric": "kid", "value": value}
    until = run_of(tmp_path / "until", step)  # a run that ended there has the same averages
    object.__setattr__(until, "options", scored(tmp_path, []).options)
    state = State(until)
    for _ in range(step):
        state.train_step()
    kept = best(scored(tmp_path, []))
    with state.averaged() as nets:
        for name, net in nets.items():
            for key, tensor in net.state_dict().items():
                assert torch.equal(kept[name].state_dict()[key], tensor)


def test_scores_are_in_the_log_and_nothing_that_is_no_number_is_the_best(tmp_path: Path) -> None:
    train(scored(tmp_path, [float("nan"), 2.0, float("inf"), 3.0]))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "kid" in line] == [2, 4, 6, 8]
    assert read(tmp_path) == {"step": 4, "metric": "kid", "value": 2.0}


def test_a_run_that_goes_on_remembers_its_best(tmp_path: Path) -> None:
    train(scored(tmp_path, [1.0, 2.0], 4))
    train(scored(tmp_path, [3.0, 0.5], 8))
    assert read(tmp_path) == {"step": 8, "metric": "kid", "value": 0.5}
    train(scored(tmp_path, [9.0], 10, metric="clip"))
    assert read(tmp_path) == {"step": 10, "metric": "clip", "value": 9.0}  # another metric: no comparison


def test_none_or_broken_ones_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no best nets"):
        best(run_of(tmp_path, 1))
    train(scored(tmp_path, [1.0], 2))
    (tmp_path / FOLDER / "first.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read"):
        best(run_of(tmp_path, 1))
    (tmp_path / FOLDER / "best.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        best(run_of(tmp_path, 1))
