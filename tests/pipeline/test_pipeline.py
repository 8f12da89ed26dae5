from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fewstep
from fewstep.core import flow, sampling, schedule
from fewstep.core.types import UserError
from fewstep.images import io as image_io
from fewstep.images.pixels import center_crop_resize, to_pil, to_uint8
from fewstep.images.record import Record, read_info, read_records
from fewstep.pipeline.pipeline import Pipeline
from tiny_bundle import write_bundle

PROMPT = "a cat"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return fewstep.load(write_bundle(tmp_path_factory.mktemp("pipe")).folder, threads=1)


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return fewstep.load(write_bundle(tmp_path_factory.mktemp("guided"), guidance=3.0).folder, threads=1)


@pytest.fixture
def photo() -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8)
    return Image.fromarray(pixels)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def same(one: Image.Image, other: Image.Image) -> bool:
    return bool((pixels(one) == pixels(other)).all())


def test_the_picture_is_the_walk_of_its_seed(pipe: Pipeline) -> None:
    model = pipe.model
    x = sampling.batch_noise([7], model.latent)
    x = sampling.sample_flow(model.velocity, x, schedule.grid(4, model.shift), model.text([PROMPT]))
    expected = to_pil(to_uint8(model.codec.decode(x)))[0]
    (image,) = pipe(PROMPT, seed=7)
    assert image.size == (32, 32) and image.mode == "RGB"
    assert same(image, expected)


@pytest.mark.parametrize("change", [{"prompts": "a dog"}, {"seed": 1}, {"steps": 3}, {"style": "flat"}])
def test_everything_said_matters(pipe: Pipeline, change: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"prompts": PROMPT, "seed": 0, "steps": 4}
    assert not same(pipe(**asked)[0], pipe(**{**asked, **change})[0])


def test_a_seed_is_the_same_picture_in_every_batch(pipe: Pipeline) -> None:
    prompts = [PROMPT, "a dog"]
    eight = pipe(prompts, seed=5, n=4, batch=8)
    one = pipe(prompts, seed=5, n=4, batch=1)
    three = pipe(prompts, seed=5, n=4, batch=3)
    alone = [pipe(text, seed=5 + index)[0] for text in prompts for index in range(4)]
    for group in (one, three, alone):
        assert all(map(same, eight, group))
    assert len({image.tobytes() for image in eight}) == 8


def test_a_model_that_renoises_draws_fresh_noise_of_the_seed(pipe: Pipeline, tmp_path: Path) -> None:
    write_bundle(tmp_path / "tiny", sampler="renoise")
    renoising = fewstep.load(tmp_path / "tiny", threads=1)
    alone, together = renoising("a cat", seed=8), renoising("a cat", seed=7, n=3, batch=3)
    assert same(alone[0], together[1])
    assert not same(alone[0], pipe("a cat", seed=8)[0])
    one_step = [draw("a cat", seed=8, steps=1)[0] for draw in (renoising, pipe)]
    assert same(*one_step)  # the last step mixes no noise


def test_a_seed_is_drawn_and_recorded(pipe: Pipeline) -> None:
    (image,) = pipe(PROMPT)
    record = Record.parse(image.info["fewstep"])
    assert same(image, pipe(PROMPT, seed=record.seed)[0])
    assert Record.parse(pipe(PROMPT)[0].info["fewstep"]).seed != record.seed


def test_strength_0_is_the_codec_alone(pipe: Pipeline, photo: Image.Image) -> None:
    (image,) = pipe(PROMPT, image=photo, strength=0, seed=3)
    codec = pipe.model.codec
    trip = to_pil(to_uint8(codec.decode(codec.encode(center_crop_resize(photo, (32, 32))))))[0]
    assert same(image, trip)


def test_strength_1_is_text_to_image(pipe: Pipeline, photo: Image.Image) -> None:
    assert same(pipe(PROMPT, image=photo, strength=1, seed=3)[0], pipe(PROMPT, seed=3)[0])


def test_between_it_starts_from_the_mixture(pipe: Pipeline, photo: Image.Image, tmp_path: Path) -> None:
    model, path = pipe.model, tmp_path / "photo.png"
    photo.save(path)
    grid = schedule.strength_grid(4, 0.5, model.shift)
    start = model.codec.encode(center_crop_resize(photo, (32, 32)))
    x = flow.interpolate(start, sampling.batch_noise([3], model.latent), grid[0])
    x = sampling.sample_flow(model.velocity, x, grid, model.text([PROMPT]))
    expected = to_pil(to_uint8(model.codec.decode(x)))[0]
    for image in (photo, path, str(path)):
        assert same(pipe(PROMPT, image=image, strength=0.5, seed=3)[0], expected)


def test_every_step_is_reported_and_the_last_preview_is_the_picture(pipe: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    previews: list[Image.Image] = []

    def look(step: int, steps: int, preview: Callable[[], list[Image.Image]]) -> None:
        seen.append((step, steps))
        previews[:] = preview()

    images = pipe(PROMPT, n=3, seed=0, steps=2, batch=2, on_step=look)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    difference = pixels(previews[0]).astype(int) - pixels(images[2])
    assert abs(difference).max() <= 1


def test_guidance_steers(guided: Pipeline) -> None:
    model = guided.model
    cond, uncond = model.text([PROMPT]), model.text(["a dog"])
    x = sampling.batch_noise([0], model.latent)

    def velocity(x: np.ndarray, t: np.ndarray, _: Any) -> np.ndarray:
        away = model.velocity(x, t, uncond)
        return away + 2.5 * (model.velocity(x, t, cond) - away)

    x = sampling.sample_flow(velocity, x, schedule.grid(4, model.shift), cond)
    expected = pixels(to_pil(to_uint8(model.codec.decode(x)))[0]).astype(int)
    (image,) = guided(PROMPT, seed=0, guidance=2.5, negative="a dog")
    assert abs(pixels(image) - expected).max() <= 1
    assert same(guided(PROMPT, seed=0)[0], guided(PROMPT, seed=0, guidance=3.0)[0])
    assert not same(guided(PROMPT, seed=0, guidance=1.0)[0], image)


def test_style_is_a_phrase_that_is_not_said_twice(pipe: Pipeline) -> None:
    assert pipe.request("a cat", style="3d").jobs[0][0] == "a cat, 3D style"
    assert pipe.request("3D style cat", style="3D").jobs[0][0] == "3D style cat"
    assert pipe.request("a cat, 3D style", style="flat").jobs[0][0] == "a cat, flat style"
    assert pipe.request("3D style cat", style="flat").jobs[0][0] == "cat, flat style"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompts": ""}, "prompt is empty"),
    ({"prompts": " \n\t"}, "prompt is empty"),
    ({"prompts": []}, "there is no prompt"),
    ({"prompts": [PROMPT, None]}, "must be text"),
    ({"prompts": "a \udcff"}, "UTF-8"),
    ({"prompts": "苹果"}, "English only"),
    ({"steps": 0}, "steps must be a whole number from 1 to 8"),
    ({"steps": 9}, "steps must be a whole number from 1 to 8"),
    ({"steps": 2.5}, "steps must be a whole number"),
    ({"n": 0}, "n must be"),
    ({"n": 2**40}, "n must be"),
    ({"seed": -1}, "seed must be"),
    ({"seed": 2**32}, "seed must be"),
    ({"seed": 2**32 - 1, "n": 2}, "the last seed"),
    ({"guidance": 3.0}, "takes no guidance"),
    ({"negative": "a dog"}, "takes no negative"),
    ({"style": "noir"}, "the styles of this model: 3D, flat"),
    ({"image": "photo.png", "strength": float("nan")}, "strength must be"),
    ({"image": "photo.png", "strength": 1.5}, "strength must be"),
    ({"image": "photo.png", "strength": "much"}, "strength must be"),
    ({"image": "nowhere.png"}, "there is no image nowhere.png"),
    ({"image": __file__}, "not an image"),
    ({"prompts": "\u200b\ufeff"}, "prompt is empty"),
    ({"prompts": "。。。"}, "prompt is empty"),
    ({"seed": 10**5000}, "seed must be"),
    ({"on_step": 5}, "on_step must be a function"),
    ({"batch": 65}, "batch must be"),
    ({"prompts": 5}, "must be text, not int"),
    ({"prompts": b"x"}, "must be text, not bytes"),
    ({"prompts": bytearray(b"x")}, "must be text, not bytearray"),
    ({"prompts": {"a": 1}}, "must be text, not dict"),
    ({"style": 3}, "style must be text, not int"),
    ({"strength": 0.5}, "give an image"),
    ({"image": 5}, "must be a path or a Pillow image"),
    ({"batch": 0}, "batch must be"),
]


@pytest.mark.parametrize(("asked", "message"), BAD)
def test_bad_input_is_one_clear_line(pipe: Pipeline, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        pipe(**{"prompts": PROMPT, **asked})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "much"])
def test_bad_guidance(guided: Pipeline, scale: Any) -> None:
    with pytest.raises(UserError, match="guidance must be a number"):
        guided(PROMPT, guidance=scale)


def test_a_guided_model_may_take_many_steps(guided: Pipeline) -> None:
    assert len(guided(PROMPT, steps=100, seed=0)) == 1
    with pytest.raises(UserError, match="from 1 to 100"):
        guided(PROMPT, steps=101)


def test_metadata_survives_the_file(pipe: Pipeline, tmp_path: Path) -> None:
    (image,) = pipe("a café cat, 3D style", seed=4, steps=2)
    image_io.save(image, tmp_path / "cat.png")
    record = read_records(tmp_path / "cat.png")[0]
    assert (record.prompt, record.seed, record.steps) == ("a café cat, 3D style", 4, 2)
    assert pipe.bundle is not None and record.hash == pipe.bundle.digest
    text = read_info(tmp_path / "cat.png")["parameters"]
    assert text.splitlines()[0] == "a café cat, 3D style"
    assert "Steps: 2, Sampler: Euler, CFG scale: 1, Seed: 4, Size: 32x32" in text
    assert Record.parse(record.json()) == record


@pytest.mark.parametrize(
    "text", ["{", "[]", "5", "{}", '{"size": [1, 2], "prompt": 3, "model": "a", "hash": "", "seed": 1}']
)
def test_foreign_metadata_is_refused(tmp_path: Path, text: str) -> None:
    image = Image.new("RGB", (8, 8))
    image.info["fewstep"] = text
    image_io.save(image, tmp_path / "odd.png")
    with pytest.raises(UserError, match=r"the metadata of .*odd\.png is damaged"):
        read_records(tmp_path / "odd.png")[0]


def test_input_pictures_are_cropped_and_laid_on_white() -> None:
    clear = center_crop_resize(Image.new("RGBA", (50, 20), (0, 0, 0, 0)), (32, 32))
    assert clear.shape == (1, 3, 32, 32) and clear.dtype == np.float32
    np.testing.assert_array_equal(clear, 1)
    wide = Image.new("RGB", (90, 30), "black")
    wide.paste("white", (30, 0, 60, 30))
    assert (
        center_crop_resize(wide, (32, 32)).min() > 0.9
    )  # the filter sees a little over the edge of the crop


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    monkeypatch.setattr("os.link", full)
    with pytest.raises(UserError, match="No space left"):
        image_io.save(Image.new("RGB", (8, 8)), tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_sources(pipe: Pipeline, tmp_path: Path) -> None:
    assert pipe.bundle is not None
    folder = pipe.bundle.folder
    with pytest.raises(UserError, match="runs on onnx, not on torch"):
        fewstep.load(folder, backend="torch")
    with pytest.raises(UserError, match="neither bundle"):
        fewstep.load(tmp_path)
    with pytest.raises(UserError, match="no model 'nothing'"):
        fewstep.load("nothing")
    with pytest.raises(UserError, match="the hub cannot be asked"):
        fewstep.load("nobody/nothing")
    with pytest.raises(UserError, match="threads must be"):
        fewstep.load(folder, threads=0)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="runs on torch, not on onnx"):
        fewstep.load(tmp_path, backend="onnx")


def test_generation_imports_no_torch(pipe: Pipeline) -> None:
    assert pipe.bundle is not None
    code = f"""
import sys, fewstep
assert not {{"numpy", "PIL", "onnxruntime"}} & set(sys.modules), "import fewstep is not light"
fewstep.load({str(pipe.bundle.folder)!r})({PROMPT!r}, image=fewstep.load({str(pipe.bundle.folder)!r})("a")[0])
heavy = {{"torch", "onnx", "diffusers", "transformers", "scipy", "rich", "huggingface_hub", "cyclopts"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_records_list_what_a_picture_depends_on(pipe: Pipeline, photo: Image.Image) -> None:
    (image,) = pipe(PROMPT, seed=0, image=photo, strength=0.5)
    facts = json.loads(image.info["fewstep"])
    assert facts["strength"] == 0.5 and facts["batch"] == 1
    assert set(facts) < {field.name for field in dataclasses.fields(Record)}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_one_line(pipe: Pipeline, value: float) -> None:
    """Of the net, the text encoders and the decoder; and no warning of numpy's beside it."""

    def net(x_t: Any, t: Any, cond: Any) -> Any:
        return np.full_like(x_t, value)

    def text(prompts: Any) -> Any:
        return pipe.model.text(prompts).map(lambda array: array * np.float32(value))

    class Codec:
        encode = staticmethod(pipe.model.codec.encode)

        @staticmethod
        def decode(latents: Any) -> Any:
            return pipe.model.codec.decode(latents) + np.float32(value)

    def through(x_t: Any, t: Any, cond: Any) -> Any:
        return x_t * cond.pooled.mean()

    for parts, words in (
        ({"velocity": net}, "the net gave"),
        ({"text": text, "velocity": through}, "a text encoder"),
        ({"codec": Codec()}, "the decoder gave"),
    ):
        broken = dataclasses.replace(pipe, model=dataclasses.replace(pipe.model, **parts))
        with pytest.raises(UserError, match=words), np.errstate(invalid="ignore"):
            broken(PROMPT, seed=1)


def test_the_package_shows_its_api_and_a_pipeline_itself(pipe: Pipeline, tmp_path: Path) -> None:
    assert dir(fewstep) == ["Pipeline", "UserError", "__version__", "load", "save"]
    assert repr(pipe) == "<fewstep.Pipeline tiny: onnx, 32x32 px, 4 steps>"
    odd = dataclasses.replace(pipe, bundle=None, model=dataclasses.replace(pipe.model, name="a\x1b[31m\nb"))
    assert repr(odd).isprintable() and "torch" in repr(odd) and len(repr(odd)) < 120


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"num_images_per_prompt": 2, "num_inference_steps": 3}, {"n": 2, "steps": 3}),
        ({"prompt": PROMPT, "prompts": None}, {}),
        ({"width": 32, "height": 32}, {}),
        ({"negative_prompt": "a dog", "guidance_scale": 2.0}, {"negative": "a dog", "guidance": 2.0}),
        ({"negative_prompt": None, "guidance_scale": None, "height": None}, {}),
    ],
)
def test_diffusers_names_mean_the_same(
    guided: Pipeline, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    base = {"prompts": PROMPT, "seed": 5}
    drawn, expected = guided(**{**base, **theirs}), guided(**{**base, **ours})
    assert len(drawn) == len(expected) and all(map(same, drawn, expected))
    assert drawn[0].info == expected[0].info


UNKNOWN: list[tuple[dict[str, Any], str]] = [
    ({"step": 3}, "takes no step: did you mean steps?"),
    ({"num_inference_step": 3}, "did you mean num_inference_steps?"),
    ({"generator": 1}, "did you mean seed?"),
    ({"xyzzy": 1}, "takes no xyzzy: there are guidance, guidance_scale, height, image"),
    ({"steps": 3, "num_inference_steps": 3}, "num_inference_steps is another name of steps"),
    ({"n": 1, "num_images_per_prompt": 2}, "num_images_per_prompt is another name of n"),
    ({"prompt": "a dog"}, "prompt is another name of prompts"),
]


@pytest.mark.parametrize(("options", "message"), UNKNOWN)
@pytest.mark.parametrize("kind", [UserError, TypeError])
def test_an_argument_that_there_is_not(
    pipe: Pipeline, options: dict[str, Any], message: str, kind: type[Exception]
) -> None:
    with pytest.raises(kind) as told:
        pipe(PROMPT, **options)
    assert message in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 64}, "generates 32x32 pixels, not 64x32: leave it out"),
        ({"height": 512, "width": 512}, "not 512x512"),
        ({"height": 0}, "height must be a whole number"),
        ({"height": "tall"}, "height must be a whole number"),
        ({"num_inference_steps": 99}, "steps must be"),
        ({"guidance_scale": 3.5}, "takes no guidance"),
    ],
)
def test_diffusers_names_are_checked(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe(PROMPT, **options)


def test_another_size_of_a_model_that_can_is_asked_for_at_loading(pipe: Pipeline) -> None:
    able = dataclasses.replace(pipe, record_fields={"bits": 16})
    with pytest.raises(UserError, match=r'not 768x512: fewstep.load\(..., size="768x512"\) does that'):
        able.request(PROMPT, width=768, height=512)


def test_an_option_of_loading_that_there_is_not(pipe: Pipeline) -> None:
    with pytest.raises(TypeError, match="load takes no sise: did you mean size"):
        fewstep.load(pipe.source, sise="512")  # type: ignore[call-arg]
