"""Ours against stock ``StableDiffusion3Pipeline``: same components, same noise, same picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import tiny
from fewstep.core import sampling, schedule
from fewstep.core.guidance import Guided
from fewstep.core.types import Codec, TextEncoder, UserError, Velocity
from fewstep.families import sd3
from fewstep.families.base import Family

pytestmark = pytest.mark.slow(5)

PROMPTS = ["a red apple, 3D style", "two blue cars"]
SCALE = 4.5


def small(**options: Any) -> Family:
    return sd3.assemble(tiny.parts(**options), name="small")


def stock(family: Family, noise: np.ndarray, t5_length: int, negative: str = "") -> tuple[Any, Any]:
    """Latents and decoded pixels of the stock pipeline after 28 guided steps."""
    pipe = StableDiffusion3Pipeline(**family.parts)
    pipe.set_progress_bar_config(disable=True)
    kept: dict[str, Any] = {}

    def keep(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept.update(tensors)
        return {}

    images = pipe(
        prompt=PROMPTS,
        negative_prompt=[negative] * len(PROMPTS),
        height=8 * noise.shape[2],
        width=8 * noise.shape[3],
        latents=torch.from_numpy(noise),
        num_inference_steps=28,
        guidance_scale=SCALE,
        max_sequence_length=t5_length,
        output_type="pt",
        callback_on_step_end=keep,
    ).images
    return kept["latents"], images


def ours(family: Family, noise: np.ndarray, negative: str = "") -> tuple[Any, Any]:
    with torch.no_grad():
        guided = Guided(family.velocity, family.text([negative]), SCALE)
        grid = schedule.diffusers_grid(28, family.shift)
        latents = sampling.sample_flow(guided, family.from_numpy(noise), grid, family.text(PROMPTS))
        return latents, (family.codec.decode(latents) / 2 + 0.5).clamp(0, 1)


CASES = {
    "without T5": ({"with_t5": False}, 0, (4, 8, 8)),
    "with T5": ({"with_t5": True}, tiny.LENGTH, (4, 8, 8)),
    "tiny autoencoder": ({"tiny": True}, tiny.LENGTH, (4, 8, 8)),
    "SD3.5-Medium": ({"config": tiny.SD35_MEDIUM}, tiny.LENGTH, (16, 8, 8)),
}


@pytest.mark.parametrize(("options", "t5_length", "shape"), CASES.values(), ids=CASES)
def test_28_guided_steps_are_the_stock_pipelines(options: Any, t5_length: int, shape: Any) -> None:
    family = small(**options)
    noise = sampling.batch_noise([1, 2], shape)
    theirs, mine = stock(family, noise, t5_length), ours(family, noise)
    assert theirs[0].std() > 0.1  # a walk that went somewhere
    for a, b in zip(theirs, mine, strict=True):
        assert (a - b).abs().max() < 1e-4


def test_a_negative_prompt_is_the_stock_pipelines() -> None:
    family = small()
    noise = sampling.batch_noise([3, 4], family.latent)
    theirs, mine = stock(family, noise, tiny.LENGTH, "blurry"), ours(family, noise, "blurry")
    assert (theirs[0] - mine[0]).abs().max() < 1e-4
    assert (mine[0] - ours(family, noise)[0]).abs().max() > 1e-3


def test_our_even_grid_ends_elsewhere_but_near() -> None:
    """Why ``diffusers_grid`` exists: the plain grid is another discretisation of the same flow."""
    family = small()
    noise, cond = family.from_numpy(sampling.batch_noise([1, 2], family.latent)), family.text(PROMPTS)
    with torch.no_grad():
        even, stocks, one = (
            sampling.sample_flow(family.velocity, noise, grid, cond)
            for grid in (schedule.grid(28), schedule.diffusers_grid(28), schedule.grid(1))
        )
    gap = (even - stocks).abs().max()
    assert 1e-4 < gap < 0.2 * (one - stocks).abs().max()


def test_a_family_keeps_the_contracts() -> None:
    family = small()
    assert isinstance(family.velocity, Velocity)
    text: TextEncoder = family.text
    codec: Codec = family.codec
    cond = text(PROMPTS)
    assert cond.context.shape == (2, 2 * tiny.LENGTH, 64)
    assert cond.pooled.shape == (2, 56)
    assert (cond.context[:, : tiny.LENGTH, 56:] == 0).all()  # the CLIPs are padded to the net's width
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    assert codec.encode(images).shape == (2, *family.latent)
    assert codec.decode(codec.encode(images)).shape == images.shape
    assert (family.downscale, family.shift, len(family.blocks)) == (8, 3.0, 3)
    assert not any(p.requires_grad for part in family.parts.values() for p in _weights(part))


def _weights(part: Any) -> list[Any]:
    return list(part.parameters()) if isinstance(part, torch.nn.Module) else []


def test_without_t5_nothing_follows_the_clips() -> None:
    both, clips = small(), small(with_t5=False)
    context = clips.text(PROMPTS).context
    assert context.shape[1] == tiny.LENGTH
    assert torch.equal(both.text(PROMPTS).context[:, : tiny.LENGTH], context)


def test_latents_are_scaled_as_sd3_scales_them() -> None:
    family = small()
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    raw = family.parts["vae"].encode(images).latent_dist.mode()
    assert torch.allclose(family.codec.encode(images), (raw - 0.0609) * 1.5305)
    latents = family.codec.encode(images)
    assert torch.allclose(family.codec.decode(latents), family.parts["vae"].decode(raw).sample, atol=1e-5)


def test_an_image_does_not_depend_on_its_batch() -> None:
    tiny.assert_batch_does_not_matter(small(), PROMPTS)


def test_half_precision_keeps_float32_times_and_latents(tmp_path: Path) -> None:
    family = small()
    sd3.save(family, tmp_path / "m")
    half = sd3.load(tmp_path / "m", dtype="bfloat16")
    seen: list[Any] = []
    half.net.time_text_embed.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    x, t = torch.from_numpy(sampling.batch_noise([1], family.latent)), torch.tensor([0.74925])
    cond = family.text(PROMPTS[:1])
    v = half.velocity(x, t, cond)
    assert v.dtype == torch.float32
    assert seen[0].item() == pytest.approx(749.25)
    assert (v - family.velocity(x, t, cond)).abs().max() < 0.1


# --- folders ---


@pytest.mark.parametrize("with_t5", [True, False])
def test_saved_folders_load_here_and_in_stock_diffusers(tmp_path: Path, with_t5: bool) -> None:
    family = replace(small(with_t5=with_t5), name="mine", steps=4, guidance=None)
    sd3.save(family, tmp_path / "sub" / "m")
    again = sd3.load(tmp_path / "sub" / "m")
    assert (again.name, again.steps, again.guidance, again.shift) == ("mine", 4, None, 3.0)
    noise = sampling.batch_noise([1, 2], family.latent)
    before = ours(family, noise)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        kept, read = (f.parts[name].state_dict() for f in (family, again))
        assert all(torch.equal(kept[key], read[key]) for key in kept)
    # Not to the bit: on some processors a product rounds by where in memory its weights lie.
    assert (ours(again, noise)[1] - before[1]).abs().max() < 1e-5
    without = {} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "sub" / "m", **without)
    assert (pipe.text_encoder_3 is not None) == with_t5
    theirs = stock(replace(family, parts=_named(pipe)), noise, tiny.LENGTH if with_t5 else 0)
    assert (theirs[1] - before[1]).abs().max() < 1e-4


def _named(pipe: Any) -> dict[str, Any]:
    return {
        name: part
        for name, part in pipe.components.items()
        if name not in ("image_encoder", "feature_extractor")
    }


@pytest.mark.parametrize("facts", ['{"steps": "x"}', '{"steps": 0}', '{"guidance": "x"}', "[]"])
def test_facts_that_are_no_numbers_are_one_line(tmp_path: Path, facts: str) -> None:
    sd3.save(small(with_t5=False), tmp_path / "m")
    (tmp_path / "m" / "fewstep.json").write_text(facts)
    with pytest.raises(UserError, match=r"fewstep\.json") as caught:
        sd3.load(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_t5_can_be_left_out_or_demanded(tmp_path: Path) -> None:
    sd3.save(small(), tmp_path / "with")
    sd3.save(small(with_t5=False), tmp_path / "without")
    assert sd3.load(tmp_path / "with", t5=False).text(PROMPTS).context.shape[1] == tiny.LENGTH
    assert sd3.load(tmp_path / "with", t5=True).text(PROMPTS).context.shape[1] == 2 * tiny.LENGTH
    with pytest.raises(UserError, match="text_encoder_3"):
        sd3.load(tmp_path / "without", t5=True)


def test_vocabularies_of_two_files_load_as_in_stabilitys_folders(tmp_path: Path) -> None:
    family = small(with_t5=False)
    sd3.save(family, tmp_path / "m")
    for which in sd3.CLIPS:
        place = tmp_path / "m" / f"tokenizer{which}"
        vocabulary = json.loads((place / "tokenizer.json").read_text())["model"]["vocab"]
        (place / "tokenizer.json").unlink()
        (place / "vocab.json").write_text(json.dumps(vocabulary))
        (place / "merges.txt").write_text("#version: 0.2\n")
    assert torch.equal(sd3.load(tmp_path / "m").text(PROMPTS).context, family.text(PROMPTS).context)


def test_saving_replaces_an_earlier_save_and_nothing_else(tmp_path: Path) -> None:
    sd3.save(small(), tmp_path / "m")
    sd3.save(replace(small(), name="second"), tmp_path / "m")
    assert sd3.load(tmp_path / "m").name == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "precious.txt").write_text("x")
    with pytest.raises(UserError, match="notes"):
        sd3.save(small(), tmp_path / "notes")
    assert (tmp_path / "notes" / "precious.txt").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3") / "m"
    sd3.save(small(), folder)
    return folder


def _drop(relative: str) -> Any:
    import shutil

    def spoil(folder: Path) -> None:
        path = folder / relative
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def _write(relative: str, text: str) -> Any:
    return lambda folder: (folder / relative).write_text(text)


def _truncate(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _forget_a_tensor(part: str, file: str, key: str) -> Any:
    from safetensors.torch import load_file, save_file

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / part / file)
        del tensors[key]
        save_file(tensors, folder / part / file, metadata={"format": "pt"})

    return spoil


SPOILS = {
    "no index": (_drop("model_index.json"), "model_index.json is missing"),
    "index is no JSON": (_write("model_index.json", "{"), "model_index.json"),
    "another pipeline": (_write("model_index.json", '{"_class_name": "FluxPipeline"}'), "FluxPipeline"),
    "no part": (_drop("text_encoder_2"), "text_encoder_2 is missing"),
    "no weights": (_drop("vae/diffusion_pytorch_model.safetensors"), "vae"),
    "no configuration": (_drop("transformer/config.json"), "transformer"),
    "no vocabulary": (_drop("tokenizer/tokenizer.json"), "tokenizer"),
    "truncated weights": (_truncate, "transformer"),
    "a tensor is missing": (
        _forget_a_tensor("transformer", "diffusion_pytorch_model.safetensors", "proj_out.bias"),
        "proj_out.bias",
    ),
    "a tensor of a text encoder is missing": (
        _forget_a_tensor("text_encoder", "model.safetensors", "text_projection.weight"),
        "text_projection.weight",
    ),
}


@pytest.mark.parametrize(("spoil", "named"), SPOILS.values(), ids=SPOILS)
def test_a_broken_folder_is_one_clear_line(tmp_path: Path, whole: Path, spoil: Any, named: str) -> None:
    import shutil

    folder = tmp_path / "m"
    shutil.copytree(whole, folder)
    spoil(folder)
    with pytest.raises(UserError, match=named) as caught:
        sd3.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "options", "named"),
    [
        ("no/such", {}, "no/such"),  # a hub name, and the tests are offline
        ("./nowhere", {}, "neither a folder"),
        ("nowhere", {}, "neither a folder"),
        (".", {"dtype": "int8"}, "int8"),
        (".", {"device": "toaster"}, "toaster"),
    ],
)
def test_bad_arguments_are_one_clear_line(source: str, options: Any, named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        sd3.load(source, **options)
    assert "\n" not in str(caught.value)
