"""A bundle draws what its family draws. The families are small and random, but have every part."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tests.helpers.drawn import PROMPTS, draw, psnr

import tiny
from fewstep.core import sampling, schedule
from fewstep.core.types import UserError
from fewstep.export import onnx as engine
from fewstep.export.base import ExportMetadata
from fewstep.export.common import bundle as common
from fewstep.export.common import graphs
from fewstep.export.common.wrappers import ModulationModule, TextModule, TransformerModule
from fewstep.families import sd3
from fewstep.families.base import Family
from fewstep.families.diffusers_io import FACTS
from fewstep.runtime.bundle import Bundle, read
from fewstep.runtime.model import open_bundle
from fewstep.runtime.ort import Graph

pytestmark = pytest.mark.slow(10)


def family(**options: Any) -> Family:
    return sd3.assemble(tiny.parts(with_t5=False, **options), name="small", steps=4, guidance=None)


@pytest.fixture
def export(small: Family, trace_once: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``engine.export`` of the small family, its graphs traced once; gives the bundle."""
    monkeypatch.setattr(engine, "trace", trace_once)

    def export(out: Path, bits: int = 8, **facts: Any) -> Bundle:
        engine.export(small, out, bits, ExportMetadata(license="Apache-2.0", **facts))
        return read(out)

    return export


@pytest.mark.parametrize(("bits", "least"), [(32, 80), (16, 55), (8, 35)])
def test_a_bundle_draws_what_its_family_draws(
    small: Family, export: Any, tmp_path: Path, bits: int, least: float
) -> None:
    bundle = export(tmp_path / "b", bits=bits)
    theirs, ours = draw(small), draw(open_bundle(bundle, threads=1))
    assert theirs.std() > 0.05
    assert np.abs(theirs[0] - theirs[1]).max() > 0.05
    assert psnr(theirs, ours) > least


def test_the_encoder_encodes(small: Family, export: Any, tmp_path: Path) -> None:
    model = open_bundle(export(tmp_path / "b", bits=32), threads=1)
    images = sampling.batch_noise([3], (3, 64, 64)).clip(-1, 1)
    theirs = small.codec.encode(torch.from_numpy(images)).numpy()
    assert np.abs(model.codec.encode(images) - theirs).max() < 1e-4


def test_a_picture_does_not_depend_on_its_batch(export: Any, tmp_path: Path) -> None:
    model = open_bundle(export(tmp_path / "b"), threads=1)
    cond = model.text(PROMPTS)
    noise = sampling.batch_noise([0, 1, 2], model.latent)
    together, alone = (
        model.codec.decode(sampling.sample_flow(model.velocity, noise[rows], schedule.grid(4), cond[rows]))
        for rows in (slice(0, 3), slice(1, 2))
    )
    assert np.abs(together[1:2] - alone).max() < 1e-4


def test_the_manifest_says_what_the_family_says(small: Family, export: Any, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("do what you like")
    card = tmp_path / "card"
    card.write_text("what it cannot do")
    bundle: Bundle = export(tmp_path / "b", license_file=text, about={"styles": ["3D", "flat"]}, card=card)
    bundle.verify()
    said = (bundle.name, bundle.latent, bundle.downscale, bundle.shift, bundle.steps, bundle.guidance)
    assert said == ("small", small.latent, 8, 3.0, 4, None)
    assert (bundle.length, bundle.styles, bundle.license) == (tiny.LENGTH, ("3D", "flat"), "Apache-2.0")
    assert bundle.path("LICENSE").read_text() == "do what you like"
    assert bundle.path("README.md").read_text() == "what it cannot do"


def test_nothing_of_this_machine_is_in_the_files(export: Any, tmp_path: Path) -> None:
    bundle = export(tmp_path / "b")
    places = [str(Path(engine.__file__).parents[3]), str(Path(torch.__file__).parents[1]), str(tmp_path)]
    for name in bundle.files:
        data = bundle.path(name).read_bytes()
        assert not [place for place in places if place.encode() in data], name


def test_the_same_family_gives_the_same_bundle(export: Any, tmp_path: Path) -> None:
    assert export(tmp_path / "a").digest == export(tmp_path / "b").digest


def test_only_the_positions_in_use_ship(small: Family) -> None:
    net = TransformerModule(small).net
    side = small.latent[1] // 2
    assert net.pos_embed.pos_embed.shape[1] == side * side
    assert small.net.pos_embed.pos_embed.shape[1] == tiny.SMALL["pos_embed_max_size"] ** 2
    ours, theirs = ({id(weight) for weight in each.parameters()} for each in (net, small.net))
    assert ours < theirs  # the weights are not copied


def test_positions_of_an_oblong_picture_are_the_familys(small: Family) -> None:
    oblong = replace(small, latent=(4, 8, 12))
    cond = small.text(PROMPTS)
    x, t = torch.from_numpy(sampling.batch_noise([0, 1, 2], oblong.latent)), torch.full((3,), 0.75)
    with torch.no_grad():
        expected = small.velocity(x, t, cond)
        modulation = ModulationModule(oblong)(t, cond.pooled)
        assert torch.equal(TransformerModule(oblong)(x, cond.context, modulation), expected)


def test_the_second_clip_gets_its_own_padding(small: Family) -> None:
    """As in Stable Diffusion 3: one vocabulary, but the second tokenizer pads with ``!``."""
    second = tiny.byte_tokenizer(tiny.LENGTH)
    second.pad_token = "!"
    odd = sd3.assemble({**small.parts, "tokenizer_2": second}, name="odd")
    ids = odd.parts["tokenizer"](PROMPTS, padding="max_length", max_length=tiny.LENGTH, return_tensors="pt")
    with torch.no_grad():
        context, pooled = TextModule(odd)(ids.input_ids)
    expected, plain = odd.text(PROMPTS), small.text(PROMPTS)
    assert torch.allclose(context, expected.context, atol=1e-6)
    assert torch.allclose(pooled, expected.pooled, atol=1e-6)
    assert not torch.allclose(expected.context, plain.context, atol=1e-3)


def test_weights_too_many_for_one_file_lie_beside_it(
    export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = draw(open_bundle(export(tmp_path / "a"), threads=1))
    monkeypatch.setattr(graphs, "LARGEST", 20_000)
    parted = export(tmp_path / "b")
    assert "transformer.onnx.data" in parted.files
    assert np.array_equal(draw(open_bundle(parted, threads=1)), whole)


@pytest.mark.parametrize(
    ("fault", "said"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), UserError)],
)
def test_an_interrupted_export_leaves_what_was_there(
    export: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: BaseException,
    said: type[BaseException],
) -> None:
    before = export(tmp_path / "b").digest

    def fail(*_: Any) -> None:
        raise fault

    monkeypatch.setattr(common, "write_tokenizer", fail)
    with pytest.raises(said):
        export(tmp_path / "b", bits=32)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert read(tmp_path / "b").digest == before


def test_an_export_replaces_a_bundle_and_nothing_else(export: Any, tmp_path: Path) -> None:
    first = export(tmp_path / "b")
    assert export(tmp_path / "b", bits=32).digest != first.digest
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="is no bundle"):
        export(tmp_path / "mine")


def test_a_tiny_autoencoder_is_exported_too(tmp_path: Path) -> None:
    small = family(tiny=True)
    path = tmp_path / "decoder.onnx"
    graphs.write_graph(graphs.trace(graphs.parts(small)["decoder"]), path)
    latents = sampling.batch_noise([0], small.latent)
    theirs = small.codec.decode(torch.from_numpy(latents)).numpy()
    assert np.abs(Graph(path, 1)(latents=latents)[0] - theirs).max() < 1e-4


def test_graphs_are_standard_onnx(traced: dict[str, Any]) -> None:
    """No operator of one runtime only: other engines can take a bundle's graphs."""
    for stem, model in traced.items():
        onnx.checker.check_model(model, full_check=True)
        assert {node.domain for node in model.graph.node} <= {""}, stem
        assert [entry.version for entry in model.opset_import if entry.domain == ""] == [graphs.OPSET]


def test_a_diffusers_folder_comes_back(small: Family, tmp_path: Path) -> None:
    from fewstep.export import diffusers

    diffusers.export(small, tmp_path / "d", 32, ExportMetadata())
    back = sd3.load(tmp_path / "d")
    assert json.loads((tmp_path / "d" / FACTS).read_text())["steps"] == back.steps == 4
    assert np.array_equal(draw(back), draw(small))


@pytest.fixture(scope="module")
def reading() -> Family:
    """With a T5, whose tokens follow the CLIPs'."""
    return sd3.assemble(tiny.parts(with_t5=True), name="reading", steps=4, guidance=None)


@pytest.fixture(scope="module")
def with_t5(reading: Family, trace_once: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its bundle. All graphs but the net's and T5's are those of the small family."""
    folder = tmp_path_factory.mktemp("t5") / "b"
    own = [("velocity",), ("context",)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            engine, "trace", lambda part: (graphs.trace if part.outputs in own else trace_once)(part)
        )
        engine.export(reading, folder, 32, ExportMetadata())
    return read(folder)


def test_a_bundle_keeps_t5(reading: Family, with_t5: Bundle, small: Family) -> None:
    bundle, model = with_t5, open_bundle(with_t5, threads=1)
    assert bundle.t5_length == 24 and {"t5.onnx", "tokenizer_3.json"} <= bundle.files.keys()
    assert model.text(["x"]).context.shape[1] == bundle.length + bundle.t5_length
    theirs = draw(reading)
    assert psnr(theirs, draw(model)) > 80
    assert psnr(theirs, draw(small)) < 60  # the same nets without: T5 is heard


def test_t5_has_bits_of_its_own(reading: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(engine, "trace", lambda part: None)
    monkeypatch.setattr(engine, "quantize_weights", lambda model, bits: asked.append(bits))
    monkeypatch.setattr(engine, "write_graph", lambda model, path: path.touch())
    engine.export(reading, tmp_path / "b", 16, ExportMetadata(), t5_bits=8)
    assert asked == [16, 8, 16, 16, 16, 16]


def test_a_bundle_whose_t5_is_missing_is_refused(with_t5: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "b"
    shutil.copytree(with_t5.folder, folder)
    told = json.loads((folder / "bundle.json").read_text())
    del told["files"]["tokenizer_3.json"]
    (folder / "bundle.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="has no tokenizer_3"):
        read(folder)
