"""Core ML packages say what their family computes.

Core ML itself runs on Apple's systems alone. So the packages are read back here and run by :mod:`mil`, a
reader of our own: names, order, weights and palettes are what is checked, not Apple's arithmetic.
"""

from __future__ import annotations

import copy
import json
import re
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.drawn import psnr
from torch import nn

import tiny
import tiny_flux
from fewstep.cli.app import run
from fewstep.core import sampling, schedule
from fewstep.core.optional import install
from fewstep.core.types import Cond, UserError
from fewstep.export import coreml
from fewstep.export.base import ExportMetadata
from fewstep.export.common.fp16_norms import HalfGroupNorm, HalfRMSNorm, with_fp16_norms
from fewstep.export.common.graphs import GraphSpec, parts
from fewstep.export.common.wrappers import DecoderModule, ModulationModule, TextModule, TransformerModule
from fewstep.families import flux, sd3
from fewstep.families.base import Family
from fewstep.families.presets import PRESETS

pytestmark = pytest.mark.slow(45)

try:
    coreml._check_tools()
except (ImportError, UserError) as error:
    reason = str(error)
else:
    from mil import Package

    reason = ""
converts = pytest.mark.skipif(bool(reason), reason=f"coremltools does not convert here: {reason}")

PROMPTS = ["a red apple, 3D style", "two blue cars"]
FACTS = ExportMetadata(license="Apache-2.0", about={"styles": ["3D", "flat"]})
WIDE = tiny.SMALL | {"attention_head_dim": 32, "caption_projection_dim": 64, "num_layers": 2}
"""Rows of 64, so that palettes have groups, dual attention in both layers."""


@pytest.fixture(scope="module")
def small() -> Family:
    return sd3.assemble(tiny.parts(WIDE, with_t5=False), name="small", steps=4, guidance=None)


@pytest.fixture(scope="module")
def run_of(small: Family, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run's folder with the small family."""
    folder = tmp_path_factory.mktemp("run")
    sd3.save(small, folder / "model")
    return str(folder)


def said(capsys: Any) -> str:
    """The line of what went wrong; transformers' bars of loading come before it."""
    *bars, line = capsys.readouterr().err.splitlines()
    assert not [each for each in bars if "Traceback" in each or "fewstep:" in each]
    return line


@pytest.fixture(scope="module")
def made(small: Family) -> dict[str, Any]:
    """The small family's parts, converted once, since that takes seconds."""
    return {stem: coreml.converted(part) for stem, part in parts(small).items()}


@pytest.fixture(scope="module")
def palettized(made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The net's package with palettes of some bits; each is made once."""
    folder = tmp_path_factory.mktemp("palettes")

    def palettized(bits: int) -> Package:
        path = folder / f"{bits}.mlpackage"
        if not path.exists():
            coreml.quantize(made["transformer"], bits).save(str(path))
        return Package(path)

    return palettized


@pytest.fixture(scope="module")
def exported(small: Family, made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The small family's folder in some bits; each is made once."""
    folder = tmp_path_factory.mktemp("coreml")

    def export(bits: int) -> Path:
        out = folder / str(bits)
        if not out.exists():
            kept = iter(made.values())
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(coreml, "converted", lambda part: next(kept))
                coreml.export(small, out, bits, FACTS)
        return out

    return export


def rows(family: Family) -> Any:
    """Token numbers ``[B, L]`` of the prompts."""
    tokenizer, length = family.parts["tokenizer"], tiny.LENGTH
    return tokenizer(PROMPTS, padding="max_length", max_length=length, return_tensors="np").input_ids


def draw(family: Family, folder: Path, exact: bool) -> np.ndarray:
    """What the packages draw of the prompts, in two steps, one picture after the other."""
    stems = ("text", "modulation", "transformer", "decoder")
    text, modulation, net, decoder = (Package(folder / f"{stem}.mlpackage", exact) for stem in stems)
    pictures: list[np.ndarray] = []
    for seed, tokens in enumerate(rows(family).astype(np.int32)):
        cond = text.predict({"tokens": tokens[None]})

        def velocity(x: Any, t: Any, _: Cond, cond: Any = cond) -> np.ndarray:
            given = modulation.predict({"t": np.float32(t), "pooled": cond["pooled"]})
            return net.predict({"x": np.float32(x), "context": cond["context"], **given})["velocity"]

        noise = sampling.batch_noise([seed], family.latent)
        x = sampling.sample_flow(velocity, noise, schedule.grid(2), Cond(cond["context"], cond["pooled"]))
        pictures.append(decoder.predict({"latents": np.float32(x)})["images"])
    return np.concatenate(pictures)


def drawn(family: Family) -> np.ndarray:
    """The same by the family itself."""
    with torch.no_grad():
        noise = family.from_numpy(sampling.batch_noise([0, 1], family.latent))
        x = sampling.sample_flow(family.velocity, noise, schedule.grid(2), family.text(PROMPTS))
        return family.codec.decode(x).numpy()


def norms() -> list[tuple[Any, Any, tuple[int, ...]]]:
    """A plain norm, ours of it, and a shape that it takes."""
    from diffusers.models.normalization import RMSNorm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rms, group = RMSNorm(64, 1e-6), nn.GroupNorm(4, 16, eps=1e-6)
        for p in (*rms.parameters(), *group.parameters()):
            nn.init.normal_(p)
    return [
        (rms, HalfRMSNorm, (5, 3, 7, 64)),
        (group, HalfGroupNorm, (2, 16, 32, 24)),
        (group, HalfGroupNorm, (2, 16, 48)),
    ]


@pytest.mark.parametrize("scale", [0, 1e-6, 1e-3, 1, 300, 1e4])
@pytest.mark.parametrize("which", range(3))
def test_a_norm_is_the_plain_one_and_holds_in_float16(which: int, scale: float) -> None:
    plain, kind, shape = norms()[which]
    x = torch.from_numpy(sampling.noise(1, shape)) * scale
    with torch.no_grad():
        expected = copy.deepcopy(plain).double()(x.double())
        peak = expected.abs().max()
        assert (kind(plain)(x) - expected).abs().max() <= 1e-6 * peak
        expected = copy.deepcopy(plain).double()(x.half().double())
        assert (kind(copy.deepcopy(plain).half())(x.half()) - expected).abs().max() <= 2e-3 * peak
        if scale == 300:  # the plain squares overflow
            assert torch.isinf(x.half().square()).any()


def test_the_net_and_the_codec_with_these_norms_are_the_same(small: Family) -> None:
    cond, x = small.text(PROMPTS), torch.from_numpy(sampling.batch_noise([0, 1], small.latent))
    modulation = parts(small)["modulation"].module(torch.tensor([0.75, 0.75]), cond.pooled)
    for plain, given in (
        (TransformerModule(small), (x, cond.context, modulation)),
        (DecoderModule(small), (x,)),
    ):
        ours = with_fp16_norms(plain)
        kinds = [type(each) for each in ours.modules()]
        assert HalfRMSNorm in kinds or HalfGroupNorm in kinds
        assert not {"RMSNorm", "GroupNorm"} & {kind.__name__ for kind in kinds}
        with torch.no_grad():
            expected = plain(*given)
            assert (ours(*given) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert {"RMSNorm", "GroupNorm"} & {type(each).__name__ for each in plain.modules()}


@converts
@pytest.mark.parametrize(("bits", "exact", "least"), [(16, True, 60), (16, False, 45), (8, True, 35)])
def test_packages_draw_what_their_family_draws(
    small: Family, exported: Any, bits: int, exact: bool, least: float
) -> None:
    theirs = drawn(small)
    assert theirs.std() > 0.05
    assert np.abs(theirs[0] - theirs[1]).max() > 0.05
    assert psnr(theirs, draw(small, exported(bits), exact)) > least


@converts
def test_names_and_shapes_are_the_bundles(small: Family, exported: Any) -> None:
    out = exported(16)
    channels, height, width = small.latent
    assert len({path.stat().st_mode for path in out.rglob("*") if path.is_file()}) == 1
    told = json.loads((out / coreml.MANIFEST).read_text())
    given = {
        "text": {"tokens": (1, tiny.LENGTH)},
        "modulation": {"t": (1,), "pooled": (1, 56)},
        "transformer": {"x": (1, *small.latent), "context": (1, tiny.LENGTH, 64)},
        "decoder": {"latents": (1, *small.latent)},
        "encoder": {"images": (1, 3, 8 * height, 8 * width)},
    }
    for stem, inputs in given.items():
        package = Package(out / f"{stem}.mlpackage")
        assert inputs.items() <= package.inputs.items()
        outputs = list(parts(small)[stem].outputs)
        assert package.outputs == told["parts"][stem]["outputs"] == outputs
        shapes = {name: tuple(shape) for name, shape in told["parts"][stem]["inputs"].items()}
        assert package.inputs == shapes
        kinds = {each.type.multiArrayType.dataType for each in package.spec.description.input}
        assert kinds == {131104 if stem == "text" else 65568}  # int32, float32
        assert package.spec.specificationVersion == 9  # iOS 18, macOS 15
    assert told["license"] == "Apache-2.0"
    assert told["about"] == {"bits": 16, "styles": ["3D", "flat"]}
    said = (told["steps"], told["shift"], told["guidance"], told["sampler"], told["latent"]["channels"])
    assert said == (4, 3.0, None, "euler", channels)


@converts
def test_the_encoder_encodes(small: Family, exported: Any) -> None:
    package = Package(exported(16) / "encoder.mlpackage")
    images = sampling.batch_noise([3], package.inputs["images"][1:]).clip(-1, 1)
    theirs = small.codec.encode(torch.from_numpy(images)).numpy()
    assert np.abs(package.predict({"images": images})["latents"] - theirs).max() < 2e-3


def weights_of(net: Any) -> dict[str, np.ndarray]:
    """Weights of a net under the names that the converter gives them."""
    return {"net_" + name.replace(".", "_"): p.detach().numpy() for name, p in net.named_parameters()}


def check_palettes(package: Package, theirs: dict[str, np.ndarray], bits: int) -> int:
    """Each of these weights is the nearest of its group's palette, which has no more than 2^bits numbers.
    Those of norms, positions and the modulations have none, nor do small ones.

    Returns:
        How many have palettes.
    """
    read, seen = package.weights(), list[str]()
    for op in package.ops:
        if op.op_type != "constexpr_lut_to_dense":
            continue
        name = op.outputs[0].name.partition("_to_fp16")[0]
        weight, palettes = theirs[name].reshape(op.outputs[0].shape), op.lut.val.astype(np.float32)
        groups = len(weight) // coreml.GROUP if len(weight) % coreml.GROUP == 0 else 1
        assert palettes.shape[0] == groups
        assert palettes.shape[-2:] == (2**bits, 1)
        assert op.indices.val.max() < 2**bits
        ours, plain = (each.reshape(groups, -1) for each in (read[op.outputs[0].name][0], weight))
        for found, exact, palette in zip(ours, plain, palettes.reshape(groups, -1), strict=True):
            palette = np.sort(palette)
            nearest = palette[np.searchsorted((palette[1:] + palette[:-1]) / 2, exact)]
            error = np.abs(found - exact)
            assert (error <= 1.5 * np.abs(nearest - exact) + 0.01 * np.ptp(exact)).all(), name
            assert np.sqrt(np.square(error).mean()) < {6: 0.06, 4: 0.2}[bits] * exact.std(), name
        seen.append(name)
    large = {name for name, weight in theirs.items() if weight.size > coreml.SMALLEST and weight.ndim > 1}
    assert sorted(seen) == sorted(name for name in large if "norm" not in name and "time_text" not in name)
    return len(seen)


@converts
@pytest.mark.parametrize("bits", [6, 4])
def test_palettes_are_near_the_weights(small: Family, palettized: Any, bits: int) -> None:
    assert check_palettes(palettized(bits), weights_of(small.net), bits) > 10


@converts
def test_the_net_with_its_palettes_weights_draws_as_the_package(small: Family, palettized: Any) -> None:
    package = palettized(6)
    found = {name.partition("_to_fp16")[0]: array for name, (array, _) in package.weights().items()}
    net = copy.deepcopy(small.net)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if (key := "net_" + name.replace(".", "_")) in found:
                p.copy_(torch.from_numpy(found[key].reshape(p.shape)))
    other = sd3.assemble({**small.parts, "transformer": net}, name="small")
    cond, x = small.text(PROMPTS[:1]), torch.from_numpy(sampling.batch_noise([0], small.latent))
    with torch.no_grad():
        t = torch.tensor([0.75])
        modulation = parts(small)["modulation"].module(t, cond.pooled)
        expected = TransformerModule(other)(x, cond.context, modulation).numpy()
        plain = small.velocity(x, t, cond).numpy()
    given = {"x": x.numpy(), "context": cond.context.numpy(), "modulation": modulation.numpy()}
    read = package.predict(given)["velocity"]
    assert psnr(expected, read) > 60
    assert 40 < psnr(plain, read) < psnr(expected, read) - 6


@converts
def test_times_keep_their_precision(small: Family, exported: Any) -> None:
    """In float16, 1000 t would be a multiple of a half."""
    package = Package(exported(16) / "modulation.mlpackage", exact=False)
    pooled = small.text(PROMPTS[:1]).pooled
    module = parts(small)["modulation"].module
    for time in (0.9991, 0.74927, 0.0013):
        with torch.no_grad():
            theirs = module(torch.tensor([time]), pooled).numpy()
        ours = package.predict({"t": np.float32([time]), "pooled": pooled.numpy()})["modulation"]
        assert psnr(theirs, ours) > 55


@converts
def test_tokens_beyond_int16_are_looked_up(small: Family, tmp_path: Path) -> None:
    """CLIP has 49408 of them; coremltools counts in 16 bits where it thinks it may."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    size: dict[str, Any] = {
        "vocab_size": 49408,
        "max_position_embeddings": tiny.LENGTH,
        "eos_token_id": 49407,
    }
    size |= {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "projection_dim": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=8, **size)).eval()
    clips = {"text_encoder": clip, "text_encoder_2": clip}
    text = TextModule(sd3.assemble({**small.parts, **clips}, name="large")).eval()
    text.eos, text.pads = 49407, (49407, 0)
    tokens = torch.full((2, tiny.LENGTH), 49407)
    tokens[:, :5] = torch.tensor([49406, 40000, 320, 32768, 33000])
    coreml.converted(GraphSpec(text, {"tokens": tokens}, ("context", "pooled"))).save(
        str(tmp_path / "t.mlpackage")
    )
    read = Package(tmp_path / "t.mlpackage").predict({"tokens": tokens[:1].int().numpy()})
    with torch.no_grad():
        context, pooled = text(tokens[:1])
    assert psnr(context.numpy(), read["context"]) > 55
    assert psnr(pooled.numpy(), read["pooled"]) > 55


@converts
def test_the_layers_of_sd35_medium_convert(
    small: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with dual attention and the last one, at their real width, for a picture of 256 px.

    Then with palettes of 6 bits for five of its matrices, and for 768 channels: all would take minutes.
    """
    import coremltools.optimize.coreml as cto
    from diffusers import SD3Transformer2DModel

    shape = dict(PRESETS["sd3.5-medium"].net) | {"num_layers": 2, "dual_attention_layers": (0,)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SD3Transformer2DModel(**shape | {"pos_embed_max_size": 64}).requires_grad_(False)
    family = replace(small, net=net, latent=(16, 32, 32))
    cond = Cond(*(torch.from_numpy(sampling.batch_noise([0], shape)) for shape in ((77, 4096), (2048,))))
    with torch.no_grad():
        modulation = ModulationModule(family)(torch.tensor([0.75]), cond.pooled)
    given = {"x": torch.from_numpy(sampling.batch_noise([1], family.latent)), "context": cond.context}
    given["modulation"] = modulation
    module = TransformerModule(family).eval()
    with torch.no_grad():
        theirs = module(**given).numpy()

    def saved(model: Any, name: str) -> Package:
        model.save(str(tmp_path / name))
        package = Package(tmp_path / name)
        assert package.inputs == {name: tuple(each.shape) for name, each in given.items()}
        assert package.outputs == ["velocity"]
        return package

    def drawn(package: Package) -> np.ndarray:
        return package.predict({name: each.numpy() for name, each in given.items()})["velocity"]

    model = coreml.converted(GraphSpec(module, given, ("velocity",)))
    package = saved(model, "16.mlpackage")
    kinds = [op.op_type for op in package.ops]
    assert kinds.count("scaled_dot_product_attention") == 3
    assert "reduce_max" in kinds
    assert psnr(theirs, drawn(package)) > 60
    found, part = cto.get_weights_metadata, "transformer_blocks_0_attn_to_"
    monkeypatch.setattr(coreml, "GROUP", 768)
    monkeypatch.setattr(
        cto, "get_weights_metadata", lambda *a: {k: v for k, v in found(*a).items() if part in k}
    )
    package = saved(coreml.quantize(model, 6), "6.mlpackage")
    attention = {name: weight for name, weight in weights_of(net).items() if part in name}
    assert check_palettes(package, attention, 6) == 5
    assert psnr(theirs, drawn(package)) > 40


@converts
def test_long_attention_goes_by_slices_of_the_queries(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    x = torch.from_numpy(sampling.batch_noise([0], (2, 1300, 8)))
    coreml.converted(GraphSpec(Attention(), {"x": x}, ("y",))).save(str(tmp_path / "t.mlpackage"))
    package = Package(tmp_path / "t.mlpackage")
    kinds = [op.op_type for op in package.ops]
    assert (kinds.count("softmax"), kinds.count("scaled_dot_product_attention")) == (16, 0)
    assert psnr(Attention()(x).numpy(), package.predict({"x": x.numpy()})["y"]) > 60


@converts
@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_what_was_there(
    small: Family, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    out = tmp_path / "b"
    shutil.copytree(exported(16), out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fail(*_: Any) -> None:
        raise fault

    monkeypatch.setattr(coreml, "converted", fail)
    with pytest.raises(type(fault)):
        coreml.export(small, out, 8, FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@converts
def test_an_export_replaces_an_export_and_nothing_else(
    small: Family, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "b"
    shutil.copytree(exported(8), out)
    (out / "old").touch()
    monkeypatch.setattr(coreml, "parts", lambda family: {})
    coreml.export(small, out, 16, FACTS)
    assert not (out / "old").exists()
    assert json.loads((out / coreml.MANIFEST).read_text())["about"]["bits"] == 16
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / coreml.MANIFEST).write_text('{"format": 3}')
    for name in ("mine", "file", "other"):
        with pytest.raises(UserError, match="is no Core ML export"):
            coreml.export(small, tmp_path / name, 16, FACTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "file", "mine", "other"]


@converts
def test_nothing_of_this_machine_is_in_the_files(exported: Any) -> None:
    places = [str(Path(coreml.__file__).parents[3]), str(Path(torch.__file__).parents[1]), "/tmp/"]
    for path in exported(8).rglob("*"):
        if path.is_file():
            assert not [place for place in places if place.encode() in path.read_bytes()], path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bits", "5"], "bits for coreml must be one of 4, 6, 8, 16, not 5"),
        ([], install("coreml")),
    ],
)
def test_a_wrong_number_of_bits_and_a_missing_coremltools_are_a_line(
    run_of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], says: str
) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    assert run(["export", run_of, "--to", "coreml", "-o", str(tmp_path / "b"), *arguments]) == 2
    assert says in said(capsys)
    assert not list(tmp_path.iterdir())


def test_another_family_is_a_line(tmp_path: Path, capsys: Any) -> None:
    flux.save(flux.assemble(tiny_flux.parts("schnell"), name="small"), tmp_path / "model")
    assert run(["export", str(tmp_path), "--to", "coreml", "-o", str(tmp_path / "b")]) == 2
    assert "is of the family flux, which cannot be written for coreml" in said(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@converts
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a folder of coremltools
@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")
def test_a_full_disk_is_a_line(run_of: str, exported: Any, tmp_path: Path, capsys: Any) -> None:
    exported(16)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        status = run(["export", run_of, "--to", "coreml", "--bits", "16", "-o", str(tmp_path / "b")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    assert "cannot write" in said(capsys)
    assert not list(tmp_path.iterdir())


@converts
def test_the_documents_program_draws(
    small: Family, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Python of docs/guides/coreml.md, with this file's reader in the place of Core ML."""
    text = (Path(__file__).parents[2] / "docs/guides/coreml.md").read_text("utf-8")
    [program] = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    monkeypatch.setattr("coremltools.models.MLModel", lambda path: Package(Path(path)))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(exported(16), tmp_path / "pocket-coreml")
    exec(compile(program, "coreml.md", "exec"), {})
    with torch.no_grad():
        noise = small.from_numpy(sampling.batch_noise([7], small.latent))
        cond = small.text(["a red apple, 3D style"])
        x = sampling.sample_flow(small.velocity, noise, schedule.grid(4, small.shift), cond)
        theirs = (small.codec.decode(x).clip(-1, 1) * 127.5 + 127.5).numpy()[0]
    ours = np.asarray(Image.open(tmp_path / "apple.png"), np.float32).transpose(2, 0, 1)
    assert np.abs(ours - theirs).max() < 2


@converts
def test_the_documents_swift_names_what_the_packages_have(exported: Any) -> None:
    """Nothing here compiles it."""
    text = (Path(__file__).parents[2] / "docs/guides/coreml.md").read_text("utf-8")
    [program] = re.findall(r"^```swift\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    told = json.loads((exported(16) / coreml.MANIFEST).read_text())["parts"]
    del told["encoder"]
    names = {name for part in told.values() for name in (*part["inputs"], *part["outputs"])}
    assert set(re.findall(r'"(\w+)"', program)) == {*told, *names, "mlpackage"}
