"""NaN and infinity are one line wherever numbers become images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewstep
import tiny
from fewstep.cli.app import run
from fewstep.core.types import UserError
from fewstep.families import sd3
from fewstep.families.lora.role_files import save_role
from fewstep.modules.lora import LoRARoles
from fewstep.pipeline.loading import load_family


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finite") / "base"
    sd3.save(sd3.assemble(tiny.parts(), name="base", steps=3, guidance=None), folder)
    return folder


def _spoilt(base: Path, place: Path, part: str, name: str, value: float) -> Path:
    shutil.copytree(base, place)
    file = next((place / part).glob("*.safetensors"))
    tensors = load_file(file)
    tensors[name].fill_(value)
    save_file(tensors, file, {"format": "pt"})
    return place


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("part", "name", "words"),
    [
        ("transformer", "proj_out.bias", "the net gave"),
        ("vae", "decoder.conv_out.bias", "the decoder gave"),
        ("text_encoder", "text_model.final_layer_norm.bias", "a text encoder"),
        ("text_encoder_3", "encoder.final_layer_norm.weight", "a text encoder"),
    ],
)
def test_a_net_that_gives_nan_or_infinity_is_one_line_and_no_file(
    tmp_path: Path,
    base: Path,
    capsys: pytest.CaptureFixture[str],
    part: str,
    name: str,
    words: str,
    value: float,
) -> None:
    folder = _spoilt(base, tmp_path / "m", part, name, value)
    out = tmp_path / "a.png"
    assert run(["generate", "a cat", "--model", str(folder), "--seed", "1", "-o", str(out)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fewstep: ")]
    assert len(lines) == 1 and words in lines[0], lines
    assert not list(tmp_path.glob("*.png"))


def test_previews_and_sheets_of_nan_are_lines_too(tmp_path: Path, base: Path) -> None:
    from fewstep.train.preview import decode_uint8

    folder = _spoilt(base, tmp_path / "m", "transformer", "proj_out.bias", float("nan"))
    caught: list[str] = []

    def look(step: int, steps: int, preview: Any) -> None:
        try:
            preview()
        except UserError as error:
            caught.append(str(error))

    with pytest.raises(UserError, match="the net gave"):
        fewstep.load(str(folder))("a cat", seed=1, on_step=look)
    assert len(caught) == 3 and all("the net gave" in line for line in caught)
    family = load_family(str(base))
    with pytest.raises(UserError, match="the decoder gave"):
        decode_uint8(family, torch.full((1, *family.latent), float("nan")))


def test_a_lora_that_brings_nan_is_one_line(tmp_path: Path, base: Path) -> None:
    roles = LoRARoles(load_family(str(base)).net, ("student",), rank=2, targets=sd3.TARGETS)
    with torch.no_grad():
        next(iter(roles.net("student").parameters())).fill_(float("nan"))
    save_role(roles, "student", tmp_path / "lora")
    (tmp_path / "lora" / "fewstep.json").write_text('{"steps": 2}')
    with pytest.raises(UserError, match="NaN or infinity"):
        fewstep.load(str(base), student=str(tmp_path / "lora"))


def test_infinite_latents_that_a_decoder_would_hide_are_found(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny autoencoder squeezes latents by a tanh: infinity becomes an image."""
    tiny.tiny_vae(4).save_pretrained(tmp_path / "decoder")
    folder = _spoilt(base, tmp_path / "m", "transformer", "proj_out.bias", float("inf"))
    pipe = fewstep.load(str(folder), tiny_decoder=str(tmp_path / "decoder"))
    with pytest.raises(UserError, match="the net gave"):
        pipe("a cat", seed=1, steps=1)


def test_fewer_bits_are_told_to_be_given_up(tmp_path: Path, base: Path) -> None:
    folder = _spoilt(base, tmp_path / "m", "transformer", "proj_out.bias", float("nan"))
    with pytest.raises(UserError, match="--bits 32"):
        fewstep.load(str(folder), bits=16)("a cat", seed=1)
    with pytest.raises(UserError) as caught:
        fewstep.load(str(folder))("a cat", seed=1)
    assert "--bits" not in str(caught.value)
