"""Extensions are found by name in a package, by import path, and among entry points."""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from fewstep.core import plugins
from fewstep.core.types import UserError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package on the Python path with the modules ``plain``, ``with_dash`` and ``_private``."""
    name = "engines_of_a_test"
    (tmp_path / name).mkdir()
    for module in ("__init__", "plain", "with_dash", "_private"):
        (tmp_path / name / f"{module}.py").write_text(f"NAME = {module!r}\n")
    (tmp_path / "outside_of_a_test.py").write_text("class Engine:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return name


def test_the_public_modules_are_listed_with_dashes(package: str) -> None:
    assert plugins.names(package) == ["plain", "with-dash"]


@pytest.mark.parametrize(("spec", "module"), [("plain", "plain"), ("with-dash", "with_dash")])
def test_a_plain_name_is_a_module_of_the_package(package: str, spec: str, module: str) -> None:
    assert plugins.load(spec, package, "engine").NAME == module


def test_an_import_path_is_a_module_or_an_attribute_of_one(package: str) -> None:
    module: Any = plugins.load("outside_of_a_test:", package, "engine")
    assert module.__name__ == "outside_of_a_test"
    assert plugins.load("outside_of_a_test:Engine", package, "engine") is module.Engine
    assert plugins.load(f"{package}.plain", "fewstep.core", "engine").NAME == "plain"


def test_an_entry_point_comes_last(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("mine", "outside_of_a_test:Engine", "fewstep.engine"),
        EntryPoint("plain", "outside_of_a_test:Engine", "fewstep.engine"),
    ]

    def entry_points(group: str) -> list[EntryPoint]:
        return points if group == "fewstep.engine" else []

    monkeypatch.setattr(plugins, "entry_points", entry_points)
    assert plugins.load("mine", package, "engine").__name__ == "Engine"
    assert plugins.load("plain", package, "engine").NAME == "plain"  # of the package
    with pytest.raises(
        UserError, match="there is no engine other: give one of plain, with-dash, mine, plain,"
    ):
        plugins.load("other", package, "engine")
    with pytest.raises(UserError, match="there is no metric mine"):
        plugins.load("mine", package, "metric")


@pytest.mark.parametrize(
    "spec", ["no_such_module.x", "outside_of_a_test:Absent", ".relative", ":", "engines_of_a_test._no"]
)
def test_what_cannot_be_imported_is_one_line(package: str, spec: str) -> None:
    with pytest.raises(UserError) as caught:
        plugins.load(spec, package, "engine")
    assert str(caught.value).startswith(f"cannot import the engine {spec}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["_private", "", "with_dash "])
def test_a_name_that_is_not_public_is_unknown(package: str, spec: str) -> None:
    with pytest.raises(UserError, match="give one of plain, with-dash, or an import path"):
        plugins.load(spec, package, "engine")


@pytest.mark.parametrize(
    ("code", "reason"),
    [("def", "SyntaxError"), ("1 / 0", "ZeroDivisionError"), ("raise SystemError", "SystemError")],
)
def test_an_extension_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    (tmp_path / "failing_of_a_test.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=f"cannot import the engine failing_of_a_test:: {reason}"):
        plugins.load_external("failing_of_a_test:", "engine")
    point = EntryPoint("broken", "failing_of_a_test", "fewstep.engine")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == point.group else [])
    with pytest.raises(UserError, match=f"cannot import the engine broken: {reason}"):
        plugins.load_external("broken", "engine")
