"""A bundle for OpenVINO draws what its family draws, and no torch is needed for it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers.drawn import draw, psnr

if missing := [name for name in ("openvino", "nncf") if find_spec(name) is None]:
    pytest.skip(f"{' and '.join(missing)}: not installed", allow_module_level=True)

import fewstep.runtime
import tiny
import tiny_flux
from fewstep.bench import hardware
from fewstep.cli.app import run
from fewstep.core import sampling
from fewstep.core.optional import install
from fewstep.core.types import UserError
from fewstep.export import common, onnx
from fewstep.export import openvino as engine
from fewstep.export.base import ExportMetadata
from fewstep.export.common import graphs, openvino_ir
from fewstep.families import flux, sd3
from fewstep.families.base import Family
from fewstep.pipeline.resolve import SHIPPED
from fewstep.runtime import openvino as runtime
from fewstep.runtime.bundle import Bundle, read, write_manifest
from fewstep.runtime.model import open_bundle
from fewstep.runtime.openvino import Graph, openvino

pytestmark = pytest.mark.slow(30)

INTEGERS = "avx512_vnni" in hardware.describe()["instructions"]
"""Without such instructions activations may stay as they are."""


@pytest.fixture(scope="module")
def bundles(small: Family, trace_once: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Bundle]:
    """Of 16, 8 and 4 bits, as the command line writes them."""
    folder = tmp_path_factory.mktemp("openvino")
    sd3.save(small, folder / "run" / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_ir, "trace", trace_once)
        for bits in engine.BITS:
            words = ["export", str(folder / "run"), "--to", "openvino", "--bits", str(bits)]
            assert run([*words, "-o", str(folder / str(bits))]) == 0
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
    assert np.abs(draw(model)[1:2] - draw(model, slice(1, 2))).max() < 1e-4  # a grey level is 8e-3


@pytest.fixture(scope="module", params=[(16, "bfloat16"), (8, "int8")], ids=["bfloat16", "int8"])
def coarse(
    bundles: dict[int, Bundle],
    trace_once: Any,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Bundle:
    """To be computed in less than float32, as the command line writes it."""
    folder, (bits, compute) = tmp_path_factory.mktemp("coarse"), request.param
    model = str(bundles[bits].folder.parent / "run")
    words = ["export", model, "--to", "openvino", "--bits", str(bits), "--compute", compute]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_ir, "trace", trace_once)
        assert run([*words, "-o", str(folder / "out")]) == 0
    return read(folder / "out")


def test_computed_coarsely_a_picture_is_nearly_the_same_and_the_same_in_every_batch(
    theirs: np.ndarray, coarse: Bundle
) -> None:
    model = open_bundle(coarse, threads=1)
    net, text = model.velocity.graph, model.text.graph
    assert (net.compute, text.compute) == (coarse.compute, runtime.compute_dtype("text", coarse.compute))
    assert psnr(theirs, draw(model)) > 38
    together, alone = draw(model)[1:2], draw(model, slice(1, 2))
    if coarse.compute == "bfloat16":
        assert np.abs(together - alone).max() < 1e-4
    else:  # a last digit may be a level, where widths are no multiples of what the kernels take at once
        assert psnr(together, alone) > 45


def test_in_int8_each_token_has_scales_of_its_own(tmp_path: Path) -> None:
    """Neighbours a hundred times as large would flatten it if they shared one."""
    rng = np.random.default_rng(0)
    layer = torch.nn.Linear(256, 256)
    x = rng.standard_normal((3, 7, 256)).astype(np.float32)
    part = graphs.GraphSpec(layer.eval(), {"input": torch.from_numpy(x)}, ("y",))
    with openvino_ir.converted(part) as made:
        openvino_ir.write(made, tmp_path / "g.xml", 8)
    graph = Graph(tmp_path / "g.xml", threads=1, compute="int8")
    (alone,) = graph(input=x[:1])
    x[1:] *= 100
    (together,) = graph(input=x)
    np.testing.assert_array_equal(alone, together[:1])
    if INTEGERS:  # that it is done at all: the same weights with whole activations
        (whole,) = Graph(tmp_path / "g.xml", threads=1)(input=x)
        assert 1e-4 < np.abs(together - whole).max() / np.abs(whole).max() < 0.03
    with torch.no_grad():
        known = layer(torch.from_numpy(x)).numpy()
    assert np.abs(together - known).max() < 0.03 * np.abs(known).max()
    assert np.abs(alone - known[:1]).max() < 0.03 * np.abs(known[:1]).max()


def test_of_a_bundle_in_int8_texts_stay_float32() -> None:
    assert runtime.properties(1, "int8")["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == str(runtime.GROUP)
    told = {
        stem: runtime.compute_dtype(stem, "int8")
        for stem in ("text", "t5", "modulation", "transformer", "decoder")
    }
    assert [stem for stem, compute in told.items() if compute == "int8"] == ["modulation", "transformer"]
    assert {told[stem] for stem in ("text", "t5")} == {"float32"}
    assert told["decoder"] == "bfloat16"
    for compute in ("float32", "bfloat16"):
        assert runtime.compute_dtype("text", compute) == compute
        assert runtime.properties(1, compute)["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "0"


def test_of_a_bundle_in_int8_texts_have_16_bits_and_modulations_8(
    small: Family,
    bundles: dict[int, Bundle],
    trace_once: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(openvino_ir, "trace", trace_once)
    engine.export(small, tmp_path / "b", 4, ExportMetadata(compute="int8"))
    bundle = read(tmp_path / "b")
    sizes = {stem: bundle.files[f"{stem}.bin"].bytes for stem in ("text", "modulation", "transformer")}
    assert sizes["text"] == bundles[16].files["text.bin"].bytes
    assert sizes["transformer"] == bundles[4].files["transformer.bin"].bytes
    assert sizes["modulation"] == bundles[8].files["modulation.bin"].bytes  # of 4 a batch would be told
    fours = draw(open_bundle(bundles[4], threads=1))
    assert psnr(fours, draw(open_bundle(bundle, threads=1))) > 25  # its texts are better, and that is all


def test_bfloat16_is_asked_for_where_the_processor_multiplies_it_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = runtime.properties(1, "bfloat16")["INFERENCE_PRECISION_HINT"]
    has_it = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert asked == ("bf16" if has_it else "f32")
    assert runtime.properties(1)["INFERENCE_PRECISION_HINT"] == "f32"

    class Older:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(runtime, "_core", Older)
    assert runtime.properties(1, "bfloat16")["INFERENCE_PRECISION_HINT"] == "f32"


def test_int8_is_refused_of_weights_that_are_not(
    small: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sd3.save(small, tmp_path / "model")
    words = ["export", str(tmp_path / "model"), "--to", "openvino", "--bits", "16", "--compute", "int8"]
    assert run([*words, "-o", str(tmp_path / "out")]) == 2
    assert "give --bits 8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bfloat16_is_refused_where_the_engine_has_no_choice(
    small: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sd3.save(small, tmp_path / "model")
    assert run(["export", str(tmp_path / "model"), "--compute", "bfloat16", "-o", str(tmp_path / "out")]) == 2
    told = "--compute for onnx must be float32, not bfloat16: that takes --to openvino"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_encoder_encodes(small: Family, bundles: dict[int, Bundle]) -> None:
    images = sampling.batch_noise([3], (3, 64, 64)).clip(-1, 1)
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
from fewstep.cli.app import run
words = ["generate", "a red apple", "--model", {str(bundles[8].folder)!r}, "--threads", "1", "-n", "2"]
assert run([*words, "-o", {str(tmp_path / "drawn")!r} + "/"]) == 0
pipe = fewstep.load({str(bundles[8].folder)!r}, threads=1)
first = pipe("a red apple", seed=1)[0]
assert pipe("a red apple", seed=1, image=first, strength=0.0)[0].size == first.size
heavy = {{"torch", "onnx", "onnxruntime", "diffusers", "transformers", "nncf"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert sys.modules["openvino_telemetry"] is None
"""
    (tmp_path / "home").mkdir()
    home = os.environ | {"HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=home)
    assert not list((tmp_path / "home").iterdir())
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2


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
    with openvino_ir.converted(part) as graph:
        openvino_ir.save(graph, tmp_path / "whole.xml", half=False)
        openvino_ir.save(graph, tmp_path / "half.xml", half=True)
    made = {f"{stem}.{ending}" for stem in ("whole", "half") for ending in ("xml", "bin")}
    assert {path.name for path in tmp_path.iterdir()} == made
    with torch.no_grad():
        theirs = part.module(**part.inputs).numpy()
    feeds = {name: tensor.numpy() for name, tensor in part.inputs.items()}
    for stem, most in (("whole", 1e-4), ("half", 1e-2)):
        assert np.abs(Graph(tmp_path / f"{stem}.xml", 1)(**feeds)[0] - theirs).max() < most


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
        write_manifest(tmp_path, facts(bundles[8]))


def test_an_unknown_engine_is_one_clear_line(bundles: dict[int, Bundle], tmp_path: Path) -> None:
    shutil.copytree(bundles[8].folder, tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match="is for 'abacus', which this fewstep does not know"):
        write_manifest(tmp_path, facts(bundles[8]) | {"engine": "abacus"})


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


@pytest.mark.parametrize(("module", "extra"), [("openvino", "openvino"), ("nncf", "nncf")])
def test_what_is_not_installed_is_named(
    bundles: dict[int, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], module: str, extra: str,
) -> None:  # fmt: skip
    """In one line, and nothing is written; to draw, NNCF is not asked for."""
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("fewstep.runtime.openvino", "fewstep.export.openvino", "fewstep.export.common.openvino_ir"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(fewstep.runtime, "openvino")
    monkeypatch.delattr(common, "openvino_ir")
    expected = f"fewstep: this needs {module}, which is not installed: {install(extra)}\n"
    model = str(bundles[8].folder.parent / "run")
    capsys.readouterr()
    assert run(["export", model, "--to", "openvino", "--bits", "8", "-o", str(tmp_path / "b")]) == 2
    assert capsys.readouterr().err.endswith(expected)
    words = ["generate", "x", "--model", str(bundles[8].folder), "-o", str(tmp_path / "x.png")]
    assert run([*words, "--threads", "1"]) == (2 if module == "openvino" else 0)
    assert capsys.readouterr().err == (expected if module == "openvino" else "")
    assert [path.name for path in tmp_path.iterdir()] == ([] if module == "openvino" else ["x.png"])


def test_what_cannot_be_written_is_one_clear_line(
    bundles: dict[int, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flux.save(flux.assemble(tiny_flux.parts("schnell"), name="f"), tmp_path / "flux")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    model, out = str(bundles[8].folder.parent / "run"), str(tmp_path / "b")
    for arguments, told in (
        ([model, "--bits", "6", "-o", out], "bits for openvino must be one of 4, 8, 16, not 6"),
        ([str(tmp_path / "flux"), "-o", out], "is of the family flux, which cannot be written for openvino"),
        ([str(bundles[8].folder), "-o", out], "is a bundle for openvino: give one for onnx"),
        ([model, "-o", str(tmp_path / "mine")], "mine exists and is no bundle: choose another place"),
    ):
        capsys.readouterr()
        assert run(["export", *arguments, "--to", "openvino"]) == 2
        assert told in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flux", "mine"]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


def test_an_interrupted_export_leaves_what_was_there(
    small: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundles: dict[int, Bundle]
) -> None:
    shutil.copytree(bundles[8].folder, tmp_path / "b")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(openvino_ir, "trace", fail)
    with pytest.raises(KeyboardInterrupt):
        engine.export(small, tmp_path / "b", 4, ExportMetadata())
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert read(tmp_path / "b").digest == bundles[8].digest


def test_a_weight_too_large_for_float16_is_refused(
    trace_once: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO would cut it off without a word."""
    monkeypatch.setattr(openvino_ir, "trace", trace_once)
    large = sd3.assemble(tiny.parts(with_t5=False), name="large")
    with torch.no_grad():
        large.net.proj_out.weight[0, 0] = 1e5
    told = r"transformer\.proj_out\.weight has weights too large for float16: give --bits 8"
    with pytest.raises(UserError, match=told):
        engine.export(large, tmp_path / "b", 16, ExportMetadata())
    engine.export(large, tmp_path / "b", 8, ExportMetadata(compute="int8"))  # whose texts alone are float16
    with torch.no_grad():
        large.parts["text_encoder"].text_projection.weight[0, 0] = 1e5
    with pytest.raises(UserError, match=r"text_encoder\.text_projection\.weight .* give --compute float32"):
        engine.export(large, tmp_path / "c", 8, ExportMetadata(compute="int8"))
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    """Under a limit on the size of files, which the system enforces as it does a disk's."""
    layer = torch.nn.Linear(64, 64).eval()
    with openvino_ir.converted(graphs.GraphSpec(layer, {"input": torch.zeros(2, 64)}, ("y",))) as graph:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            with pytest.raises(UserError, match=r"cannot write g\.xml: is the disk full\?"):
                openvino_ir.save(graph, tmp_path / "g.xml", half=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        openvino_ir.save(graph, tmp_path / "g.xml", half=False)


def test_a_disk_without_room_to_unpack_a_graph_is_no_damaged_graph(tmp_path: Path) -> None:
    layer = torch.nn.Linear(64, 64).eval()
    path = tmp_path / "g.onnx"
    graphs.write_graph(graphs.trace(graphs.GraphSpec(layer, {"input": torch.zeros(2, 64)}, ("y",))), path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="is the disk full"), openvino_ir.folded(path, tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    path.write_bytes(path.read_bytes()[:1000])
    with (
        pytest.raises(UserError, match="cannot be unpacked by onnxruntime"),
        openvino_ir.folded(path, tmp_path),
    ):
        pass


def convert(source: str, out: Path, *words: str) -> int:
    return run(["export", source, "--to", "openvino", *words, "-o", str(out)])


def test_the_bundle_that_ships_becomes_one_for_openvino_without_torch(tmp_path: Path) -> None:
    code = f"""
import sys
for name in ("torch", "onnx", "nncf", "diffusers", "transformers"):
    sys.modules[name] = None  # not installed
from fewstep.cli.app import run
words = ["export", "pocket", "--to", "openvino", "--compute", "bfloat16", "--steps", "2", "--name", "mine"]
sys.exit(run([*words, "-o", {str(tmp_path / "b")!r}]))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    made, shipped = read(tmp_path / "b"), read(SHIPPED / "pocket")
    assert (made.engine, made.compute, made.name, made.steps) == ("openvino", "bfloat16", "mine", 2)
    assert (made.styles, made.license, made.about["bits"]) == (shipped.styles, shipped.license, 16)
    others = {name for name in shipped.files if not name.endswith(".onnx")}
    assert {name: made.files[name] for name in others} == {name: shipped.files[name] for name in others}
    pictures = [
        np.asarray(fewstep.load(bundle.folder, threads=1)("a red apple", seed=1, steps=4)[0], float)
        for bundle in (shipped, made)
    ]
    assert 20 * np.log10(255 / np.sqrt(np.square(pictures[0] - pictures[1]).mean())) > 40


def test_weights_of_any_bits_are_unpacked_as_onnxruntime_does(
    small: Family, trace_once: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO reads their packed codes as well, and draws something else."""
    monkeypatch.setattr(onnx, "trace", trace_once)
    for bits in (4, 8):
        onnx.export(small, tmp_path / f"onnx{bits}", bits, ExportMetadata())
        assert convert(str(tmp_path / f"onnx{bits}"), tmp_path / f"ov{bits}") == 0
        theirs, ours = (
            draw(open_bundle(read(tmp_path / f"{kind}{bits}"), threads=1)) for kind in ("onnx", "ov")
        )
        assert psnr(theirs, ours) > 55
        encoders = [open_bundle(read(tmp_path / f"{kind}{bits}"), threads=1).codec for kind in ("onnx", "ov")]
        images = sampling.batch_noise([3], (3, 64, 64)).clip(-1, 1)
        assert psnr(*(codec.encode(images) for codec in encoders)) > 55


def test_what_no_bundle_can_become_is_one_clear_line(
    bundles: dict[int, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        (("pocket", tmp_path / "b", "--t5", "drop"), "pocket is a bundle, whose T5 is as it is"),
        (("pocket", tmp_path / "b", "--bits", "16", "--compute", "int8"), "give --bits 8"),
        ((str(bundles[8].folder), tmp_path / "b"), "is a bundle for openvino: give one for onnx"),
        (("pocket", tmp_path / "b", "--steps", "5000"), "steps must be 1 to 4096, not 5000"),
        (("pocket", SHIPPED / "pocket" / ".." / "pocket"), "is the bundle itself"),
    ]
    for given, told in cases:
        assert convert(str(given[0]), Path(given[1]), *map(str, given[2:])) == 2
        assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_graph_that_cannot_be_unpacked_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(SHIPPED / "pocket", tmp_path / "a")
    (tmp_path / "a" / "decoder.onnx").write_bytes(b"\x3a\x00")  # an empty one, of no version
    write_manifest(tmp_path / "a", read(SHIPPED / "pocket").to_dict())
    assert convert(str(tmp_path / "a"), tmp_path / "b") == 2
    line = capsys.readouterr().err
    assert "decoder.onnx cannot be unpacked by onnxruntime: " in line and line.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
