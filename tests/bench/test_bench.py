"""What generation costs: engines really run, floors where they are known, records and their pictures."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import tiny
from fewstep.bench import plot, roofline
from fewstep.bench.hardware import DevicePeak
from fewstep.bench.run import first_psnr
from fewstep.cli.app import run
from fewstep.core.optional import install
from fewstep.families import sd3
from fewstep.runtime.bundle import write_manifest
from tiny_bundle import write_bundle, write_openvino_bundle

pytestmark = pytest.mark.slow(70)

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_graphs_work_is_its_products(tmp_path: Path) -> None:
    """``conv(x @ matrix)``, the matrix unpacked of integers as in a bundle."""
    nodes = [
        helper.make_node("Cast", ["codes"], ["matrix"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "matrix"], ["m"]),
        helper.make_node("Transpose", ["m"], ["c"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["c", "kernel"], ["y"]),
    ]
    made = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 5, 5, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 8, 3, 3])],
        [
            numpy_helper.from_array(np.ones((6, 4), np.int8), "codes"),
            numpy_helper.from_array(np.ones((8, 4, 3, 3), np.float32), "kernel"),
        ],
    )  # fmt: skip
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "g.onnx")
    work = roofline.count(tmp_path / "g.onnx", 7)
    operations = 2 * 7 * (25 * 6 * 4 + 9 * 8 * 4 * 9)
    assert work == roofline.GraphCost(
        operations, 4 * (6 * 4 + 8 * 4 * 9)
    )  # float32, as the session unpacks them
    assert work.seconds(DevicePeak(1e3, 1e9)) == work.operations / 1e3
    assert work.seconds(DevicePeak(1e12, 1.0)) == work.bytes


@needs_openvino
def test_openvino_reads_its_weights_as_they_are_stored(tmp_path: Path) -> None:
    """``conv(x @ matrix + c)``: a matrix of 4 bits with a scale, turned, and a kernel in float16."""
    from openvino import opset13 as ops

    from fewstep.runtime.openvino import openvino

    x = ops.parameter([-1, 5, 5, 6], np.float32, name="x")
    codes: Any = openvino.op.Constant(openvino.Type.i4, openvino.Shape([4, 6]), np.ones(24, np.int8))
    scale = ops.constant(np.ones((4, 1), np.float32))
    matrix = ops.multiply(ops.convert(codes, np.float32), scale)
    planes = ops.transpose(ops.matmul(x, matrix, False, True), np.array([0, 3, 1, 2]))
    kernel = ops.convert(ops.constant(np.ones((8, 4, 3, 3), np.float16)), np.float32)
    y = ops.convolution(planes, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
    for _ in range(64):  # what two ways lead to is looked at once, not 2^64 times
        y = ops.add(y, y)
    openvino.save_model(openvino.Model([y], [x]), tmp_path / "g.xml", compress_to_fp16=False)
    work = roofline.count_openvino(tmp_path / "g.xml", 7)
    assert work == roofline.GraphCost(2 * 7 * (25 * 6 * 4 + 9 * 8 * 4 * 9), 24 // 2 + 4 * 4 + 2 * 8 * 4 * 9)


def test_an_engine_whose_graphs_cannot_be_counted_has_no_floor(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "tiny").folder
    told = json.loads((folder / "bundle.json").read_text())
    for path in [*folder.glob("*.onnx")]:
        path.rename(path.with_suffix(".pte"))
    told = {key: value for key, value in told.items() if key not in ("format", "files")}
    write_manifest(folder, told | {"engine": "executorch"})
    assert roofline.bundle_cost(folder, 1, 4) == {}


@needs_openvino
def test_an_openvino_bundle_takes_its_turn_beside_an_onnx_bundle(tmp_path: Path) -> None:
    write_bundle(tmp_path / "onnx")
    write_openvino_bundle(tmp_path / "openvino")
    out = tmp_path / "bench.jsonl"
    models = [str(tmp_path / "onnx"), str(tmp_path / "openvino")]
    assert (
        run(["bench", *models, "--rounds", "1", "--threads", "1", "--batch-size", "2", "-o", str(out)]) == 0
    )
    one, other = records(out)
    assert (one["engine"], other["engine"]) == ("fewstep onnx", "fewstep openvino")
    assert other["psnr"] is None or other["psnr"] > 45
    assert set(other["seconds"]) == set(one["seconds"]) and set(other["floor"]) == set(one["floor"])
    assert other["floor"]["steps"] > 0 and other["disk"] > 1000


def test_engines_take_turns_and_leave_a_record_each(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_bundle(tmp_path / "tiny")
    out = tmp_path / "bench.jsonl"
    words = ["bench", str(tmp_path / "tiny"), "--rounds", "2", "--threads", "1", "-o", str(out)]
    assert run([*words, "--steps", "1", "--steps", "3", "--batch-size", "2"]) == 0
    assert run(words) == 0  # added to what is there
    one, three, own = records(out)
    assert (one["steps"], three["steps"], own["steps"], one["batch"]) == (1, 3, 4, 2)
    for record in (one, three, own):
        stages = [record["seconds"][name][0] for name in ("text", "modulation", "steps", "decode")]
        assert 0 < max(stages) and sum(stages) <= 1.5 * record["seconds"]["whole"][0]
        assert record["cold"] > record["seconds"]["whole"][0]
        assert record["peak"] > 2e7 and record["disk"] > 1000 and record["size"] == [32, 32]
        assert set(record["floor"]) == {"text", "modulation", "steps", "decode"}
        assert record["device"]["processor"] and record["rates"]["operations"] > 1e8
    assert three["floor"]["steps"] == pytest.approx(3 * one["floor"]["steps"], rel=0.5)
    assert "GFLOP/s" in capfd.readouterr().out


def test_stock_diffusers_draws_the_same_picture_in_its_turn(tmp_path: Path) -> None:
    sd3.save(sd3.assemble(tiny.parts(with_t5=False), name="small", steps=2, guidance=3.0), tmp_path / "small")
    out, folder = tmp_path / "bench.jsonl", str(tmp_path / "small")
    assert run(["bench", folder, "--baseline", folder, "--rounds", "1", "-o", str(out)]) == 0
    ours, stock = records(out)
    assert (ours["engine"], stock["engine"]) == ("fewstep torch", "diffusers eager float32")
    assert (stock["steps"], stock["guidance"], stock["times_faster"]) == (2, 3.0, 1.0) and ours[
        "times_faster"
    ] > 0
    assert stock["psnr"] is None or stock["psnr"] > 45
    assert set(stock["seconds"]) == {"text", "steps", "decode", "whole"}


def test_who_fails_is_named_in_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_bundle(tmp_path / "tiny").folder
    (folder / "transformer.onnx").write_bytes(b"x" * (folder / "transformer.onnx").stat().st_size)
    assert run(["bench", str(folder), "-o", str(tmp_path / "b.jsonl")]) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"fewstep: {folder} failed: ") and "is damaged" in said
    assert not (tmp_path / "b.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "must be at least 1"),
        (["--batch-size", "0"], "must be at least 1"),
        (["--baseline", "nowhere"], "not a diffusers folder"),
        (["--end-to-end"], "--baseline"),
        (["--plot", "p", "--records", "none.jsonl"], "cannot read none.jsonl"),
    ],
)
def test_bad_input_is_one_clear_line(
    words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *words]) == 2
    assert message in capfd.readouterr().err


def test_a_missing_library_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert run(["bench"]) == 2
    said = capfd.readouterr()
    assert install("bench") in said.err and not said.out


def record(model: str, seconds: float, processor: str) -> dict[str, Any]:
    return {
        "model": model, "engine": "fewstep onnx", "bits": 8, "steps": 4, "batch": 1, "peak": 3e8,
        "seconds": {"whole": [seconds, seconds, seconds]}, "floor": {"steps": seconds / 2}, "threads": 0,
        "device": {"processor": processor, "cores": 2},
    }  # fmt: skip


def test_records_of_several_devices_become_pictures(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, lines in {"a": [("pocket", 0.2), ("big", 0.9)], "b": [("pocket", 0.02)]}.items():
        text = "".join(json.dumps(record(model, seconds, name)) + "\n" for model, seconds in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    rows = [{"label": "pocket@4", "figures": {"kid_teacher": {"value": 0.002}}}]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    words = ["bench", "--plot", str(tmp_path / "p"), "--quality", str(tmp_path / "results.json")]
    words += [word for name in "ab" for word in ("--records", str(tmp_path / f"{name}.jsonl"))]
    assert run(words) == 0
    for name in ("latency.png", "quality.png"):
        with Image.open(tmp_path / "p" / name) as picture:
            assert len(picture.convert("RGB").getcolors(2**24) or []) > 20
    with pytest.raises(plot.UserError, match="none of the records"):
        plot.quality(plot.read([tmp_path / "a.jsonl"]), {"other@4": 1.0}, "x", tmp_path / "q.png")
    (tmp_path / "a.jsonl").write_text('{"seconds": 3}\n')
    assert run(["bench", "--plot", str(tmp_path), "--records", str(tmp_path / "a.jsonl")]) == 2
    assert "line 1: no record" in capfd.readouterr().err


def test_names_that_matplotlib_would_take_for_formulas_are_drawn(tmp_path: Path) -> None:
    """Halves of characters stand for bytes of a path that are no UTF-8."""
    told = record("a$\\frac$b\udcff", 0.1, "x$y")
    (tmp_path / "a.jsonl").write_text(json.dumps(told) + "\n")
    plot.latency(plot.read([tmp_path / "a.jsonl"]), tmp_path / "l.png")
    assert (tmp_path / "l.png").stat().st_size > 1000


def test_equal_pictures_have_no_noise_and_one_step_off_has_48_dB() -> None:
    picture = np.full((1, 4, 4, 3), 7, np.uint8)
    assert first_psnr(picture, picture) is None
    assert first_psnr(picture, picture + 1) == pytest.approx(48.13, abs=0.01)


def test_a_torch_model_runs_as_it_is_asked_to(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sd3.save(sd3.assemble(tiny.parts(), name="base", steps=2, guidance=None), tmp_path / "base")
    model, out = f"sd3:{tmp_path / 'base'}", tmp_path / "b.jsonl"
    words = ["--rounds", "2", "--threads", "1", "-o", str(out)]
    assert run(["bench", model, *words]) == 0
    assert run(["bench", model, *words, "--bits", "16", "--size", "48"]) == 0
    plain, wished = records(out)
    assert (plain["bits"], wished["bits"]) == (32, 16)
    assert wished["size"] == [48, 48] != plain["size"]
    for record in (plain, wished):
        assert record["device_peak"] == 0 and "gpu" in record["device"]
        assert record["seconds"]["text"][1] > 1e-3  # the prompt is read in each round


def test_stock_draws_the_size_that_is_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sd3.save(sd3.assemble(tiny.parts(), name="base", steps=2, guidance=None), tmp_path / "base")
    base, out = str(tmp_path / "base"), tmp_path / "b.jsonl"
    words = ["--baseline", base, "--rounds", "1", "--threads", "1", "-o", str(out)]
    assert run(["bench", base, *words, "--size", "64x48", "--bits", "32"]) == 0
    ours, stock = records(out)
    assert ours["size"] == stock["size"] == [64, 48]
    assert stock["psnr"] > 35  # other noise is some 14 dB away


def test_a_lora_is_measured_with_the_model_that_it_is_added_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import save_file

    sd3.save(sd3.assemble(tiny.parts(), name="base", steps=2, guidance=None), tmp_path / "base")
    layer = "transformer.transformer_blocks.0.attn.to_q"
    file = str(tmp_path / "a.safetensors")
    save_file(
        {f"{layer}.lora_A.weight": torch.ones(2, 16), f"{layer}.lora_B.weight": torch.ones(16, 2)}, file
    )
    base, out = str(tmp_path / "base"), str(tmp_path / "b.jsonl")
    words = ("--lora", f"{file}:0.5", "-o", out)
    assert run(["bench", base, "--rounds", "1", "--threads", "1", *words]) == 0
    assert records(tmp_path / "b.jsonl")[0]["bits"] == 32  # as without a LoRA
    capsys.readouterr()
    for other in ([base, "--baseline", base], [base, "--end-to-end", "--baseline", base], []):
        assert run(["bench", *other, *words]) == 2
        assert "--lora is" in capsys.readouterr().err


ENGINE = """
import numpy as np

from fewstep.bench.engines import EngineInfo
from fewstep.core.sampling import batch_noise


class Engine:
    def __init__(self, spec):
        self.spec = spec

    @property
    def info(self):
        return EngineInfo("outside", None, self.spec.steps or 4, None, (32, 32))

    def generate(self, prompt, seeds, timer):
        noise = timer("text", lambda: batch_noise(seeds, (3, 32, 32)))
        levels = timer("steps", lambda: (127 + 40 * noise).clip(0, 255).astype(np.uint8))
        return levels.transpose(0, 2, 3, 1)


load = Engine
"""


@pytest.mark.parametrize("suffix", ["", ":load", ":Engine"])
def test_an_engine_from_outside_takes_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    name = f"engines_outside.of_test{len(suffix)}"
    (tmp_path / "engines_outside").mkdir()
    (tmp_path / name.replace(".", "/")).with_suffix(".py").write_text(ENGINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    write_bundle(tmp_path / "tiny")
    (tmp_path / "theirs").write_bytes(b"12345")
    out = tmp_path / "b.jsonl"
    words = ["--baseline", str(tmp_path / "theirs"), "--engine", name + suffix, "--rounds", "1"]
    assert run(["bench", str(tmp_path / "tiny"), *words, "--batch-size", "2", "-o", str(out)]) == 0
    ours, theirs = records(out)
    assert (ours["engine"], theirs["engine"]) == ("fewstep onnx", "outside")
    assert set(theirs["seconds"]) == {"text", "steps", "whole"}
    assert (theirs["steps"], theirs["bits"], theirs["disk"], theirs["floor"]) == (4, None, 5, {})
    assert theirs["psnr"] < 30 and theirs["times_faster"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "genai"], "name its folder with --baseline"),
        (["--engine", "fewstep", "--baseline", "x"], "give the model without --baseline"),
        (["--engine", "other", "--baseline", "x"], "there is no bench engine other: give one of diffusers, "),
        (
            ["--engine", "no_such.module", "--baseline", "x"],
            "cannot import the bench engine no_such",
        ),
        (["--engine", "json.decoder", "--baseline", "x"], "json.decoder has no function load"),
        (["--engine", "json:loads", "--baseline", "x"], "--baseline x: there is no such file or folder"),
        (["--engine", "json:loads", "--baseline", "x", "--end-to-end"], "--end-to-end takes no"),
    ],
)
def test_an_engine_that_is_none_is_one_clear_line(
    words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *words]) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fewstep: ") and message in last
