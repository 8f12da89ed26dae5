"""``fewstep ablate fashion`` on a small data set: from nothing to tables, and again from what is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tests.helpers import tiny_fashion

from fewstep.cli.app import run
from fewstep.experiments.subprocesses import ProcessGroup
from fewstep.fashion.train_teacher import new_teacher

pytestmark = pytest.mark.slow(60)

TINY = (
    "--replicates", "1", "--updates", "2", "--sweep-updates", "2", "--warm-start-steps", "2",
    "--samples", "20", "--images", "40", "--batch-size", "4", "--judge-steps", "2", "--device", "cpu",
)  # fmt: skip
ROWS = ("--only", "DMD, shared times, path", "--only", "LCM", "--only", "flash, shared times, path, heads")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run the commands of cells here, which saves the start of twenty processes; list their names."""
    started: list[str] = []

    def here(self: ProcessGroup, name: str, arguments: Sequence[str], *, threads: int = 0) -> int:
        started.append(name)
        assert run(list(arguments)) == 0
        return 1

    def in_turn(self: ProcessGroup, tasks: Sequence[Callable[[], None]], jobs: int) -> None:
        for task in tasks:
            task()

    monkeypatch.setattr(ProcessGroup, "run", here)
    monkeypatch.setattr(ProcessGroup, "all", in_turn)
    monkeypatch.setattr("fewstep.experiments.fashion.run.EXTENSIONS", 0)
    return started


def test_from_nothing_to_tables_and_again(
    tmp_path: Path, in_this_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_fashion.make(tmp_path / "data")
    out, results = tmp_path / "out", tmp_path / "results"
    new_teacher(16, 1, 0).save(out / "teacher" / "model")
    words = ["ablate", "fashion", "-o", str(out), "--results", str(results), "--data", str(tmp_path / "data")]
    words += [*TINY, *ROWS]
    assert run(words) == 0
    document = (out / "results.md").read_text()
    for row in (
        "teacher",
        "warm start",
        "LCM",
        "DMD, shared times, path",
        "flash, shared times, path, heads",
    ):
        assert f"| {row} |" in document, document
    cells = {path.name: json.loads(path.read_text()) for path in results.glob("*.json")}
    rates = {record["made_of"].get("rate") for record in cells.values() if record["made_of"]["row"] == "LCM"}
    assert len(rates) == 3  # all were tried
    one = next(each for name, each in cells.items() if name.startswith("dmd-shared-times-path.4.0"))
    assert one["passes"] == 25 and one["curve"][-1]["figures"]["frechet"]["value"] > 0
    lcm = next(each for name, each in cells.items() if name.startswith("lcm.4.0"))
    assert lcm["curve"][-1]["update"] == 8  # 2 updates of 25 passes are 8 of 6
    assert not list((out / "cells").iterdir())  # measured, and deleted

    before = {path: path.read_bytes() for path in results.iterdir()}
    in_this_process.clear()
    (out / "results.md").unlink()
    assert run(words) == 0
    assert in_this_process == []
    assert before == {path: path.read_bytes() for path in results.iterdir()}
    assert (out / "results.md").read_text() == document

    # One cell again, from scratch: the same figures.
    path = results / f"{next(name for name in cells if name.startswith('dmd-shared-times-path.4.0'))}"
    path.unlink()
    assert run(words) == 0
    again = json.loads(path.read_text())
    assert again["curve"] == one["curve"] and in_this_process == [path.stem]


def test_split_fine_tuning_and_gradients_end_in_tables(
    tmp_path: Path, in_this_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "split.BEFORE": 2,
        "split.SPLIT_UPDATES": 1,
        "split.PLAIN_UPDATES": 2,
        "split.RATIOS": (0.3, 1.0),
        "gradient.UPDATES": 2,
        "gradient.EVERY": 2,
        "gradient.DRAWS": 2,
        "gradient.REFERENCE_UPDATES": 2,
        "gradient.REFERENCE_DRAWS": 2,
        "run.PAIRS": (("renoise", "finals"),),
    }.items():
        monkeypatch.setattr(f"fewstep.experiments.fashion.{name}", value)
    tiny_fashion.make(tmp_path / "data")
    out = tmp_path / "out"
    new_teacher(16, 1, 0).save(out / "teacher" / "model")
    words = ["ablate", "fashion", "-o", str(out), "--data", str(tmp_path / "data"), *TINY]
    words += ["--only", "flash, shared times, path, heads"]
    assert run([*words, "--part", "primary", "--part", "split", "--part", "gradient"]) == 0
    split, plain = (
        json.loads(next((out / "results").glob(f"fine-tuning-{kind}.4.0.*.json")).read_text())
        for kind in ("split", "plain")
    )
    assert [point["late"] for point in split["ratios"]] == [0.3, 1.0]
    assert split["chosen"] in (0.3, 1.0)
    assert [point["update"] for point in plain["curve"]] == [0, 1, 2]
    gradient = json.loads((out / "results" / "gradient-renoise-finals.4.0.json").read_text())
    assert [each["step"] for each in gradient["measured"]] == [0, 2]
    document = (out / "results.md").read_text()
    for text in (
        "| before |",
        "| plain, 1 updates |",
        "| split, merged with 0.3 of late |",
        "| renoise, finals |",
    ):
        assert text in document, document
    assert not list((out / "cells").iterdir())


def test_results_of_another_protocol_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_fashion.make(tmp_path / "data")
    new_teacher(16, 1, 0).save(tmp_path / "out" / "teacher" / "model")
    words = ["ablate", "fashion", "-o", str(tmp_path / "out"), "--data", str(tmp_path / "data"), *TINY]
    words += ["--only", "LCM"]
    assert run(words) == 0
    capsys.readouterr()
    words[words.index("--batch-size") + 1] = "5"
    assert run(words) == 2
    assert "was measured with other options; move it away" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--only", "DMD3"], "--only DMD3: there is none; rows are trajectory, continued; LCM;"),
        (["--row", "mine"], "is not of the form NAME=METHOD OPTIONS"),
        (["--replicates", "0"], "--replicates must be at least 1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_made(
    tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ablate", "fashion", "-o", str(tmp_path / "out"), *more]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
