"""Weights that are a pickle execute what they say: they are not read."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

import tiny
from fewstep.core.types import UserError
from fewstep.families import sd3
from fewstep.pipeline.loading import load_family


class Bomb:
    """Its pickle makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    sd3.save(sd3.assemble(tiny.parts(), name="teacher"), folder)
    return folder


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("transformer", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"),
        ("text_encoder", "model.ckpt"),
    ],
)
def test_a_part_whose_weights_are_a_pickle_is_refused(
    teacher: Path, tmp_path: Path, part: str, name: str
) -> None:
    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(teacher, folder)
    for weights in (folder / part).glob("*.safetensors"):
        weights.unlink()
    (folder / part / name).write_bytes(pickle.dumps(Bomb(canary)))
    with pytest.raises(UserError, match=f"{part} has no weights: .*pickled") as caught:
        load_family(str(folder))
    assert "\n" not in str(caught.value)
    assert not canary.exists()
