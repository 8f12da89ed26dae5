"""The same pipeline on PyTorch: a diffusers folder by its path."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fewstep
from fewstep.core import sampling, schedule
from fewstep.core.guidance import Guided
from fewstep.families import sd3
from fewstep.images.pixels import center_crop_resize, to_pil, to_uint8
from fewstep.images.record import Record
from fewstep.pipeline.pipeline import Pipeline


def random_parts() -> dict[str, Any]:
    path = Path(__file__).parents[1] / "helpers" / "tiny.py"
    spec = importlib.util.spec_from_file_location("tiny_family", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.parts()


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("torch") / "model"
    sd3.save(sd3.assemble(random_parts(), name="small", steps=3, guidance=2.0), folder)
    return fewstep.load(folder, backend="torch")


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_the_picture_is_the_guided_walk(pipe: Pipeline) -> None:
    model = pipe.model
    velocity = Guided(model.velocity, model.text(["a dog"]), 2.0)
    x = model.from_numpy(sampling.batch_noise([7], model.latent))
    x = sampling.sample_flow(velocity, x, schedule.grid(3, model.shift), model.text(["a cat"]))
    expected = to_pil(to_uint8(model.to_numpy(model.codec.decode(x))))[0]
    (image,) = pipe("a cat", seed=7, negative="a dog")
    assert abs(levels(image) - levels(expected)).max() <= 1
    record = Record.parse(image.info["fewstep"])
    assert (record.guidance, record.negative, record.hash) == (2.0, "a dog", "")


def test_batches_agree(pipe: Pipeline) -> None:
    together = pipe(["a cat", "a dog"], seed=3, n=2, batch=4)
    apart = pipe(["a cat", "a dog"], seed=3, n=2, batch=1)
    for one, other in zip(together, apart, strict=True):
        assert abs(levels(one) - levels(other)).max() <= 1
    assert len({image.tobytes() for image in together}) == 4


def test_strength_0_is_the_codec_alone(pipe: Pipeline) -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    model = pipe.model
    latents = model.codec.encode(model.from_numpy(center_crop_resize(photo, pipe.size)))
    trip = to_pil(to_uint8(model.to_numpy(model.codec.decode(latents))))[0]
    (image,) = pipe("a cat", seed=0, image=photo, strength=0)
    assert abs(levels(image) - levels(trip)).max() <= 1
