"""``fewstep ablate``: two rows in processes of their own up to the document, and what equal compute is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import taught, tiny_stickers

import fewstep
from fewstep.cli.app import run
from fewstep.distill import merge, validation
from fewstep.experiments.grid import ROWS, Cell
from fewstep.experiments.subprocesses import ProcessGroup
from fewstep.train import checkpoint, train_step, trainer
from fewstep.train.run import Run

pytestmark = pytest.mark.slow(45)

ROWS_USED = ("LCM", "flash, split and merged")
FOLDERS = ("warm.4", "lcm.4.0", "flash-split-and-merged.4.0")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> taught.Taught:
    return taught.make(tmp_path_factory.mktemp("taught"))


def typed(made: taught.Taught, root: Path, warm: int) -> list[str]:
    words = ["ablate", "pocket", "--teacher", str(made.teacher), "--samples", str(made.shards)]
    words += [
        "--output",
        str(root / "out"),
        "--report",
        str(root / "results.md"),
        "--data",
        str(root / "data"),
    ]
    words += [
        "--student-steps",
        "4",
        "--seeds",
        "1",
        "--passes",
        "30",
        "--warm-start-steps",
        str(warm),
        "--batch-size",
        "2",
    ]
    words += [word for row in ROWS_USED for word in ("--rows", row)]
    words += ["--teacher-steps", "2", "--prompts", "4", "--images-per-prompt", "2", "--scenes", "0"]
    return [*words, "--device", "cpu", "--threads", "1"]


def begun(words: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(fewstep.__file__).parents[1])}
    command = [sys.executable, "-m", "fewstep", *words]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_rows_end_to_end_interrupted_and_done_once(
    made: taught.Taught, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_stickers.make(tmp_path / "data", 2)
    words, out = typed(made, tmp_path, warm=150), tmp_path / "out"
    first = begun(words)
    until = time.monotonic() + 120
    while not (out / "warm.4/log.jsonl").exists() or not (out / "warm.4/log.jsonl").stat().st_size:
        assert first.poll() is None and time.monotonic() < until, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)  # to this process alone, as `timeout --foreground` sends it
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130
    lines = [
        line for line in said.splitlines() if " so far" not in line
    ]  # what a slow machine says meanwhile
    assert lines == ["fewstep: warm.4", "fewstep: interrupted"]
    (saved,) = (int(path.name) for path in (out / "warm.4/checkpoints").glob("[0-9]*"))
    assert 20 <= saved < 150
    spent = json.loads((out / "warm.4/spent.json").read_text())
    assert spent["seconds"] > 0.5 and spent["since"] is None

    second = begun(words)
    printed, said = second.communicate(timeout=300)
    assert second.returncode == 0, said
    assert "fewstep: warm.4 resumes" in said
    assert printed == f"{tmp_path / 'results.md'}\n"
    costs = {name: json.loads((out / name / "cost.json").read_text()) for name in FOLDERS}
    assert costs["warm.4"]["seconds"] > spent["seconds"] + 0.5
    assert [costs[name]["begun"] for name in FOLDERS] == [2, 1, 1]
    assert all(cost["bytes"] > 1e8 and not cost["cut"] for cost in costs.values())
    document = (tmp_path / "results.md").read_text()
    for words_in in ("| warm start |", "| LCM |", "| flash, split and merged, 4 steps, seed 0: kid-t |"):
        assert words_in in document, document

    stamps = {path: path.stat().st_mtime_ns for name in FOLDERS for path in (out / name).rglob("*")}
    asked: list[str] = []
    monkeypatch.setattr(ProcessGroup, "run", lambda self, name, *_, **__: asked.append(name) or 0)
    assert run(words) == 0
    assert asked == ["fewstep evaluate"]  # which has its pictures already
    assert stamps == {path: path.stat().st_mtime_ns for name in FOLDERS for path in (out / name).rglob("*")}
    assert (tmp_path / "results.md").read_text() == document


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--rows", "DMD3"], "--rows DMD3: there is none; rows are trajectory; DMD2;"),
        (
            ["--samples", "nosuch"],
            "nosuch holds no plan.json; make samples there with: fewstep sample-teacher",
        ),
        (["--scenes", "13"], "--scenes must be a multiple of 12, or 0, not 13"),
        (["--scenes", "12", "--detector", "nosuch"], "nosuch: no such folder; give the scene detector"),
        (["--prompts", "1"], "--prompts must be at least 2"),
        (["--data", "nosuch"], "fewstep data stickers"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--rows", "flash, split and merged", "--student-steps", "2"], "nothing to compare"),
    ],
)
def test_what_cannot_end_well_is_refused_before_it_begins(
    made: taught.Taught, tmp_path: Path, more: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_stickers.make(tmp_path / "data", 1)
    words = [
        "ablate",
        "pocket",
        "--teacher",
        str(made.teacher),
        "--output",
        str(tmp_path / "out"),
        "--scenes",
        "0",
    ]
    usual = {"--data": str(tmp_path / "data"), "--samples": str(made.shards)}
    given = {option: value for option, value in usual.items() if option not in more}
    if "--scenes" in more:
        words = words[:-2]
    assert run([*words, *(word for pair in given.items() for word in pair), *more]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("steps", [4, 3, 2, 1])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_updates_spend_the_passes(row: Any, steps: int) -> None:
    told = row.updates(4000, steps)
    prices = {"--steps": row.cost, "--split-steps": row.split}
    spent = sum(many * (prices[name][0] * steps + prices[name][1]) for name, many in told.items())
    assert abs(spent - 4000) <= sum(p[0] * steps + p[1] for p in prices.values() if p) / 2
    assert row.updates(1, steps)["--steps"] == 1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_an_update_costs_what_the_row_says(
    row: Any, made: taught.Taught, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes are counted as they are made: a net that is called with gradients has a pass back too."""
    monkeypatch.setattr(merge, "RATIOS", (0.5,))
    monkeypatch.setattr(validation, "NUM_IMAGES", 4)
    counts: list[float] = []

    def counted(run: Run) -> None:
        rows = 0

        def note(net: torch.nn.Module, told: tuple[Any, ...], named: dict[str, Any]) -> None:
            nonlocal rows
            x = named["hidden_states"] if "hidden_states" in named else told[0]
            learns = x.requires_grad or any(p.requires_grad for p in net.parameters())
            rows += len(x) * (3 if learns and torch.is_grad_enabled() else 1)

        state = train_step.State(run)
        nets = {id(body.net): body.net for body in run.bodies}
        hooks = [net.register_forward_pre_hook(note, with_kwargs=True) for net in nets.values()]
        state.train_step()
        for hook in hooks:
            hook.remove()
        counts.append(rows / 2)
        checkpoint.save(run.folder, state.all(), state.step)
        assert run.finish is not None
        run.finish(state.finished())

    monkeypatch.setattr(trainer, "train", counted)
    cell = Cell(row, 4, 0)
    words = ["distill", *cell.arguments(1, made.teacher, 1e-4), "--teacher", str(made.teacher)]
    words += [
        "--samples",
        str(made.shards),
        "--batch-size",
        "2",
        "--device",
        "cpu",
        "--output",
        str(tmp_path),
    ]
    assert run(words) == 0
    assert counts == [4 * price[0] + price[1] for price in (row.cost, row.split) if price]
