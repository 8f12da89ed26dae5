"""A bundle for ExecuTorch draws what its family draws. ``make test-executorch`` runs this file."""

from __future__ import annotations

import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers.drawn import draw, psnr

import fewstep.runtime
import tiny
from fewstep.cli import app as cli
from fewstep.core import sampling
from fewstep.core.optional import install
from fewstep.core.types import UserError
from fewstep.export import executorch
from fewstep.export.base import ExportMetadata
from fewstep.export.common import bundle as common
from fewstep.families import sd3
from fewstep.families.base import Family
from fewstep.pipeline import loading
from fewstep.runtime.bundle import Bundle, read
from fewstep.runtime.model import open_bundle

SMALLER = tiny.SMALL | {"num_layers": 2, "dual_attention_layers": (0,)}


@pytest.fixture(scope="module")
def small() -> Family:
    return sd3.assemble(tiny.parts(SMALLER, with_t5=False), name="small", steps=4, guidance=None)


class TestWithout:
    """What holds where ExecuTorch is not installed."""

    def test_an_export_names_the_extra(
        self, small: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "executorch", None)
        monkeypatch.setitem(sys.modules, "executorch.exir", None)
        with pytest.raises(ImportError) as caught:
            executorch.export(small, tmp_path / "b", 32, ExportMetadata())
        assert "needs executorch" in str(loading.missing_extra(caught.value))
        assert install("executorch") in str(loading.missing_extra(caught.value))
        assert not list(tmp_path.iterdir())

    def test_other_bits_are_one_clear_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.run(["export", "x", "--to", "executorch", "--bits", "6", "-o", str(tmp_path / "b")]) == 2
        line = "bits for executorch must be one of 8, 32, not 6"
        assert line in " ".join(capsys.readouterr().err.split())

    def test_something_else_is_not_overwritten(self, small: Family, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("mine")
        with pytest.raises(UserError, match="mine exists and is no bundle"):
            common.write_bundle(small, tmp_path / "mine", 32, ExportMetadata(), "executorch", lambda _: None)
        assert (tmp_path / "mine").read_text() == "mine"

    def test_a_bundle_names_the_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from fewstep.runtime.bundle import write_manifest

        monkeypatch.setitem(sys.modules, "executorch", None)
        monkeypatch.delitem(sys.modules, "fewstep.runtime.executorch", raising=False)
        monkeypatch.delattr(fewstep.runtime, "executorch", raising=False)
        for stem in ("text", "modulation", "transformer", "decoder"):
            (tmp_path / f"{stem}.pte").write_bytes(b"-")
        (tmp_path / "tokenizer.json").write_text("{}")
        latent = {"channels": 4, "height": 8, "width": 8, "downscale": 8}
        facts = {"name": "x", "family": "sd3", "license": "MIT", "latent": latent, "shift": 3.0, "steps": 4}
        write_manifest(tmp_path, facts | {"guidance": None, "text": {"length": 24}, "engine": "executorch"})
        with pytest.raises(UserError, match="needs executorch.*" + re.escape(install("executorch"))):
            fewstep.load(tmp_path)


@pytest.fixture(scope="module")
def bundle(small: Family, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tests below share it, since lowering takes a minute or more."""
    folder = tmp_path_factory.mktemp("executorch")
    executorch.export(small, folder / "b", 32, ExportMetadata(license="Apache-2.0"))
    return read(folder / "b")


@pytest.mark.executorch
def test_a_bundle_draws_what_its_family_draws(small: Family, bundle: Bundle) -> None:
    theirs, ours = draw(small), draw(open_bundle(bundle, threads=1))
    assert theirs.std() > 0.05
    assert psnr(theirs, ours) > 60


@pytest.mark.executorch
def test_quantized_it_is_smaller_and_nearly_the_same_and_the_same_alone(
    small: Family, bundle: Bundle, tmp_path: Path
) -> None:
    executorch.export(small, tmp_path / "b", 8, ExportMetadata())
    eight = read(tmp_path / "b")
    for stem in ("text", "decoder", "encoder"):
        assert eight.files[f"{stem}.pte"].bytes == bundle.files[f"{stem}.pte"].bytes
    for stem in executorch.QUANTIZED:
        data = eight.path(f"{stem}.pte").read_bytes()
        assert len(data) < 0.9 * bundle.files[f"{stem}.pte"].bytes  # few of so small a net's are matrices
        assert b"XnnpackBackend" in data
    model = open_bundle(eight, threads=1)
    theirs, drawn = draw(small), draw(model)
    assert 40 < psnr(theirs, drawn) < psnr(theirs, draw(open_bundle(bundle, threads=1))) - 10
    assert np.array_equal(drawn[1:2], draw(model, slice(1, 2)))


@pytest.mark.executorch
def test_a_picture_is_the_same_alone(bundle: Bundle) -> None:
    model = open_bundle(bundle, threads=1)
    assert np.array_equal(draw(model)[1:2], draw(model, slice(1, 2)))


@pytest.mark.executorch
def test_the_encoder_encodes(small: Family, bundle: Bundle) -> None:
    images = sampling.batch_noise([3], (3, 64, 64)).clip(-1, 1)
    theirs = small.codec.encode(torch.from_numpy(images)).numpy()
    ours = open_bundle(bundle, threads=1).codec.encode(images)
    assert psnr(theirs, ours) > 60


@pytest.mark.executorch
def test_nothing_of_this_machine_is_in_the_files(bundle: Bundle) -> None:
    places = [str(Path(fewstep.__file__).parents[2]), str(Path(torch.__file__).parents[1])]
    for name in bundle.files:
        data = bundle.path(name).read_bytes()
        places.append(str(bundle.folder.parent))
        assert not [place for place in places if place.encode() in data], name


@pytest.mark.executorch
def test_every_part_goes_to_xnnpack(bundle: Bundle) -> None:
    for stem in ("text", "modulation", "transformer", "decoder", "encoder"):
        assert b"XnnpackBackend" in bundle.path(f"{stem}.pte").read_bytes(), stem


@pytest.mark.executorch
def test_several_threads_may_draw_at_once(bundle: Bundle) -> None:
    model = open_bundle(bundle, threads=1)
    alone = draw(model)
    with ThreadPoolExecutor(2) as pool:
        for pictures in pool.map(lambda _: draw(model), range(4)):
            assert np.array_equal(pictures, alone)


@pytest.mark.executorch
def test_the_command_line_draws(bundle: Bundle, tmp_path: Path) -> None:
    from PIL import Image

    folder, out = str(bundle.folder), str(tmp_path / "p.png")
    assert cli.run(["generate", "a red apple", "--model", folder, "--seed", "1", "-o", out]) == 0
    with Image.open(out) as picture:
        assert picture.size == (64, 64)


@pytest.mark.executorch
def test_a_damaged_program_is_one_clear_line(bundle: Bundle, tmp_path: Path) -> None:
    from fewstep.runtime.executorch import Graph

    shutil.copytree(bundle.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "text.pte").write_bytes(b"not a program")
    with pytest.raises(UserError, match=r"text\.pte has 13 bytes instead of"):
        fewstep.load(tmp_path)
    feeds: dict[str, Any] = {"tokens": np.zeros((1, tiny.LENGTH), np.int64)}
    with pytest.raises(UserError, match=r"text\.pte cannot be loaded by ExecuTorch: ") as caught:
        Graph(tmp_path / "text.pte", 1)(**feeds)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"decoder\.pte does not fit its bundle: ") as caught:
        Graph(tmp_path / "decoder.pte", 1)(latents=np.zeros((1, 4, 9, 9), np.float32))
    assert "\n" not in str(caught.value)


@pytest.mark.executorch
def test_a_backend_that_is_not_the_bundles(bundle: Bundle) -> None:
    fewstep.load(bundle.folder, backend="executorch", threads=1)
    with pytest.raises(UserError, match="runs on executorch, not on onnx: `fewstep export --to onnx`"):
        fewstep.load(bundle.folder, backend="onnx")


@pytest.mark.executorch
def test_an_interrupted_export_leaves_nothing(
    small: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(executorch, "lowered", fail)
    with pytest.raises(OSError, match="No space"):
        executorch.export(small, tmp_path / "b", 32, ExportMetadata())
    assert not list(tmp_path.iterdir())
