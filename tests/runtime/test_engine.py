"""A runtime engine from outside the package opens a bundle of its own kind, or one of a known kind."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest

import fewstep
from fewstep.cli.app import run
from fewstep.core.types import UserError
from fewstep.runtime.bundle import SUFFIXES, write_manifest
from fewstep.runtime.engine import MODULES
from tiny_bundle import write_bundle

ENGINE = """
from fewstep.runtime import ort

FORMAT = {format!r}
SUFFIXES = {suffixes!r}
OPENED = []


def open_graph(bundle, stem, threads):
    OPENED.append(stem)
    return ort.Graph(bundle.graph(stem), threads)
"""


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package on the Python path with an engine for its own kind, one for ONNX, and one that is none."""
    package = f"runtime_engines_{re.sub(r'[^a-z0-9]', '', tmp_path.name)}"
    folder = tmp_path / package
    folder.mkdir()
    (folder / "own.py").write_text(ENGINE.format(format="mine", suffixes=(".net",)))
    (folder / "known.py").write_text(ENGINE.format(format="onnx", suffixes=(".onnx",)))
    (folder / "none.py").write_text("FORMAT, SUFFIXES = 'mine', ('.net',)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return package


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A bundle for the engine ``mine``, whose graphs are ``.net`` files."""
    folder = write_bundle(tmp_path / "foreign").folder
    facts = json.loads((folder / "bundle.json").read_text())
    for path in [*folder.glob("*.onnx")]:
        path.rename(path.with_suffix(".net"))
    facts = {key: value for key, value in facts.items() if key not in ("format", "files")}
    write_manifest(folder, facts | {"engine": "mine"}, {"mine": (".net",)})
    return folder


def test_the_engines_here_follow_the_protocol() -> None:
    """Read, not imported: not every library is installed."""
    assert MODULES.keys() == SUFFIXES.keys()
    for name, module in MODULES.items():
        tree = ast.parse((Path(fewstep.__file__).parent / f"runtime/{module}.py").read_text())
        constants = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id in ("FORMAT", "SUFFIXES")
        }
        assert constants == {"FORMAT": name, "SUFFIXES": SUFFIXES[name]}
        assert "open_graph" in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_an_engine_from_outside_opens_its_bundle(tmp_path: Path, engines: str, foreign: Path) -> None:
    write_bundle(tmp_path / "onnx")
    expected = fewstep.load(tmp_path / "onnx", threads=1)("a cat", seed=1)[0]
    pipe = fewstep.load(foreign, backend=f"{engines}.own", threads=1)
    assert (np.asarray(pipe("a cat", seed=1)[0]) == np.asarray(expected)).all()
    assert pipe.bundle is not None and pipe.bundle.engine == "mine" and "mine" in repr(pipe)


def test_the_command_line_takes_an_engine_from_outside(tmp_path: Path, engines: str, foreign: Path) -> None:
    words = ["generate", "a cat", "--model", str(foreign), "-o", str(tmp_path / "a.png")]
    assert run([*words, "--backend", f"{engines}.own"]) == 0
    assert (tmp_path / "a.png").is_file()


def test_an_engine_from_outside_opens_a_known_bundle(tmp_path: Path, engines: str) -> None:
    import importlib

    write_bundle(tmp_path / "onnx")
    pipe = fewstep.load(tmp_path / "onnx", backend=f"{engines}.known", threads=1)
    pipe("a cat", seed=1)
    opened = importlib.import_module(f"{engines}.known").OPENED
    assert opened == ["transformer", "text", "modulation", "decoder"]


def test_a_bundle_never_names_a_module(engines: str, foreign: Path) -> None:
    with pytest.raises(UserError, match=r"for 'mine', which this fewstep does not know: .* with --backend"):
        fewstep.load(foreign)
    path = foreign / "bundle.json"
    path.write_text(path.read_text().replace('"mine"', f'"{engines}.own"'))
    with pytest.raises(UserError, match="does not know"):
        fewstep.load(foreign)


def test_another_engine_or_none_is_one_line(tmp_path: Path, engines: str, foreign: Path) -> None:
    write_bundle(tmp_path / "onnx")
    for folder, backend, message in (
        (tmp_path / "onnx", f"{engines}.own", "runs on onnx, not on mine: give a bundle for that engine"),
        (foreign, f"{engines}.known", "is for 'mine', which this fewstep does not know"),
        (foreign, f"{engines}.none", f"the runtime engine {engines}.none has no open_graph"),
        (foreign, f"{engines}.absent", f"cannot import the runtime engine {engines}.absent: "),
        (
            foreign,
            "absent",
            "there is no runtime engine absent: give one of onnx, openvino, executorch, torch, or",
        ),
    ):
        with pytest.raises(UserError) as caught:
            fewstep.load(folder, backend=backend)
        assert message in str(caught.value)
