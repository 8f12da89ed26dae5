"""An export target outside the package is one file, named by its import path or an entry point."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

import tiny
from fewstep.cli.app import run
from fewstep.core.types import UserError
from fewstep.export.base import find_target, targets
from fewstep.export.run import ExportOptions, export_model
from fewstep.families import sd3

TARGET = '''
"""Writes the shapes of the net's tensors as JSON."""

import json

FAMILIES = ("sd3",)
BITS = (32,)
T5 = False


def needs(bits):
    return ("json",)


def check(out):
    if out.exists():
        raise FileExistsError(f"{out} exists")


def export(family, out, bits, metadata):
    shapes = {name: list(tensor.shape) for name, tensor in family.net.state_dict().items()}
    out.write_text(json.dumps({"name": family.name, "license": metadata.license, "shapes": shapes}))
    return f"{len(shapes)} tensors"
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The import path of a module with the target."""
    (tmp_path / "code" / "mine").mkdir(parents=True)
    (tmp_path / "code" / "mine" / "shapes.py").write_text(TARGET)
    monkeypatch.syspath_prepend(tmp_path / "code")
    return "mine.shapes"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    sd3.save(sd3.assemble(tiny.parts(with_t5=False), name="small", steps=4, guidance=None), folder / "model")
    return folder / "model"


def test_the_command_line_exports_with_a_module_of_the_python_path(
    module: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shapes.json"
    assert run(["export", str(model), "--to", module, "--license", "MIT", "-o", str(out)]) == 0
    written = json.loads(out.read_text())
    assert (written["name"], written["license"]) == ("small", "MIT")
    assert written["shapes"]["proj_out.weight"]
    assert capsys.readouterr().out == f"small: {out}, {len(written['shapes'])} tensors\n"


def test_python_exports_with_it(module: str, model: Path, tmp_path: Path) -> None:
    line = export_model(str(model), tmp_path / "shapes.json", module, ExportOptions(name="other"))
    assert line.startswith(f"other: {tmp_path / 'shapes.json'}, ")
    assert json.loads((tmp_path / "shapes.json").read_text())["name"] == "other"


def test_its_options_are_checked_as_those_of_other_targets(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, line in (
        (["--bits", "8"], "bits for mine.shapes must be one of 32, not 8"),
        (["--t5", "keep"], "--t5 for mine.shapes must be one of drop, not keep"),
        (["--compute", "int8"], "--compute for mine.shapes must be float32, not int8: that takes"),
    ):
        assert run(["export", "x", "--to", module, *words, "-o", str(tmp_path / "out")]) == 2
        assert line in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_entry_point_names_it(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("shapes", module, "fewstep.target")

    def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
        return [point] if group == "fewstep.target" else []

    monkeypatch.setattr("fewstep.core.plugins.entry_points", entry_points)
    assert find_target("shapes").BITS == (32,)
    with pytest.raises(
        UserError, match=r"there is no target shape: give one of .*, shapes, or an import path"
    ):
        find_target("shape")


def test_what_is_no_target_is_one_line(module: str) -> None:
    for name, line in (
        ("base", "there is no target base: give one of coreml, diffusers, "),
        ("single_file", "there is no target single_file: give one of .* single-file, or an import path"),
        ("mine.nothing", "cannot import the target mine.nothing: "),
        (f"{module}:nothing", f"cannot import the target {module}:nothing: "),
        ("json.decoder", "json.decoder is no export target: it needs FAMILIES, BITS, T5, "),
    ):
        with pytest.raises(UserError, match=line) as caught:
            find_target(name)
        assert "\n" not in str(caught.value)


def test_the_targets_of_the_package_have_dashes() -> None:
    names = "coreml diffusers executorch genai gguf onnx openvino single-file"
    assert list(targets()) == names.split()
    assert all(find_target(name) is target for name, target in targets().items())
