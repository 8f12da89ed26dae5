"""Ours against stock ``FluxPipeline``: same components, same noise, same picture."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

import fewstep
import tiny
import tiny_flux
from fewstep.cli import app as cli
from fewstep.core import flow, sampling, schedule
from fewstep.core.types import Batch, Codec, TextEncoder, UserError, Velocity
from fewstep.families import flux, sd3
from fewstep.families.base import Family
from fewstep.families.registry import architecture_of
from fewstep.families.schedulers import schedule_shift
from fewstep.images import io as image_io
from fewstep.images.pixels import to_pil, to_uint8
from fewstep.images.record import Record
from fewstep.methods.base import Method
from fewstep.methods.flow_matching import FlowMatching
from fewstep.methods.trajectory import Trajectory
from fewstep.pipeline import loading
from fewstep.train.train_step import draw

pytestmark = pytest.mark.slow(5)

PROMPTS = ["a red apple, 3D style", "two blue cars"]
kinds = pytest.mark.parametrize("kind", tiny_flux.KINDS)


def small(kind: str, **options: Any) -> Family:
    return flux.assemble(tiny_flux.parts(kind), name="small", side=8, **options)


def stock(pipe: Any, noise: np.ndarray, steps: int, guidance: float = 3.5) -> tuple[Any, Any]:
    """Latents ``[B, C, H, W]`` and decoded pixels of the stock pipeline, which packs and shifts by itself."""
    pipe.set_progress_bar_config(disable=True)
    (rows, channels, height, width), pixels = noise.shape, [8 * n for n in noise.shape[2:]]
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "max_sequence_length": tiny.LENGTH}
    packed = pipe._pack_latents(torch.from_numpy(noise), rows, channels, height, width)

    def made(kind: str) -> Any:
        size = {"height": pixels[0], "width": pixels[1]}
        return pipe(prompt=PROMPTS, latents=packed, output_type=kind, **size, **options).images

    return pipe._unpack_latents(made("latent"), *pixels, 8), made("pt")


def ours(family: Family, noise: np.ndarray, steps: int) -> tuple[Any, Any]:
    with torch.no_grad():
        grid = schedule.grid(steps, family.shift)
        latents = sampling.sample_flow(family.velocity, family.from_numpy(noise), grid, family.text(PROMPTS))
        return latents, (family.codec.decode(latents) / 2 + 0.5).clamp(0, 1)


CASES = {
    "dev": ("dev", 28, 3.5, (4, 8, 8)),
    "dev, guided less": ("dev", 4, 1.5, (4, 8, 8)),
    "schnell": ("schnell", 4, 3.5, (4, 8, 8)),
    "schnell, a wide picture": ("schnell", 4, 3.5, (4, 6, 10)),
}


@pytest.mark.parametrize(("kind", "steps", "guidance", "shape"), CASES.values(), ids=CASES)
def test_a_walk_is_the_stock_pipelines(kind: str, steps: int, guidance: float, shape: Any) -> None:
    family = small(kind, guidance=guidance)
    noise = sampling.batch_noise([1, 2], shape)
    theirs = stock(FluxPipeline(**family.parts), noise, steps, guidance)
    mine = ours(family, noise, steps)
    assert theirs[0].std() > 0.1  # a walk that went somewhere
    for a, b in zip(theirs, mine, strict=True):
        assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize(("kind", "heard"), [("dev", True), ("schnell", False)])
def test_only_a_net_with_embedded_guidance_hears_it(kind: str, heard: bool) -> None:
    family = small(kind)
    x, cond = family.from_numpy(sampling.batch_noise([1, 2], family.latent)), family.text(PROMPTS)
    t = flow.expand_time(0.5, x)
    v, other = family.velocity(x, t, cond), flux.NetVelocity(family.net, 1.0)(x, t, cond)
    assert ((v - other).abs().max() > 1e-4) == heard


def test_unpacking_is_the_inverse_of_packing() -> None:
    x = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    tokens = flux.pack(x)
    assert tokens.shape == (2, 15, 16)
    assert torch.equal(flux.unpack(tokens, 3, 5), x)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, 2, 4, 6, 10))
    assert torch.equal(flux.positions(3, 5), FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", x.dtype))


SHIFTS = {
    "dev at 1024 px": ({"use_dynamic_shifting": True}, 4096, math.exp(1.15)),
    "dev at 256 px": ({"use_dynamic_shifting": True}, 256, math.exp(0.5)),
    "dev between": ({"use_dynamic_shifting": True}, 2176, math.exp(0.825)),
    "linear": ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 4096, 1.15),
    "schnell": ({"shift": 1.0}, 4096, 1.0),
    "a fixed shift": ({"shift": 3.0}, 16, 3.0),
}


@pytest.mark.parametrize(("options", "tokens", "s"), SHIFTS.values(), ids=SHIFTS)
def test_the_shift_is_the_schedulers(options: dict[str, Any], tokens: int, s: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    found = schedule_shift(scheduler.config, tokens)
    assert found == pytest.approx(s)
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    scheduler.set_timesteps(sigmas=list(np.linspace(1, 1 / 5, 5)), mu=mu)
    assert scheduler.sigmas.tolist() == pytest.approx(schedule.grid(5, found), abs=1e-6)


@kinds
def test_a_family_keeps_the_contracts(kind: str) -> None:
    family = small(kind)
    text: TextEncoder = family.text
    codec: Codec = family.codec
    assert isinstance(family.velocity, Velocity)
    cond = text(PROMPTS)
    assert (cond.context.shape, cond.pooled.shape) == ((2, tiny.LENGTH, 64), (2, 24))
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    raw = family.parts["vae"].encode(images).latent_dist.mode()
    assert torch.allclose(codec.encode(images), (raw - 0.1159) * 0.3611)
    assert codec.decode(codec.encode(images)).shape == images.shape
    assert (family.latent, family.downscale, len(family.blocks)) == ((4, 8, 8), 8, 5)
    assert (family.guidance, family.steps) == (None, 28 if kind == "dev" else 4)
    nets = [part for part in family.parts.values() if isinstance(part, torch.nn.Module)]
    assert not any(p.requires_grad or net.training for net in nets for p in net.parameters())


def test_sizes_and_lengths_are_the_stock_pipelines() -> None:
    dev, schnell = (flux.assemble(tiny_flux.parts(kind), name="m") for kind in tiny_flux.KINDS)
    side = FluxPipeline(**dev.parts).default_sample_size
    assert dev.latent == schnell.latent == (4, side, side)
    assert (dev.shift, schnell.shift) == pytest.approx((math.exp(1.15), 1.0))
    assert (dev.text.length, schnell.text.length) == (512, 256)
    for side in (7, 0, "wide"):
        with pytest.raises(UserError, match=f"side must be .*, not {side}"):
            flux.assemble(dev.parts, name="m", side=side)


def test_an_image_does_not_depend_on_its_batch() -> None:
    tiny.assert_batch_does_not_matter(small("dev"), PROMPTS)


# --- folders ---


@pytest.fixture(scope="module", params=tiny_flux.KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path]:
    """A family of 3 steps and guidance 2, and its folder."""
    family = small(request.param, steps=3, guidance=2.0)
    folder = tmp_path_factory.mktemp("flux") / "m"
    flux.save(family, folder)
    return family, folder


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3") / "m"
    sd3.save(sd3.assemble(tiny.parts(with_t5=False), name="small"), folder)
    return folder


def test_saved_folders_load_here_and_in_stock_diffusers(saved: tuple[Family, Path]) -> None:
    family, folder = saved
    again = flux.load(folder)
    for fact in ("name", "steps", "guidance", "latent", "shift"):
        assert getattr(again, fact) == getattr(family, fact)
    noise = sampling.batch_noise([1, 2], family.latent)
    x, cond = family.from_numpy(noise), family.text(PROMPTS)
    t = flow.expand_time(0.7, x)
    before = family.velocity(x, t, cond)
    assert (again.velocity(x, t, again.text(PROMPTS)) - before).abs().max() < 1e-6
    pipe = FluxPipeline.from_pretrained(folder)
    assert (flux.NetVelocity(pipe.transformer, 2.0)(x, t, cond) - before).abs().max() < 1e-6
    assert (stock(pipe, noise, 3, 2.0)[1] - ours(family, noise, 3)[1]).abs().max() < 1e-4


def test_half_precision_keeps_float32_latents(saved: tuple[Family, Path]) -> None:
    family, folder = saved
    half = flux.load(folder, dtype="bfloat16")
    seen: list[Any] = []
    half.net.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["timestep"]), with_kwargs=True
    )
    x, cond = family.from_numpy(sampling.batch_noise([1], family.latent)), family.text(PROMPTS[:1])
    t = torch.tensor([0.74925])
    v = half.velocity(x, t, half.text(PROMPTS[:1]))
    assert (v.dtype, seen[0].dtype) == (torch.float32, torch.float32)
    assert (v - family.velocity(x, t, cond)).abs().max() < 0.1


def test_the_other_familys_folder_is_one_clear_line(saved: tuple[Family, Path], sd3_folder: Path) -> None:
    for load, folder, has, needed in (
        (sd3.load, saved[1], "FluxPipeline", "StableDiffusion3Pipeline"),
        (flux.load, sd3_folder, "StableDiffusion3Pipeline", "FluxPipeline"),
    ):
        with pytest.raises(UserError, match=f"holds a {has}, but a {needed} is needed$") as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def test_a_folder_finds_its_family(saved: tuple[Family, Path], sd3_folder: Path, tmp_path: Path) -> None:
    assert architecture_of(saved[1]) is flux.ARCHITECTURE
    assert architecture_of(sd3_folder) is sd3.ARCHITECTURE
    for kind in ("Flux2Pipeline", "FluxFillPipeline", "PixArtAlphaPipeline", None):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        with pytest.raises(UserError, match=rf"holds a {kind}; .*FluxPipeline or a Stable") as caught:
            fewstep.load(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_hub_model_finds_its_family_by_its_index(
    saved: tuple[Family, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(saved[1] / file))
    assert loading._family("org/model", Path("org/model")) is flux.ARCHITECTURE
    monkeypatch.undo()
    with pytest.raises(UserError, match="the hub cannot be asked"):
        loading._family("nobody/nothing", Path("nobody/nothing"))


def test_an_incomplete_folder_is_one_clear_line(saved: tuple[Family, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved[1], tmp_path / "m")
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(UserError, match=r"is incomplete: text_encoder_2 is missing$"):
        flux.load(folder)


@pytest.mark.parametrize(
    ("place", "options", "named"),
    [
        ("no/such", {}, "no/such"),  # a hub name, and the tests are offline
        ("./nowhere", {}, "neither a folder"),
        (__file__, {}, "is a file; FLUX is read from a diffusers folder"),
        (".", {}, "model_index.json is missing"),
        (".", {"dtype": "int8"}, "int8"),
        (".", {"device": "toaster"}, "toaster"),
    ],
)
def test_bad_arguments_are_one_clear_line(
    place: str, options: Any, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=named) as caught:
        flux.load(place, **options)
    assert "\n" not in str(caught.value)


# --- what stands above ---


def test_a_folder_draws_pictures(saved: tuple[Family, Path]) -> None:
    family, folder = saved
    pipe = fewstep.load(folder)
    images = pipe(PROMPTS, seed=1, steps=2)
    with torch.no_grad():
        x = family.from_numpy(sampling.batch_noise([1, 1], family.latent))
        x = sampling.sample_flow(family.velocity, x, schedule.grid(2, family.shift), family.text(PROMPTS))
        expected = to_pil(to_uint8(family.to_numpy(family.codec.decode(x))))
    for image, other in zip(images, expected, strict=True):
        assert image.size == (64, 64)
        assert abs(np.asarray(image).astype(int) - np.asarray(other)).max() <= 1
    with pytest.raises(UserError, match="takes no negative"):
        pipe(PROMPTS, negative="blurry")


@pytest.mark.parametrize("options", [{}, {"memory": "64GiB", "bits": 32}], ids=["plain", "planned"])
def test_embedded_guidance_is_a_dial(tmp_path: Path, options: Any) -> None:
    family = small("dev")
    flux.save(family, tmp_path / "m")
    pipe = fewstep.load(tmp_path / "m", **options)
    images = [pipe(PROMPTS[0], seed=1, steps=3, guidance=scale)[0] for scale in (None, 3.5, 6.0, 1.0, None)]
    assert [_record(image).guidance for image in images] == [3.5, 3.5, 6.0, 1.0, 3.5]
    numbers = [np.asarray(image).astype(int) for image in images]
    assert np.array_equal(numbers[0], numbers[1]) and np.array_equal(numbers[0], numbers[4])
    for scale, number in ((6.0, numbers[2]), (1.0, numbers[3])):
        assert abs(number - numbers[0]).max() > 1
        with torch.no_grad():
            noise = family.from_numpy(sampling.batch_noise([1], family.latent))
            grid, cond = schedule.grid(3, family.shift), family.text(PROMPTS[:1])
            x = sampling.sample_flow(family.with_guidance(scale).velocity, noise, grid, cond)
            expected = np.asarray(to_pil(to_uint8(family.to_numpy(family.codec.decode(x))))[0]).astype(int)
        assert abs(number - expected).max() <= 1


def _record(image: Any) -> Record:
    return Record.parse(image.info["fewstep"])


def test_embedded_guidance_starts_from_what_the_folder_says(tmp_path: Path) -> None:
    flux.save(small("dev").with_guidance(5.0), tmp_path / "m")
    assert _record(fewstep.load(tmp_path / "m")(PROMPTS[0], seed=1, steps=1)[0]).guidance == 5.0


def test_a_net_without_an_embedding_of_guidance_takes_none(tmp_path: Path) -> None:
    flux.save(small("schnell"), tmp_path / "m")
    with pytest.raises(UserError, match="takes no guidance"):
        fewstep.load(tmp_path / "m")(PROMPTS, guidance=3.0)


def test_the_command_line_follows_guidance_and_from_repeats_it(tmp_path: Path) -> None:
    flux.save(small("dev"), tmp_path / "m")
    first, second, plain = (tmp_path / f"{name}.png" for name in ("first", "second", "plain"))
    asked = ["generate", "a cat", "--model", str(tmp_path / "m"), "--steps", "2", "--seed", "1"]
    assert cli.run([*asked, "--guidance", "7", "-o", str(first)]) == 0
    assert cli.run(["generate", "--from", str(first), "-o", str(second)]) == 0
    assert cli.run([*asked, "-o", str(plain)]) == 0
    assert second.read_bytes() == first.read_bytes()
    assert image_io.open_image(plain).tobytes() != image_io.open_image(first).tobytes()
    assert cli.run([*asked, "--negative-prompt", "blurry", "-o", str(tmp_path / "none.png")]) == 2


def test_the_command_line_draws_with_it_in_the_28_steps_of_dev(tmp_path: Path) -> None:
    flux.save(small("dev"), tmp_path / "m")
    path = tmp_path / "cat.png"
    asked = ["generate", "a cat", "--model", str(tmp_path / "m"), "--seed", "1", "-o", str(path)]
    assert cli.run(asked) == 0
    record = Record.parse(image_io.open_image(path).info["fewstep"])
    assert (record.steps, record.guidance, record.size) == (28, 3.5, (64, 64))


def finetuning(family: Family, net: Any) -> tuple[Method, Any]:
    x = family.from_numpy(sampling.batch_noise([1, 2], family.latent))
    return FlowMatching(net, flux.NetVelocity(net)), Batch(x, family.text(PROMPTS))


def following(family: Family, net: Any) -> tuple[Method, Any]:
    """A move of the teacher in two steps, for the student to make in one."""
    x, cond = family.from_numpy(sampling.batch_noise([1, 2], family.latent)), family.text(PROMPTS)
    with torch.no_grad():
        end = sampling.sample_flow(family.velocity, x, [1.0, 0.9, 0.8], cond)
    batch = Batch(end, cond, (), torch.stack([x, end], 1))
    return Trajectory(net, flux.NetVelocity(net), [1.0, 0.8]), batch


@kinds
@pytest.mark.parametrize("made", [finetuning, following])
def test_methods_train_it_unchanged(kind: str, made: Callable[[Family, Any], tuple[Method, Any]]) -> None:
    family = small(kind)
    net = copy.deepcopy(family.net).requires_grad_(True)
    method, batch = made(family, net)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    [turn] = method.updates(0)
    loss = sum(turn.losses(batch, draw(0, 0, 0)).values())
    assert 0 < loss.item() < math.inf
    loss.backward()
    optimizer.step()
    for (name, new), old in zip(net.named_parameters(), family.net.parameters(), strict=True):
        assert not torch.equal(new, old), name
