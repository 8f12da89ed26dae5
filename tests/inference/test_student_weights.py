"""LoRA adapters of every layout: the image is stock diffusers', or that of the same adapter in its names."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
import lora_layouts as layouts
import tiny
import tiny_flux
from fewstep.cli.app import run
from fewstep.core import sampling
from fewstep.core.types import UserError
from fewstep.families import flux, sd3
from fewstep.families.lora.adapters import LoraWarning
from fewstep.images.record import read_records
from fewstep.inference.load import load
from fewstep.inference.options import TorchOptions

pytestmark = pytest.mark.slow(10)

PROMPT, STEPS = "a red apple", 3
KINDS: dict[str, ModuleType] = {"sd3": sd3, "flux": flux}
Loras = Sequence[tuple[Path, float]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("models")
    sd3.save(sd3.assemble(tiny.parts(), name="small", steps=STEPS, guidance=None), at / "sd3")
    flux.save(flux.assemble(tiny_flux.parts("dev"), name="small", steps=STEPS, side=8), at / "flux")
    return {kind: at / kind for kind in KINDS}


@pytest.fixture(scope="module")
def nets(models: dict[str, Path]) -> dict[str, Any]:
    return {kind: KINDS[kind].load(place).parts for kind, place in models.items()}


def ours(model: Path, loras: Any = None, **options: Any) -> np.ndarray:
    pipe = fewstep.load(model, **({} if loras is None else {"lora": loras}), **options)
    return np.asarray(pipe(PROMPT, seed=3)[0], np.float64)


def stock(kind: str, model: Path, loras: Loras) -> np.ndarray:
    """What stock diffusers draws: ``load_lora_weights`` of each, and ``set_adapters``."""
    from diffusers import FluxPipeline, StableDiffusion3Pipeline

    pipe: Any = (StableDiffusion3Pipeline if kind == "sd3" else FluxPipeline).from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    names = [f"adapter_{index}" for index in range(len(loras))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of several adapters
        for name, (path, _) in zip(names, loras, strict=True):
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    pipe.set_adapters(names, [weight for _, weight in loras])
    noise = torch.from_numpy(sampling.batch_noise([3], (4, 8, 8)))
    made = pipe(
        PROMPT,
        latents=flux.pack(noise) if kind == "flux" else noise,
        sigmas=np.linspace(1, 1 / STEPS, STEPS).tolist(),
        num_inference_steps=STEPS,
        guidance_scale=1.0 if kind == "sd3" else flux.GUIDANCE,
        height=64,
        width=64,
        max_sequence_length=tiny.LENGTH,
        output_type="np",
    )
    return made.images[0].astype(np.float64) * 255


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(float(((one - other) ** 2).mean()), 1e-9)))


def assert_effect(image: np.ndarray, model: Path) -> None:
    assert psnr(image, ours(model)) < 40, "the adapter changes next to nothing, so nothing is compared"


def attention(kind: str, nets: dict[str, Any], seed: int = 0) -> Any:
    """Random factors of the layers that LoRAs adapt as a rule."""
    return layouts.draw(layouts.linears(nets[kind]["transformer"], KINDS[kind].TARGETS), seed)


# --- where stock diffusers reads the layout ---


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_layout_is_stocks(kind: str, models: Any, nets: Any, tmp_path: Path) -> None:
    factors = attention(kind, nets)
    said = {"r": 4, "lora_alpha": 8, "target_modules": sorted(factors)}
    path = layouts.write(tmp_path / "a.safetensors", layouts.diffusers(factors), layouts.configured(**said))
    image = ours(models[kind], f"{path}:0.7")
    assert_effect(image, models[kind])
    assert psnr(image, stock(kind, models[kind], [(path, 0.7)])) >= 50


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_in_the_header_are_stocks(kind: str, models: Any, nets: Any, tmp_path: Path) -> None:
    factors = attention(kind, nets)
    wide = {
        layer: (torch.cat([a, a.flip(1)]), torch.cat([b, b.flip(0)], 1)) for layer, (a, b) in factors.items()
    }
    mixed = {layer: wide[layer] if layer.endswith("to_k") else pair for layer, pair in factors.items()}
    said = {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": sorted(factors),
        "rank_pattern": {"to_k": 8},
        "alpha_pattern": {r".*attn\.to_[qk]": 3.0, "^transformer_blocks.0.ff.net.2": 20},
    }
    path = layouts.write(tmp_path / "a.safetensors", layouts.diffusers(mixed), layouts.configured(**said))
    image = ours(models[kind], str(path))
    assert_effect(image, models[kind])
    assert psnr(image, stock(kind, models[kind], [(path, 1.0)])) >= 50


@pytest.mark.parametrize("kind", KINDS)
def test_several_are_stocks_set_adapters(kind: str, models: Any, nets: Any, tmp_path: Path) -> None:
    every = layouts.draw(layouts.linears(nets[kind]["transformer"]), seed=5, scale=0.25)
    clip = layouts.draw(layouts.linears(nets[kind]["text_encoder"], ("_proj", "fc1", "fc2")), 6, scale=0.3)
    clip.pop("text_projection", None)
    tensors = layouts.diffusers(every) | layouts.diffusers(clip, part="text_encoder")
    first = layouts.write(tmp_path / "a.safetensors", tensors)
    second = layouts.write(tmp_path / "b.safetensors", layouts.diffusers(attention(kind, nets, seed=7)))
    both = [(first, 0.8), (second, -0.5)]
    image = ours(models[kind], both)
    assert_effect(image, models[kind])
    assert psnr(image, ours(models[kind], [(first, 0.8)])) < 40
    assert psnr(image, stock(kind, models[kind], both)) >= 50


@pytest.mark.parametrize("layout", ["kohya", "ComfyUI"])
def test_flux_under_its_authors_names_is_stocks(layout: str, models: Any, nets: Any, tmp_path: Path) -> None:
    shapes = layouts.linears(nets["flux"]["transformer"])
    drawn, _ = layouts.original("flux", shapes)
    # Stock splits linear1 by FLUX's own widths, and puts layers outside the blocks where nobody looks.
    read = {name: pair for name, pair in drawn.items() if "blocks" in name and "linear1" not in name}
    clip = layouts.draw(layouts.linears(nets["flux"]["text_encoder"], ("_proj", "fc1", "fc2")), 6, scale=0.3)
    if layout == "kohya":
        tensors = layouts.kohya(read) | layouts.kohya(clip, prefix="lora_te1_")
    else:
        tensors = layouts.comfy(read) | layouts.comfy(clip, prefix="text_encoders.clip_l.transformer.")
    path = layouts.write(tmp_path / "a.safetensors", tensors)
    image = ours(models["flux"], str(path))
    assert_effect(image, models["flux"])
    assert psnr(image, stock("flux", models["flux"], [(path, 1.0)])) >= 50


# --- where it does not: the same adapter in its names ---


def of_layout(layout: str, kind: str, parts: Any, place: Path) -> tuple[Path, Path]:
    """An adapter in a layout, and the same one under diffusers' names with its scale in ``B``."""
    shapes = layouts.linears(parts["transformer"])
    drawn, plain = layouts.original(kind, shapes)
    scale = layouts.ALPHA / layouts.RANK
    if layout == "PEFT":
        plain = layouts.draw(shapes)
        path = layouts.peft_folder(place / "peft", plain, r=4, lora_alpha=layouts.ALPHA)
    elif layout == "kohya":
        path = layouts.write(place / "k.safetensors", layouts.kohya(drawn))
    elif layout == "kohya, by the header":
        said = {"ss_network_alpha": f"{layouts.ALPHA:g}", "ss_network_dim": "4"}
        path = layouts.write(place / "k.safetensors", layouts.kohya(drawn, alpha=None), said)
    elif layout == "ComfyUI":
        path = layouts.write(place / "c.safetensors", layouts.comfy(drawn))
    else:
        scale = 1.0
        tensors = layouts.comfy(drawn, alpha=None, ends=("lora_A", "lora_B"))
        path = layouts.write(place / "c.safetensors", tensors)
    return path, layouts.write(place / "plain.safetensors", layouts.diffusers(plain, scale))


@pytest.mark.filterwarnings("ignore::fewstep.families.lora.adapters.LoraWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["PEFT", "kohya", "kohya, by the header", "ComfyUI", "ComfyUI, lora_A"])
def test_a_layout_is_the_same_adapter(layout: str, kind: str, models: Any, nets: Any, tmp_path: Path) -> None:
    path, plain = of_layout(layout, kind, nets[kind], tmp_path)
    image = ours(models[kind], str(path))
    assert_effect(image, models[kind])
    assert psnr(image, ours(models[kind], str(plain))) >= 60
    if layout == "PEFT":  # the rule itself: under diffusers' names it is stock's
        assert psnr(image, stock(kind, models[kind], [(plain, 1.0)])) >= 50


def test_every_text_encoder_of_sd3(models: Any, nets: Any, tmp_path: Path) -> None:
    images: list[np.ndarray] = []
    places = ("text_encoder", "text_encoder_2", "text_encoder_3")
    comfy = [f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")]
    for layout in ("diffusers", "kohya", "ComfyUI"):
        tensors: dict[str, torch.Tensor] = {}
        for index, part in enumerate(places):
            drawn = layouts.draw(layouts.linears(nets["sd3"][part]), seed=index, scale=0.5)
            if layout == "diffusers":
                tensors |= layouts.diffusers(drawn, layouts.ALPHA / layouts.RANK, part)
            elif layout == "kohya":
                tensors |= layouts.kohya(drawn, prefix=f"lora_te{index + 1}_")
            else:
                tensors |= layouts.comfy(drawn, prefix=comfy[index])
        images.append(ours(models["sd3"], layouts.write(tmp_path / f"{layout}.safetensors", tensors)))
    assert_effect(images[0], models["sd3"])
    assert min(psnr(images[0], image) for image in images[1:]) >= 60


# --- how it is laid over ---


def test_weight_nought_is_no_lora(models: Any, nets: Any, tmp_path: Path) -> None:
    path = layouts.write(tmp_path / "a.safetensors", layouts.diffusers(attention("sd3", nets)))
    assert np.array_equal(ours(models["sd3"], f"{path}:0"), ours(models["sd3"]))


def test_it_is_added_to_a_students_lora(models: Any, nets: Any, tmp_path: Path) -> None:
    student, other = attention("sd3", nets, 1), attention("sd3", nets, 2)
    layouts.write(tmp_path / "run" / "pytorch_lora_weights.safetensors", layouts.diffusers(student))
    (tmp_path / "run" / "fewstep.json").write_text(json.dumps({"steps": STEPS}))
    path = layouts.write(tmp_path / "a.safetensors", layouts.diffusers(other))
    options: Any = {"bits": 32, "device": "cpu"}
    both = ours(models["sd3"], f"{path}:0.5", student=str(tmp_path / "run"), **options)
    alone = ours(models["sd3"], student=str(tmp_path / "run"), **options)
    assert psnr(both, alone) < 45
    beside = [(tmp_path / "run" / "pytorch_lora_weights.safetensors", 1.0), (path, 0.5)]
    assert psnr(both, ours(models["sd3"], beside)) >= 60


def test_it_is_added_to_a_students_net(models: Any, nets: Any, tmp_path: Path) -> None:
    model = sd3.load(models["sd3"])
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.mul_(1.1)
    sd3.save(
        sd3.assemble(dict(model.parts), name="s", steps=STEPS, guidance=None), tmp_path / "run" / "model"
    )
    path = layouts.write(tmp_path / "a.safetensors", layouts.diffusers(attention("sd3", nets)))
    options: Any = {"bits": 32, "device": "cpu"}
    image = ours(models["sd3"], str(path), student=str(tmp_path / "run"), **options)
    assert psnr(image, ours(models["sd3"], student=str(tmp_path / "run"), **options)) < 40
    assert psnr(image, ours(tmp_path / "run" / "model", str(path))) >= 60


def test_a_plan_with_a_lora_is_the_same_image(
    models: Any, nets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.inference.memory_plan.RESIDENCIES", ("none",))
    monkeypatch.setattr("fewstep.families.lora.adapters.CHUNK", 64)  # several pieces of each layer
    path = layouts.write(tmp_path / "a.safetensors", layouts.diffusers(attention("flux", nets)))
    image = ours(models["flux"], str(path), memory="64GiB", bits=32, device="cpu")
    assert psnr(image, ours(models["flux"], str(path))) >= 60


def test_weights_in_16_bits_keep_what_a_small_lora_adds(models: Any, nets: Any, tmp_path: Path) -> None:
    """Rounded to bfloat16, a change of a thousandth would be lost."""
    half = sd3.load(models["sd3"], dtype="bfloat16")
    sd3.save(half, tmp_path / "half")
    factors = {layer: (a * 0.02, b * 0.02) for layer, (a, b) in attention("sd3", nets).items()}
    path = layouts.write(tmp_path / "a.safetensors", layouts.diffusers(factors))
    options = TorchOptions(lora=(str(path),), bits=32, device="cpu")
    model: Any = load(tmp_path / "half", sd3.ARCHITECTURE, options).model
    layer, (a, b) = next(iter(factors.items()))
    stored = half.net.get_submodule(layer).weight.float()
    held = model.velocity.velocity.net.get_submodule(layer).weight
    assert (held - stored - b @ a).abs().max() < 1e-7 < (b @ a).abs().max()


def test_a_single_file_takes_loras(
    models: Any, nets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewstep.export.common import sd3_keys
    from fewstep.families import single_file

    monkeypatch.setattr(single_file, "_fetch", lambda *_: models["sd3"])
    parts = tiny.original()
    sd3.save(sd3.assemble(parts, name="o", steps=STEPS, guidance=None), tmp_path / "o")
    file = layouts.write(
        tmp_path / "m.safetensors", sd3_keys.checkpoint(parts), {"fewstep": '{"steps": 3, "guidance": null}'}
    )
    path = layouts.write(tmp_path / "a.safetensors", layouts.diffusers(attention("sd3", nets)))
    image = ours(file, str(path))
    assert psnr(image, ours(file)) < 35
    assert psnr(image, ours(tmp_path / "o", str(path))) >= 60
    with pytest.raises(UserError, match="--student is for diffusers folders"):
        fewstep.load(file, lora=str(path), student=str(tmp_path))


# --- the command line and records ---


def test_a_record_names_loras_and_makes_the_image_again(models: Any, nets: Any, tmp_path: Path) -> None:
    paths = [
        layouts.write(tmp_path / f"{name}.safetensors", layouts.diffusers(attention("sd3", nets, seed)))
        for seed, name in enumerate(("one", "two:2"))
    ]
    first, again, without = (tmp_path / f"{name}.png" for name in ("first", "again", "without"))
    loras = ("--lora", f"{paths[0]}:0.3", "--lora", str(paths[1]))
    model = ("--model", str(models["sd3"]))
    assert run(["generate", PROMPT, "--seed", "1", *model, *loras, "-o", str(first)]) == 0
    assert read_records(first)[0].lora == (f"{paths[0]}:0.3", f"{paths[1]}:1.0")
    assert run(["generate", "--from", str(first), "-o", str(again)]) == 0
    assert again.read_bytes() == first.read_bytes()
    assert run(["generate", PROMPT, "--seed", "1", *model, "-o", str(without)]) == 0
    assert read_records(without)[0].lora is None
    assert psnr(*(np.asarray(fewstep.images.io.open_image(at), float) for at in (first, without))) < 40  # type: ignore[attr-defined]


def test_bad_loras_are_one_line(
    models: Any, nets: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = layouts.write(tmp_path / "good.safetensors", layouts.diffusers(attention("sd3", nets)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.bin").write_bytes(b"x")
    cases = {
        "there is no LoRA": str(tmp_path / "nowhere.safetensors"),
        "holds no LoRA": str(tmp_path / "empty"),
        "only .safetensors": str(tmp_path / "a.bin"),
        "must be a number": f"{good}:strong",
        "must be a finite number": f"{good}:nan",
        "must name": "",
        "--lora is for PyTorch models": None,
    }
    for words, value in cases.items():
        model = "pocket" if value is None else str(models["sd3"])
        assert (
            run(["generate", PROMPT, "--model", model, "--lora", value if value is not None else str(good)])
            == 2
        )
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fewstep: ")]
        assert len(lines) == 1, lines
        assert (words if value is not None else "is a bundle") in lines[0], lines


def test_what_the_model_has_no_layer_for_is_named(models: Any, nets: Any, tmp_path: Path) -> None:
    tensors = layouts.diffusers(attention("flux", nets))
    plain = ours(models["flux"], layouts.write(tmp_path / "a.safetensors", tensors))
    more = layouts.draw({"encoder.block.0.layer.0.SelfAttention.q": (64, 64)})
    path = layouts.write(tmp_path / "b.safetensors", tensors | layouts.diffusers(more, part="text_encoder_3"))
    with pytest.warns(LoraWarning, match=r"left out .* text_encoder_3\.encoder"):
        assert np.array_equal(ours(models["flux"], str(path)), plain)


def test_export_writes_the_sum(models: Any, nets: Any, tmp_path: Path) -> None:
    path = layouts.write(tmp_path / "a.safetensors", layouts.diffusers(attention("sd3", nets)))
    out = tmp_path / "merged"
    assert (
        run(
            [
                "export",
                str(models["sd3"]),
                "--to",
                "diffusers",
                "--bits",
                "32",
                "--lora",
                f"{path}:0.6",
                "-o",
                str(out),
            ]
        )
        == 0
    )
    assert psnr(ours(out), ours(models["sd3"], f"{path}:0.6")) >= 60
    assert psnr(ours(out), ours(models["sd3"])) < 40
