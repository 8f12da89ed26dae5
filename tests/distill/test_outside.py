"""A method from outside the package: one file, trained through the command line."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import taught
from fewstep.cli import app, train
from fewstep.core.types import UserError
from fewstep.distill.recipes import load_recipe
from fewstep.pipeline.loading import load_family

DOCUMENT = Path(__file__).parents[2] / "docs/adding-a-method.md"
[METHOD] = [
    block
    for block in re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    if "def recipe" in block
]
"""The example of the guide."""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module on the Python path that holds the method."""
    (tmp_path / "mymethods").mkdir()
    (tmp_path / "mymethods" / "clean_estimate.py").write_text(METHOD)
    (tmp_path / "mymethods" / "empty.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    yield "mymethods.clean_estimate"
    for name in [name for name in sys.modules if name.partition(".")[0] == "mymethods"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> taught.Taught:
    return taught.make(tmp_path_factory.mktemp("teacher"))


def test_it_is_trained_by_the_command_line(
    module: str, teacher: taught.Taught, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--teacher", str(teacher.teacher), "--samples", str(teacher.shards), "--device", "cpu"]
    options += ["--steps", "1", "--batch-size", "2", "--power", "1"]
    assert app.run(["distill", module, *options]) == 0, capsys.readouterr().err
    folder = tmp_path / "runs/clean-estimate"
    assert capsys.readouterr().out == "runs/clean-estimate\n"
    record = json.loads((folder / "run.json").read_text())
    assert (record["recipe"], record["power"]) == ("distill-clean-estimate", "1")
    assert "clean" in json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    assert load_family(str(folder / "model")).steps == 4


def test_its_help_lists_its_options(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["distill", f"{module}:recipe", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Regress the teacher's clean estimate." in text
    assert "--power" in text and "--student-steps" in text


def test_an_entry_point_names_it(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("clean", module, "fewstep.method")

    def points(group: str) -> list[EntryPoint]:
        return [point] if group == point.group else []

    monkeypatch.setattr("fewstep.core.plugins.entry_points", points)
    monkeypatch.setattr(train, "entry_points", points)
    assert load_recipe("clean") is load_recipe(module)
    with train.outside_method("clean"):
        assert "clean" in train.distill
    assert "clean" not in train.distill


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("mymethods.nosuch", "cannot import the method mymethods.nosuch"),
        ("mymethods.empty", "the method mymethods.empty has no function recipe"),
        ("mymethods.clean_estimate:nosuch", "cannot import the method mymethods.clean_estimate:nosuch"),
        ("trajektory", "trajektory"),
    ],
)
def test_a_method_that_is_not_there_is_one_line(
    module: str, method: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["distill", method, "--steps", "1"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_plain_name_that_is_no_method_lists_those_there_are() -> None:
    with pytest.raises(UserError, match="there is no method nosuch: give one of dmd, flash, ladd, lcm"):
        load_recipe("nosuch")
