"""One file in Stability's key names: what diffusers' own conversion reads is the family that was written."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors import safe_open
from safetensors.torch import load_file

import tiny
from fewstep.core import sampling, schedule
from fewstep.core.types import UserError
from fewstep.export import single_file
from fewstep.export.base import ExportMetadata
from fewstep.export.common import sd3_keys
from fewstep.families import sd3
from fewstep.families.base import Family
from fewstep.families.common import with_renoise_sampler

PROMPTS = ["a red apple, 3D style", "two blue cars"]
SD3_MEDIUM = tiny.SMALL | {"dual_attention_layers": (), "qk_norm": None}
FACTS = ExportMetadata(license="Apache-2.0")


def family(**options: Any) -> Family:
    return sd3.assemble(tiny.original(**options), name="small", steps=4, guidance=None)


@pytest.fixture(scope="module", params=[True, False], ids=["T5", "no T5"])
def written(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path, Path]:
    """A family, its diffusers folder, and its single file at 32 bits."""
    place = tmp_path_factory.mktemp("single")
    small = family(with_t5=request.param)
    sd3.save(small, place / "folder")
    single_file.export(small, place / "file.safetensors", 32, FACTS)
    return small, place / "folder", place / "file.safetensors"


def states(parts: Any) -> dict[str, torch.Tensor]:
    nets = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value for name, net in nets.items() for key, value in net.state_dict().items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def draw(model: Family) -> torch.Tensor:
    with torch.no_grad():
        noise = model.from_numpy(sampling.batch_noise([0, 1], model.latent))
        grid = schedule.grid(model.steps, model.shift)
        return model.codec.decode(sampling.sample_flow(model.velocity, noise, grid, model.text(PROMPTS)))


def test_a_file_is_the_family_to_the_bit(written: Any) -> None:
    small, folder, path = written
    back = sd3.load(path, config=folder)
    assert_equal(states(back.parts), states(small.parts))
    assert torch.equal(draw(back), draw(small))


def test_stock_diffusers_reads_it(written: Any) -> None:
    from diffusers import StableDiffusion3Pipeline

    small, folder, path = written
    none = {} if small.parts["text_encoder_3"] is not None else dict.fromkeys(sd3.T5)
    pipe = StableDiffusion3Pipeline.from_single_file(
        str(path), config=str(folder), local_files_only=True, torch_dtype=torch.float32, **none
    )
    assert_equal(states(pipe.components), states(small.parts))
    options: Any = {"height": 64, "width": 64, "max_sequence_length": tiny.LENGTH, "output_type": "pt"}
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(PROMPTS[0], num_inference_steps=2, guidance_scale=1.0, **options).images
    assert picture.isfinite().all() and picture.shape == (1, 3, 64, 64)


@pytest.mark.parametrize("config", [tiny.SD35_MEDIUM, tiny.SMALL, SD3_MEDIUM])
def test_diffusers_conversion_uses_every_tensor_of_the_net(config: dict[str, Any]) -> None:
    parts = tiny.original(config=config, with_t5=False)
    net, tensors = parts["transformer"], sd3_keys.net_tensors(parts)
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(
        tensor.numel() for tensor in net.state_dict().values()
    )
    assert_equal(convert_sd3_transformer_checkpoint_to_diffusers(tensors), net.state_dict())
    assert not tensors  # the conversion takes out what it reads


def test_the_autoencoder_converts_back() -> None:
    vae = tiny.vae(4)
    tensors = sd3_keys.autoencoder_tensors(vae)
    assert tensors["decoder.mid.attn_1.q.weight"].shape == (8, 8, 1, 1)
    assert len(tensors) == len(vae.state_dict())
    named = {f"first_stage_model.{key}": tensor for key, tensor in tensors.items()}
    assert_equal(convert_ldm_vae_checkpoint(named, vae.config), vae.state_dict())


def test_names_and_shapes_are_those_of_stabilitys_files(written: Any) -> None:
    """Some of ``sd3.5_medium.safetensors``'s, with this net's width 16 for 1536."""
    tensors = load_file(written[2])
    net = "model.diffusion_model."
    shapes = {
        f"{net}pos_embed": (1, 256, 16),
        f"{net}x_embedder.proj.weight": (16, 4, 2, 2),
        f"{net}y_embedder.mlp.0.weight": (16, 56),
        f"{net}joint_blocks.0.x_block.adaLN_modulation.1.bias": (9 * 16,),
        f"{net}joint_blocks.2.context_block.adaLN_modulation.1.bias": (2 * 16,),
        f"{net}joint_blocks.1.x_block.attn2.qkv.weight": (48, 16),
        f"{net}joint_blocks.1.x_block.attn2.ln_k.weight": (8,),
        f"{net}final_layer.linear.weight": (16, 16),
        "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight": (4, 8, 1, 1),
        "first_stage_model.encoder.down.2.downsample.conv.weight": (8, 8, 3, 3),
        "text_encoders.clip_g.transformer.text_projection.weight": (32, 32),
    }
    assert {key: tuple(tensors[key].shape) for key in shapes} == shapes
    assert "text_encoders.clip_l.transformer.text_projection.weight" not in tensors


def test_half_weights_are_the_same_rounded(written: Any, tmp_path: Path) -> None:
    small, folder, path = written
    single_file.export(small, tmp_path / "half.safetensors", 16, FACTS)
    halves, whole = load_file(tmp_path / "half.safetensors"), load_file(path)
    assert_equal(halves, {key: tensor.half() for key, tensor in whole.items()})
    assert (draw(sd3.load(tmp_path / "half.safetensors", config=folder)) - draw(small)).abs().max() < 0.05


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    parts = tiny.original(with_t5=False)
    with torch.no_grad():
        parts["transformer"].context_embedder.bias[0] = 1e5
    large = sd3.assemble(parts, name="large")
    with pytest.raises(UserError, match=r"context_embedder\.bias .* give --bits 32"):
        single_file.export(large, tmp_path / "f.safetensors", 16, FACTS)
    assert not list(tmp_path.iterdir())


def test_a_student_comes_back_as_it_walks(tmp_path: Path) -> None:
    """Name, steps, guidance, shift and sampler are the file's, not those of its original's configuration."""
    small = family(with_t5=False)
    sd3.save(small, tmp_path / "config")
    text = tmp_path / "text"
    text.write_text("do what you like")
    scheduler = type(small.parts["scheduler"])(shift=1.5)
    taught = sd3.assemble({**small.parts, "scheduler": scheduler}, name="it", steps=2, guidance=3.0)
    about = {"styles": ["3D"]}
    single_file.export(
        with_renoise_sampler(taught), tmp_path / "f.safetensors", 16, ExportMetadata("MIT", text, about)
    )
    back = sd3.load(tmp_path / "f.safetensors", config=tmp_path / "config")
    assert (back.name, back.steps, back.guidance, back.shift, back.sampler) == ("it", 2, 3.0, 1.5, "renoise")
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["modelspec.title"] == "it"
    assert header["modelspec.license"] == "MIT"
    assert header["modelspec.usage_hint"] == "2 steps, guidance (CFG) 3, shift 1.5, renoise"
    told = json.loads(header["fewstep"])
    assert (told["license_text"], told["about"]) == ("do what you like", {"bits": 16, "styles": ["3D"]})


def test_the_first_clips_projection_goes_into_the_net(tmp_path: Path) -> None:
    """Readers take it for the identity."""
    projected = sd3.assemble(tiny.parts(with_t5=False), name="projected", steps=4, guidance=None)
    sd3.save(projected, tmp_path / "config")
    single_file.export(projected, tmp_path / "f.safetensors", 32, FACTS)
    back = sd3.load(tmp_path / "f.safetensors", config=tmp_path / "config")
    pooled, theirs = back.text(PROMPTS).pooled, projected.text(PROMPTS).pooled
    assert not torch.allclose(pooled, theirs, atol=1e-2)
    assert torch.allclose(draw(back), draw(projected), atol=1e-4)


def _unknown(parts: dict[str, Any]) -> None:
    parts["transformer"].transformer_blocks[0].extra = torch.nn.Linear(2, 2)


def _narrow(parts: dict[str, Any]) -> None:
    parts["text_encoder"].text_projection = torch.nn.Linear(24, 20, bias=False)


def _alike(parts: dict[str, Any]) -> None:
    parts["text_encoder_2"] = tiny.clip(parts["tokenizer_2"], 24, "gelu")


def _tiny(parts: dict[str, Any]) -> None:
    parts["vae"] = tiny.tiny_vae(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_unknown, r"no place for transformer_blocks\.0\.extra\.bias"),
        (_narrow, "text_encoder projects 24 numbers to 20"),
        (_alike, "both CLIPs are 24 wide"),
        (_tiny, "has an AutoencoderTiny"),
    ],
)
def test_what_the_format_does_not_hold_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    parts = tiny.original(with_t5=False)
    change(parts)
    with pytest.raises(UserError, match=message) as caught:
        single_file.export(sd3.assemble(parts, name="odd"), tmp_path / "f.safetensors", 32, FACTS)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_export_replaces_an_export_and_nothing_else(written: Any, tmp_path: Path) -> None:
    small, _, path = written
    out = tmp_path / "new" / "f.safetensors"
    single_file.export(small, out, 32, FACTS)
    single_file.export(replace(small, steps=2), out, 32, FACTS)
    assert [found.name for found in out.parent.iterdir()] == ["f.safetensors"]
    with pytest.raises(UserError, match="must end so"):
        single_file.export(small, tmp_path / "f.ckpt", 32, FACTS)
    for data in (b"", b"mine", path.read_bytes().replace(b'"fewstep"', b'"another"')):
        out.write_bytes(data)
        with pytest.raises(UserError, match="is no export of fewstep"):
            single_file.export(small, out, 32, FACTS)
        assert out.read_bytes() == data


def test_a_full_disk_leaves_what_was_there(written: Any, tmp_path: Path) -> None:
    small, _, path = written
    out = tmp_path / "f.safetensors"
    out.write_bytes(path.read_bytes())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises((UserError, OSError)):
            single_file.export(replace(small, steps=2), out, 32, FACTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [found.name for found in tmp_path.iterdir()] == ["f.safetensors"]
    assert out.read_bytes() == path.read_bytes()


def test_an_interruption_leaves_nothing(
    written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(single_file, "file_metadata", fail)
    with pytest.raises(KeyboardInterrupt):
        single_file.export(written[0], tmp_path / "f.safetensors", 32, FACTS)
    assert not list(tmp_path.iterdir())
