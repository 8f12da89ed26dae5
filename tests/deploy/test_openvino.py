"""A bundle for OpenVINO draws what its family draws, and no torch is needed for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep.runtime
import tiny
from fewstep import sample, source, times
from fewstep.deploy import Facts
from fewstep.deploy import openvino as engine
from fewstep.deploy.common import graphs
from fewstep.families import Family, sd3
from fewstep.runtime.bundle import Bundle, read, seal
from fewstep.runtime.model import open_bundle
from fewstep.runtime.openvino import Graph, openvino
from fewstep.types import Model, UserError

PROMPTS = ["a red apple, 3D style", "two blue cars", "x"]


def draw(model: Model, rows: slice = slice(0, 3)) -> np.ndarray:
    """Pictures ``[B, 3, h, w]`` of these prompts and seeds, in four steps."""
    with torch.no_grad():
        cond = model.text(PROMPTS[rows])
        noise = model.lift(sample.noises([0, 1, 2][rows], model.latent))
        latents = sample.walk(model.velocity, noise, times.grid(4, model.shift), cond)
        return model.lower(model.codec.decode(latents))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, against the range that the pictures use."""
    return float(20 * np.log10(np.ptp(a) / np.sqrt(np.square(a - b).mean())))


@pytest.fixture(scope="module")
def small() -> Family:
    return sd3.assemble(tiny.parts(with_t5=False), name="small", steps=4, guidance=None)


@pytest.fixture(scope="module")
def bundles(small: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Bundle]:
    """Of 16, 8 and 4 bits; the tests below share them, since tracing takes seconds."""
    folder = tmp_path_factory.mktemp("openvino")
    kept = iter([graphs.trace(part) for part in graphs.parts(small).values()] * len(engine.BITS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "trace", lambda part: next(kept))
        for bits in engine.BITS:
            engine.export(small, folder / str(bits), bits, Facts(license="Apache-2.0"))
    return {bits: read(folder / str(bits)) for bits in engine.BITS}


@pytest.fixture(scope="module")
def theirs(small: Family) -> np.ndarray:
    return draw(small)


@pytest.mark.parametrize(("bits", "least"), [(16, 65), (8, 48), (4, 42)])
def test_a_bundle_draws_what_its_family_draws(
    theirs: np.ndarray, bundles: dict[int, Bundle], bits: int, least: float
) -> None:
    ours = draw(open_bundle(bundles[bits], threads=1))
    assert theirs.std() > 0.05
    assert psnr(theirs, ours) > least


@pytest.mark.parametrize("bits", engine.BITS)
def test_a_picture_does_not_depend_on_its_batch(bundles: dict[int, Bundle], bits: int) -> None:
    model = open_bundle(bundles[bits], threads=1)
    assert np.abs(draw(model)[1:2] - draw(model, slice(1, 2))).max() < 1e-4


def test_the_encoder_encodes(small: Family, bundles: dict[int, Bundle]) -> None:
    images = sample.noises([3], (3, 64, 64)).clip(-1, 1)
    theirs = small.codec.encode(torch.from_numpy(images)).numpy()
    ours = open_bundle(bundles[16], threads=1).codec.encode(images)
    assert psnr(theirs, ours) > 55


def test_fewer_bits_are_fewer_bytes(bundles: dict[int, Bundle]) -> None:
    def weights(bundle: Bundle) -> int:
        return sum(stamp.bytes for name, stamp in bundle.files.items() if name.endswith(".bin"))

    assert weights(bundles[16]) > weights(bundles[8]) > weights(bundles[4])
    assert {bundle.engine for bundle in bundles.values()} == {"openvino"}


def test_nothing_of_this_machine_is_in_the_files(bundles: dict[int, Bundle]) -> None:
    places = [str(Path(fewstep.__file__).parents[2]), str(Path(torch.__file__).parents[1])]
    for name in bundles[4].files:
        data = bundles[4].path(name).read_bytes()
        assert not [place for place in (*places, tempfile.gettempdir()) if place.encode() in data], name


def test_generation_needs_neither_torch_nor_onnxruntime_and_tells_nobody(
    bundles: dict[int, Bundle], tmp_path: Path
) -> None:
    code = f"""
import sys, fewstep
pipe = fewstep.load({str(bundles[8].folder)!r}, threads=1)
first = pipe("a red apple", seed=1)[0]
assert pipe("a red apple", seed=1, image=first, strength=0.0)[0].size == first.size
heavy = {{"torch", "onnx", "onnxruntime", "diffusers", "transformers", "nncf"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert sys.modules["openvino_telemetry"] is None
"""
    home = os.environ | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=home)
    assert not list(tmp_path.iterdir())


def test_nncf_tells_nobody(bundles: dict[int, Bundle]) -> None:
    from nncf.telemetry import wrapper

    assert bundles and not hasattr(wrapper, "Telemetry")


def test_several_threads_may_draw_at_once(bundles: dict[int, Bundle]) -> None:
    model = open_bundle(bundles[8], threads=1)
    alone = draw(model)
    with ThreadPoolExecutor(2) as pool:
        for pictures in pool.map(lambda _: draw(model), range(4)):
            assert np.array_equal(pictures, alone)


def test_weights_too_many_for_one_message(
    small: Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They lie beside the ONNX file, of which nothing is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(graphs, "LARGEST", 20_000)
    part = graphs.parts(small)["modulation"]
    graph = engine._converted(part)
    assert not list(tmp_path.iterdir())
    openvino.save_model(graph, tmp_path / "modulation.xml", compress_to_fp16=False)
    with torch.no_grad():
        theirs = part.module(**part.inputs).numpy()
    feeds = {name: tensor.numpy() for name, tensor in part.inputs.items()}
    assert np.abs(Graph(tmp_path / "modulation.xml", 1)(**feeds)[0] - theirs).max() < 1e-4


def test_a_damaged_graph_is_one_clear_line(bundles: dict[int, Bundle], tmp_path: Path) -> None:
    shutil.copytree(bundles[8].folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "text.xml").write_bytes(b"not a graph")
    with pytest.raises(UserError, match=r"text\.xml has 11 bytes instead of"):
        fewstep.load(tmp_path)
    with pytest.raises(UserError, match=r"text\.xml cannot be loaded by OpenVINO: ") as caught:
        Graph(tmp_path / "text.xml", 1)(tokens=np.zeros((1, tiny.LENGTH), np.int64))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"decoder\.xml does not fit its bundle: ") as caught:
        Graph(tmp_path / "decoder.xml", 1)(x=np.zeros((1, 4, 8, 8), np.float32))
    assert "\n" not in str(caught.value)
    (tmp_path / "text.bin").unlink()
    with pytest.raises(UserError, match=r"model small has no text\.bin"):
        seal(tmp_path, facts(bundles[8]))


def test_an_unknown_engine_is_one_clear_line(bundles: dict[int, Bundle], tmp_path: Path) -> None:
    shutil.copytree(bundles[8].folder, tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match="is for 'abacus', which this fewstep does not know"):
        seal(tmp_path, facts(bundles[8]) | {"engine": "abacus"})


def facts(bundle: Bundle) -> dict[str, Any]:
    told = json.loads((bundle.folder / "bundle.json").read_text())
    return {name: value for name, value in told.items() if name not in ("format", "files")}


def test_a_backend_that_is_not_the_bundles(bundles: dict[int, Bundle]) -> None:
    folder = bundles[8].folder
    fewstep.load(folder, backend="openvino", threads=1)
    with pytest.raises(UserError, match="runs on openvino, not on onnx: `fewstep export --to onnx`"):
        fewstep.load(folder, backend="onnx")
    with pytest.raises(UserError, match="runs on openvino, not on torch: give a diffusers folder"):
        fewstep.load(folder, backend="torch")


@pytest.mark.parametrize(("module", "extra"), [("openvino", "openvino"), ("nncf", "export")])
def test_what_is_not_installed_is_named(
    bundles: dict[int, Bundle], small: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    module: str, extra: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("fewstep.runtime.openvino", "fewstep.deploy.openvino"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(fewstep.runtime, "openvino")
    with pytest.raises(ImportError) as caught:
        engine.export(small, tmp_path / "b", 8, Facts())
    assert f"fewstep[{extra}]" in str(source.missing_extra(caught.value))
    assert not list(tmp_path.iterdir())
    if module == "openvino":
        with pytest.raises(UserError, match=r"needs openvino.*pip install 'fewstep\[openvino\]'"):
            fewstep.load(bundles[8].folder)
