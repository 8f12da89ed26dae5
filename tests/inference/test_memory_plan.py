"""Parts that come and go, students laid over, few bits: the pictures are the plain pipeline's."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep
import tiny
import tiny_flux
from fewstep.cli.app import run
from fewstep.core import sampling, schedule
from fewstep.core.guidance import Guided
from fewstep.core.types import UserError
from fewstep.families import flux, sd3
from fewstep.families.base import Family
from fewstep.families.lora.alpha import FILE
from fewstep.families.lora.role_files import save_role
from fewstep.inference.load import load
from fewstep.inference.memory_plan import RESIDENCIES, Plan
from fewstep.inference.options import TorchOptions
from fewstep.modules.lora import LoRARoles

pytestmark = pytest.mark.slow(35)

PROMPT = "a red apple"
HAVE_AO = importlib.util.find_spec("torchao") is not None


@pytest.fixture(scope="module", autouse=True)
def fp32() -> Any:
    """What a CPU without units for bf16 computes in, whichever this one is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewstep.inference.load.prefers_bf16", lambda device: False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("staged") / "base"
    sd3.save(sd3.assemble(tiny.parts(), name="base", steps=3, guidance=2.0), at)
    return at


def plainly(folder: Path, kind: Any = sd3, **options: Any) -> Family:
    """The plain model, its weights aligned in memory: on some processors a product rounds by that."""
    family = kind.load(folder, **options)
    for part in family.parts.values():
        if isinstance(part, torch.nn.Module):
            for p in part.parameters():
                p.data = p.data.clone()
    return family


def walked(model: Any, guidance: float | None) -> torch.Tensor:
    velocity = model.velocity
    if guidance is not None:
        velocity = Guided(velocity, model.text([""]), guidance)
    noise = model.from_numpy(sampling.batch_noise([3], model.latent))
    with torch.no_grad():
        return sampling.sample_flow(velocity, noise, schedule.grid(3, model.shift), model.text([PROMPT]))


def pixels(model: Any, latents: torch.Tensor, plain: bool = False) -> torch.Tensor:
    if plain:  # ours convolves in this layout on a CPU
        model.parts["vae"].to(memory_format=torch.channels_last)
    with torch.no_grad():
        return model.codec.decode(latents)


@pytest.mark.parametrize(("stay", "staying"), [*((stay, 0) for stay in RESIDENCIES), ("encoders", 3)])
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_a_staged_picture_is_the_plain_one_to_the_bit(
    folder: Path, stay: Any, staying: int, guidance: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.inference.memory_plan.RESIDENCIES", (stay,))
    monkeypatch.setattr(
        Plan, "with_resident_layers", lambda plan, layers: replace(plan, resident_layers=staying)
    )
    plain = plainly(folder)
    expected = walked(plain, guidance)
    made = load(folder, sd3.ARCHITECTURE, TorchOptions(memory="64GiB"))
    assert made.plan.config.residency == stay and made.plan.config.bits == 32
    latents = walked(made.model, guidance)
    assert latents.std() > 0.1
    assert torch.equal(latents, expected)
    assert torch.equal(pixels(made.model, latents), pixels(plain, expected, plain=True))
    velocity: Any = made.model.velocity
    here = {name for name, part in velocity.manager.parts.items() if part.loaded}
    if stay == "none":
        assert here == {"vae"}
    if stay in ("codec", "net"):
        assert here == {"vae", "transformer"}
    layers = [layer.loaded for layer in velocity.layers.values()]
    assert layers == [stay == "all"] * (len(layers) - staying) + [True] * staying
    assert torch.equal(walked(made.model, guidance), expected)  # what left comes back the same


def test_flux_is_staged_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.inference.memory_plan.RESIDENCIES", ("none",))
    flux.save(flux.assemble(tiny_flux.parts("dev"), name="small", steps=3, side=8), tmp_path / "m")
    made = load(tmp_path / "m", flux.ARCHITECTURE, TorchOptions(memory="64GiB"))
    assert torch.equal(walked(made.model, None), walked(plainly(tmp_path / "m", flux), None))


@pytest.mark.parametrize("size", ["64x32", "32x96", "16"])
def test_other_sizes_see_their_own_positions(folder: Path, size: str) -> None:
    plain = plainly(folder)
    made = load(folder, sd3.ARCHITECTURE, TorchOptions(size=size))
    width, height = (int(side) // 8 for side in (size.split("x") * 2)[:2])
    assert made.model.latent == (4, height, width)
    expected = walked(replace(plain, latent=(4, height, width)), None)
    assert torch.equal(walked(made.model, None), expected)
    velocity: Any = made.model.velocity
    assert velocity.velocity.net.pos_embed.pos_embed.shape[1] <= (max(height, width) // 2 + 1) ** 2 < 256


def test_a_prompt_is_read_once(folder: Path) -> None:
    text: Any = load(folder, sd3.ARCHITECTURE, TorchOptions()).model.text
    first = text([PROMPT, "a cat"])
    alone: Any = plainly(folder).text
    assert torch.equal(first.context[1:], alone(["a cat"]).context)
    assert torch.equal(first.pooled[:1], alone([PROMPT]).pooled)
    text.encode = None  # whoever asks for an encoder now fails
    again = text(["a cat", PROMPT, PROMPT])
    assert torch.equal(again.context[1], first.context[0]) and torch.equal(again.pooled[0], first.pooled[1])


# --- students ---


def student_of(base: Path, place: Path, **options: Any) -> Family:
    """Another net of the same shape as a run's student, drawing in 2 steps."""
    parts = dict(sd3.load(base, t5=options.get("t5")).parts)
    net = sd3.load(base).net
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    family = sd3.assemble(parts | {"transformer": net}, name="student", steps=2, guidance=None)
    sd3.save(family, place)
    return family


def test_a_students_net_steps_and_guidance_are_laid_over(folder: Path, tmp_path: Path) -> None:
    student_of(folder, tmp_path / "run" / "model", t5=False)
    made = load(folder, sd3.ARCHITECTURE, TorchOptions(student=str(tmp_path / "run")))
    model = made.model
    assert (model.name, model.steps, model.guidance, model.sampler) == ("student", 2, None, "euler")
    assert "text_encoder_3" not in model.velocity.manager.parts  # type: ignore[attr-defined]
    assert torch.equal(walked(model, None), walked(plainly(tmp_path / "run" / "model"), None))


def lora_of(base: Path, place: Path, rank: int = 2, **facts: Any) -> dict[str, torch.Tensor]:
    """A LoRA with random values at ``place``; the merged weights."""
    family = sd3.load(base)
    roles = LoRARoles(family.net, ("student",), rank=rank, targets=sd3.TARGETS)
    with torch.no_grad():
        for p in roles.net("student").parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    save_role(roles, "student", place)
    if facts:
        (place / "fewstep.json").write_text(json.dumps(facts))
    return roles.merged("student")


def test_a_lora_is_added_as_the_run_merges_it(folder: Path, tmp_path: Path) -> None:
    merged = lora_of(folder, tmp_path / "run" / "lora", steps=4, sampler="renoise", t5=False)
    for name in ("run", "run/lora", f"run/lora/{FILE}"):
        model = load(folder, sd3.ARCHITECTURE, TorchOptions(student=str(tmp_path / name))).model
        assert (model.steps, model.guidance, model.sampler) == (4, None, "renoise")
    velocity: Any = model.velocity
    held = velocity.velocity.net.state_dict()
    assert all(torch.equal(value, merged[key]) for key, value in held.items() if key != "pos_embed.pos_embed")
    base = plainly(folder, t5=False)
    base.net.load_state_dict(merged)
    assert torch.equal(walked(model, None), walked(base, None))


@pytest.mark.skipif(not HAVE_AO, reason="torchao is not installed")
def test_a_lora_in_8_bits_loses_no_more_than_one_beside_the_weights(folder: Path, tmp_path: Path) -> None:
    merged = lora_of(folder, tmp_path / "lora", steps=4)
    bits8 = load(folder, sd3.ARCHITECTURE, TorchOptions(student=str(tmp_path / "lora"), bits=8)).model
    plain8 = load(folder, sd3.ARCHITECTURE, TorchOptions(bits=8)).model
    base = sd3.load(folder).net.state_dict()
    fused, beside = 0.0, 0.0
    for key, weight in bits8.velocity.velocity.net.named_parameters():  # type: ignore[attr-defined]
        if hasattr(weight, "dequantize") and type(weight).__name__ == "Int8Tensor":
            fused += float((weight.dequantize() - merged[key]).square().sum())
            other = plain8.velocity.velocity.net.get_parameter(key)  # type: ignore[attr-defined]
            beside += float((other.dequantize() - base[key]).square().sum())
    assert 0 < fused < 1.5 * beside
    net = sd3.load(folder)
    net.net.load_state_dict(merged)
    exact = walked(net, None)
    assert (walked(bits8, None) - exact).norm() < 0.05 * exact.norm()


@pytest.mark.skipif(not HAVE_AO, reason="torchao is not installed")
def test_weights_of_8_bits_leave_and_come_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.inference.memory_plan.RESIDENCIES", ("none",))
    model = load(folder, sd3.ARCHITECTURE, TorchOptions(bits=8, memory="64GiB")).model
    first = walked(model, None)
    pixels(model, first)
    assert torch.equal(walked(model, None), first)


# --- decoding ---


def test_a_tiny_decoder_decodes_and_the_own_autoencoder_encodes(folder: Path, tmp_path: Path) -> None:
    vae = tiny.tiny_vae(4)
    vae.save_pretrained(tmp_path / "taesd")
    model = load(folder, sd3.ARCHITECTURE, TorchOptions(tiny_decoder=str(tmp_path / "taesd"))).model
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.eval().decode(latents).sample
    assert (model.codec.decode(latents) - expected).abs().max() < 1e-5
    photo = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert (model.codec.encode(photo) - sd3.load(folder).codec.encode(photo)).abs().max() < 1e-4


def test_tiles_are_near_the_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.inference.memory_plan.TILES", (2,))
    model = load(folder, sd3.ARCHITECTURE, TorchOptions(memory="64GiB")).model
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = sd3.load(folder)
    assert model.codec.decode(latents).shape == (1, 3, 64, 64)
    gap = (model.codec.decode(latents) - pixels(whole, latents)).abs().mean()
    assert 0 < gap < 0.5


# --- compiled blocks ---


def test_other_sizes_compile_nothing_anew(folder: Path) -> None:
    from torch._dynamo.utils import counters

    from fewstep.inference.compile import compile_blocks
    from fewstep.modules.adaln import split_modulation

    family = sd3.load(folder)
    modulation, body = split_modulation(family.net)
    compile_blocks(body, backend="eager")  # what is traced anew does not depend on who compiles
    torch._dynamo.reset()
    counters.clear()
    velocity: Any = replace(family.velocity, net=body)  # type: ignore[type-var]
    t, cond = torch.tensor([0.5, 0.5]), family.text([PROMPT, "a cat"])

    def graphs(height: int, width: int) -> int:
        x = torch.from_numpy(sampling.batch_noise([1, 2], (4, height, width)))
        with torch.no_grad():
            made = modulation.each([family.velocity.embedder_inputs(t, cond.pooled)])[0]  # type: ignore[attr-defined]
            v = velocity(x, t, replace(cond, pooled=made))
            assert (v - family.velocity(x, t, cond)).abs().max() < 1e-4
        return counters["stats"]["unique_graphs"]

    first = graphs(8, 12)
    assert 0 < first <= 3  # kinds of blocks: with two attentions, with one, the last
    assert [graphs(12, 8), graphs(16, 8), graphs(6, 10)] == [first] * 3


# --- the command line ---


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["generate", PROMPT, "--seed", "1", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if line.startswith("fewstep: ")]
    assert len(lines) == 1, lines
    return lines[0]


def test_the_plan_is_told_in_two_lines(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.png"
    assert run(["generate", PROMPT, "--model", f"sd3:{folder}", "--memory", "64GiB", "-o", str(out)]) == 0
    said = capsys.readouterr()
    with Image.open(out) as picture:
        assert said.out.strip() == str(out) and picture.size == (64, 64)
    lines = [line for line in said.err.splitlines() if line.startswith("fewstep: ")]
    assert len(lines) == 2 and "plan for 64.00 GiB: 32 bits" in lines[0] and "peak" in lines[1]


def test_a_picture_of_a_student_is_made_again(folder: Path, tmp_path: Path) -> None:
    student_of(folder, tmp_path / "run" / "model", t5=False)
    first, again, whole = (tmp_path / f"{name}.png" for name in ("first", "again", "whole"))
    model = ("--model", f"sd3:{folder}", "--student", str(tmp_path / "run"))
    assert run(["generate", PROMPT, "--seed", "1", *model, "--size", "64x32", "-o", str(first)]) == 0
    assert run(["generate", "--from", str(first), "-o", str(again)]) == 0
    assert again.read_bytes() == first.read_bytes()
    assert run(["generate", "--from", str(first), "--size", "64", "-o", str(whole)]) == 0
    with Image.open(whole) as picture:
        assert picture.size == (64, 64)


def test_bad_input_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--model", str(folder))
    lora_of(folder, tmp_path / "bare")
    lora_of(folder, tmp_path / "good", steps=4)
    wide = tmp_path / "wide"
    sd3.save(sd3.assemble(tiny.parts(tiny.SMALL | {"num_layers": 2}), name="w", steps=2), wide)
    lora_of(wide, tmp_path / "short", steps=4)
    flux.save(flux.assemble(tiny_flux.parts("dev"), name="f", side=8), tmp_path / "flux")
    (tmp_path / "empty").mkdir()
    cases = {
        "there is no student": ("--student", str(tmp_path / "nowhere")),
        "is no student": ("--student", str(tmp_path / "empty")),
        "is of the family flux": ("--student", str(tmp_path / "flux")),
        "another shape": ("--student", str(wide)),
        "does not say its steps": ("--student", str(tmp_path / "bare")),
        "must be a size": ("--memory", "8GB?"),
        "the least that works here": ("--memory", "1MiB"),
        "--bits 4 needs a GPU": ("--bits", "4"),
        "multiples of 16": ("--size", "100"),
        "must be pixels": ("--size", "1x2x3"),
        "no folder with the config.json": ("--tiny-decoder", str(tmp_path / "empty")),
        "AutoencoderTiny is needed": ("--tiny-decoder", str(folder / "vae")),
    }
    for words, options in cases.items():
        if words.startswith("--bits") and not HAVE_AO:
            continue
        line = told(capsys, *model, *options)
        assert words in line, line
    assert "is of the family sd3, not flux" in told(capsys, "--model", f"flux:{folder}")
    assert "is a bundle" in told(capsys, "--model", "pocket", "--memory", "8GiB")
    assert "is a bundle" in told(capsys, "--model", "sd3:pocket")


def test_a_lora_of_another_rank_or_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    lora_of(folder, tmp_path / "lora", steps=4)
    file = tmp_path / "lora" / FILE
    good = load_file(file)
    key = next(key for key in good if key.endswith("to_q.lora_A.weight"))
    for change, words in (
        ({key: good[key][:1]}, "another shape"),
        ({key: good[key][:, :3].contiguous()}, "another shape"),
        ({"transformer.elsewhere.lora_A.weight": good[key].clone()}, "no LoRA of"),
    ):
        save_file(good | change, file)
        with pytest.raises(UserError, match=words):
            load(folder, sd3.ARCHITECTURE, TorchOptions(student=str(tmp_path / "lora")))
    file.write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="not a whole"):
        load(folder, sd3.ARCHITECTURE, TorchOptions(student=str(tmp_path / "lora")))


def test_weights_that_are_missing_are_one_line(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    file = tmp_path / "m" / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(UserError, match="cut off"):
        load(tmp_path / "m", sd3.ARCHITECTURE, TorchOptions())
    file.unlink()
    with pytest.raises(UserError, match="has no weights"):
        load(tmp_path / "m", sd3.ARCHITECTURE, TorchOptions())


def test_hub_names_take_a_family_in_front() -> None:
    from fewstep.families.registry import built_in
    from fewstep.pipeline.resolve import parse_family

    assert parse_family("sd3:stabilityai/stable-diffusion-3.5-medium") == (
        "sd3",
        "stabilityai/stable-diffusion-3.5-medium",
    )
    assert parse_family("C:/models/a") == (None, "C:/models/a")
    assert list(built_in()) == ["dit", "flux", "sd3"]


def test_pictures_do_not_depend_on_the_memory(folder: Path) -> None:
    pipe = fewstep.load(f"sd3:{folder}")
    first = np.asarray(pipe(PROMPT, seed=1)[0])
    assert np.array_equal(np.asarray(fewstep.load(folder, memory="64GiB")(PROMPT, seed=1)[0]), first)
    with pytest.raises(UserError, match="planned for"):
        fewstep.load(folder, memory="64GiB", batch=2)(PROMPT, n=4, batch=4)
