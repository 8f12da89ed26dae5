"""OpenVINO GenAI's own pipeline draws what the family draws, from the folder that is written for it."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if missing := [name for name in ("openvino_genai", "nncf") if find_spec(name) is None]:
    pytest.skip(f"{' and '.join(missing)}: not installed", allow_module_level=True)

import tiny
from fewstep.bench.engines import Spec
from fewstep.bench.engines import genai as genai_engine
from fewstep.bench.timer import StageTimer
from fewstep.cli.app import run
from fewstep.core import sampling, schedule
from fewstep.core.guidance import Guided
from fewstep.core.optional import install
from fewstep.core.types import UserError
from fewstep.export import genai
from fewstep.export.base import ExportMetadata
from fewstep.export.common import diffusers_graphs, graphs, openvino_ir
from fewstep.families import sd3
from fewstep.families.base import Family
from fewstep.images.psnr import psnr
from tiny_bundle import write_bundle

pytestmark = pytest.mark.slow(20)

PROMPT = "a red apple, 3D style"
LONG = f"{PROMPT}, two blue cars, and much that no row of tokens has room for"


@pytest.fixture(scope="module")
def small() -> Family:
    config = tiny.SMALL | {"num_layers": 2, "dual_attention_layers": (0,)}
    return sd3.assemble(tiny.parts(config, with_t5=False), name="small", steps=2, guidance=3.0)


@pytest.fixture(scope="module")
def folders(small: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Of 16 and 8 bits, as the command line writes them; tracing, which takes seconds, is done once."""
    folder = tmp_path_factory.mktemp("genai")
    sd3.save(small, folder / "model")
    parts = diffusers_graphs.diffusers_parts(small, genai.timesteps(small.steps, small.shift))
    kept = iter([graphs.trace(part) for part in parts.values()] * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_ir, "trace", lambda part: next(kept))
        for bits in (16, 8):
            words = ["export", str(folder / "model"), "--to", "genai", "--bits", str(bits)]
            assert run([*words, "-o", str(folder / str(bits))]) == 0
    return {bits: folder / str(bits) for bits in (16, 8)}


def drawn(family: Family, prompt: str) -> np.ndarray:
    """Two pictures ``[2, h, w, 3]`` as GenAI writes them: it cuts what is between two levels off."""
    with torch.no_grad():
        velocity = Guided(family.velocity, family.text([""] * 2), family.guidance or 1)
        noise = family.from_numpy(sampling.batch_noise([5, 6], family.latent))
        grid = schedule.grid(family.steps, family.shift)
        latents = sampling.sample_flow(velocity, noise, grid, family.text([prompt] * 2))
        pixels = np.asarray(family.codec.decode(latents)).transpose(0, 2, 3, 1)
    return ((pixels + 1) * 127.5).clip(0, 255).astype(np.uint8)


@pytest.mark.filterwarnings("ignore:the prompt is too long")
@pytest.mark.parametrize("prompt", [PROMPT, LONG, ""])
def test_genai_draws_what_the_family_draws(small: Family, folders: dict[int, Path], prompt: str) -> None:
    """The same tokens, noise, grid and guidance; a prompt too long is cut as it is elsewhere."""
    assert len(small.parts["tokenizer"](LONG).input_ids) > tiny.LENGTH
    engine, stages = genai_engine.load(Spec(str(folders[16]), None, 2, threads=1)), StageTimer()
    theirs, ours = drawn(small, prompt), engine.generate(prompt, [5, 6], stages)
    assert theirs.std() > 5
    assert psnr(theirs, ours) > 50
    assert set(stages.seconds) == {"text", "steps", "decode"}
    assert engine.pipe.get_generation_config().taylorseer_config is None


def test_pictures_begin_where_they_are_told_to(folders: dict[int, Path]) -> None:
    """GenAI's image-to-image finds its encoder, and at no strength gives back what the codec keeps."""
    from openvino_genai import Image2ImagePipeline

    from fewstep.runtime.openvino import openvino

    pipe: Any = Image2ImagePipeline(str(folders[16]), "CPU")
    given = openvino.Tensor(np.full((1, 64, 64, 3), 200, np.uint8))
    made = pipe.generate(PROMPT, given, strength=0.6, num_inference_steps=2, taylorseer_config=None)
    assert made.data.shape == (1, 64, 64, 3)


@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (4, 3.0), (28, 3.0), (5, 1.5), (8, 1.0)])
def test_the_scheduler_walks_our_grid(steps: int, shift: float) -> None:
    theirs = schedule.diffusers_grid(steps, shift, genai.timesteps(steps, shift))
    assert theirs == pytest.approx(schedule.grid(steps, shift))


def test_fewer_bits_are_fewer_bytes(folders: dict[int, Path]) -> None:
    sizes = {bits: sum(f.stat().st_size for f in folders[bits].rglob("*model.bin")) for bits in folders}
    assert sizes[16] > sizes[8]
    engine = genai_engine.load(Spec(str(folders[8]), None, 1, threads=1))
    assert len(engine.generate(PROMPT, [0], StageTimer())) == 1


def test_genai_takes_its_turn_beside_fewstep(folders: dict[int, Path], tmp_path: Path) -> None:
    write_bundle(tmp_path / "onnx")
    out = tmp_path / "bench.jsonl"
    words = ["bench", str(tmp_path / "onnx"), "--rounds", "1", "--threads", "1", "-o", str(out)]
    assert run([*words, "--steps", "2", *(f"--baseline={folders[bits]}" for bits in (16, 8))]) == 0
    ours, *theirs = [json.loads(line) for line in out.read_text().splitlines()]
    assert ours["engine"] == "fewstep onnx" and [each["bits"] for each in theirs] == [16, 8]
    for each in theirs:
        assert (each["engine"], each["steps"], each["guidance"]) == ("OpenVINO GenAI", 2, 3.0)
        assert set(each["seconds"]) == {"text", "steps", "decode", "whole"}
        assert each["size"] == [64, 64] and each["disk"] > 1000 and each["peak"] > 2e7
        assert each["cold"] > each["seconds"]["whole"][0] and each["times_faster"] is None


def test_another_number_of_steps_is_another_export(folders: dict[int, Path]) -> None:
    with pytest.raises(UserError, match="it is for 2 steps: export another with --steps 3"):
        genai_engine.load(Spec(str(folders[16]), 3, 1, threads=1))


def test_what_cannot_be_written_is_one_clear_line(small: Family, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    swapped = sd3.assemble(tiny.parts(with_t5=False, tiny=True), name="small", steps=2)
    for family, place, told in (
        (small, "mine", "exists and is no export of fewstep for GenAI"),
        (replace(small, sampler="renoise"), "b", "GenAI has no sampler renoise"),
        (replace(small, shift=2.5), "b", "GenAI cannot take 2 steps at shift 2.5"),
        (swapped, "b", "GenAI wants an AutoencoderKL"),
    ):
        with pytest.raises(UserError, match=told):
            genai.export(family, tmp_path / place, 16, ExportMetadata())
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_interrupted_export_leaves_what_was_there(
    small: Family, folders: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folders[8], tmp_path / "b")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(openvino_ir, "trace", fail)
    with pytest.raises(KeyboardInterrupt):
        genai.export(small, tmp_path / "b", 4, ExportMetadata())
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert json.loads((tmp_path / "b" / genai.MANIFEST).read_text())["about"]["bits"] == 8


def test_what_is_not_installed_is_named(
    folders: dict[int, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "openvino_tokenizers", None)
    model = str(folders[16].parent / "model")
    assert run(["export", model, "--to", "genai", "-o", str(tmp_path / "b")]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.endswith(f"openvino_tokenizers, which is not installed: {install('genai')}")
    assert not list(tmp_path.iterdir())
