"""Single files in Stability's key names: the same model as the folder that they were made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
from fewstep.core import sampling
from fewstep.core.types import UserError
from fewstep.export.common import sd3_keys
from fewstep.families import sd3
from fewstep.families.base import Family

PROMPTS = ["a red apple, 3D style", "two blue cars"]


def write(path: Path, parts: dict[str, Any], without: tuple[str, ...] = ()) -> Path:
    tensors = sd3_keys.checkpoint(parts)
    save_file({k: v.contiguous() for k, v in tensors.items() if not k.startswith(without)}, path)
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path]:
    folder = tmp_path_factory.mktemp("original") / "m"
    family = sd3.assemble(tiny.original(), name="original")
    sd3.save(family, folder)
    return family, folder


def same(a: Family, b: Family) -> None:
    x, t = torch.from_numpy(sampling.batch_noise([1, 2], a.latent)), torch.tensor([0.9, 0.3])
    cond, other = a.text(PROMPTS), b.text(PROMPTS)
    assert torch.equal(cond.context, other.context)
    assert torch.equal(cond.pooled, other.pooled)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(a.velocity(x, t, cond), b.velocity(x, t, cond))
        assert torch.equal(a.codec.decode(x), b.codec.decode(x))
        assert torch.equal(a.codec.encode(images), b.codec.encode(images))


TEXTS = ("text_encoders.clip_l.", "text_encoders.clip_g.", "text_encoders.t5xxl.")
TIED = ("text_encoders.t5xxl.transformer.encoder.embed_tokens.",)
WITHOUT = {"whole": (), "T5 tied": TIED, "no T5": TEXTS[2:], "no text encoders": TEXTS}


@pytest.mark.parametrize("without", WITHOUT.values(), ids=WITHOUT)
def test_a_single_file_is_the_folder(tmp_path: Path, original: Any, without: tuple[str, ...]) -> None:
    family, folder = original
    path = write(tmp_path / "sd3_tiny.safetensors", tiny.original(), without)
    loaded = sd3.load(path, config=folder)
    same(loaded, family)
    assert loaded.name == "sd3_tiny"
    assert loaded.parts["text_encoder_3"] is not None


def test_t5_in_a_file_can_be_left_out(tmp_path: Path, original: Any) -> None:
    path = write(tmp_path / "m.safetensors", tiny.original())
    loaded = sd3.load(path, config=original[1], t5=False)
    assert loaded.text(PROMPTS).context.shape[1] == tiny.LENGTH


def test_a_configuration_without_t5(tmp_path: Path) -> None:
    family = sd3.assemble(tiny.original(with_t5=False), name="clips")
    sd3.save(family, tmp_path / "config")
    path = write(tmp_path / "m.safetensors", tiny.original(with_t5=False))
    same(sd3.load(path, config=tmp_path / "config"), family)
    with pytest.raises(UserError, match="text_encoder_3"):
        sd3.load(path, config=tmp_path / "config", t5=True)


def _bad(path: Path, kind: str) -> None:
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "no tensors":
        path.write_bytes(b"not a checkpoint")
    else:
        save_file({"model.weight": torch.zeros(2)}, path)


@pytest.mark.parametrize("kind", ["truncated", "no tensors", "foreign"])
def test_a_bad_file_is_one_clear_line(tmp_path: Path, original: Any, kind: str) -> None:
    path = write(tmp_path / "m.safetensors", tiny.original())
    _bad(path, kind)
    with pytest.raises(UserError, match=r"m\.safetensors") as caught:
        sd3.load(path, config=original[1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "missing",
    [
        "model.diffusion_model.final_layer.linear.bias",
        "first_stage_model.decoder.conv_out.bias",
        "first_stage_model.",
    ],
)
def test_missing_weights_are_named(tmp_path: Path, original: Any, missing: str) -> None:
    path = write(tmp_path / "m.safetensors", tiny.original(), (missing,))
    with pytest.raises(UserError, match=r"m\.safetensors"):
        sd3.load(path, config=original[1])


@pytest.mark.parametrize(
    ("config", "named"), [(None, "none of SD3's known sizes"), ("no/such", "give a local folder as config")]
)
def test_without_a_configuration_the_way_out_is_named(tmp_path: Path, config: Any, named: str) -> None:
    path = write(tmp_path / "m.safetensors", tiny.original())
    with pytest.raises(UserError, match=named) as caught:
        sd3.load(path, config=config)
    assert "\n" not in str(caught.value)


def test_a_real_files_configuration_is_its_original(tmp_path: Path) -> None:
    """Tensors of SD3.5-Medium's own size, and the tests are offline: the hub's original is asked for."""
    tensors = {
        "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": torch.zeros(9216),
        "model.diffusion_model.joint_blocks.0.x_block.attn2.ln_q.weight": torch.zeros(64),
        "model.diffusion_model.pos_embed": torch.zeros(1, 384 * 384, 1),
        "first_stage_model.decoder.conv_out.bias": torch.zeros(3),
    }
    save_file(tensors, tmp_path / "sd3.5_medium.safetensors")
    with pytest.raises(UserError, match=r"stabilityai/stable-diffusion-3\.5-medium"):
        sd3.load(tmp_path / "sd3.5_medium.safetensors")
