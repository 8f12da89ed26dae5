"""Where a model's name leads: a bundle, a folder, a run's folder, or one line that says what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import fewstep
from fewstep.cli import app as cli
from fewstep.core.types import UserError
from fewstep.pipeline import loading
from fewstep.pipeline.resolve import LORA, bundle_of, resolve
from tiny_bundle import write_bundle

Capture = pytest.CaptureFixture[str]


def a_run(folder: Path, steps: int = 40, done: tuple[int, ...] = ()) -> Path:
    """What a training leaves that was stopped."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"recipe": "distill-dmd", "options": {"steps": steps}}))
    for step in done:
        (folder / "checkpoints" / f"{step:08d}").mkdir(parents=True)
    return folder


def line(name: object) -> str:
    with pytest.raises(UserError) as told:
        resolve(str(name))
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_finished_run_is_its_model(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", done=(20, 40))
    write_bundle(run / "model")
    assert resolve(str(run)) == run / "model"
    assert bundle_of(str(run)) == bundle_of(str(run / "model"))
    pipe = fewstep.load(run, threads=1)
    assert (pipe("a cat", seed=3)[0].tobytes()) == fewstep.load(run / "model")("a cat", seed=3)[0].tobytes()


def test_a_folder_that_is_a_model_hides_no_other(tmp_path: Path) -> None:
    write_bundle(tmp_path / "both")
    write_bundle(tmp_path / "both" / "model")
    assert resolve(str(tmp_path / "both")) == tmp_path / "both"


def test_an_unfinished_run_is_called_that(tmp_path: Path) -> None:
    assert "is a run at step 34 of 40 that has not finished" in line(a_run(tmp_path / "a", 40, (20, 34)))
    assert "is a run at step 0 of 7 that has not finished" in line(a_run(tmp_path / "b", 7))
    chain = tmp_path / "chain"
    a_run(chain / "1-warm", 5, (5,))
    write_bundle(chain / "1-warm" / "model")
    a_run(chain / "2-flash", 9, (3,))
    (chain / "run.json").write_text('{"recipe": "distill-flash-chain", "made_of": {}}')
    assert "is a run at step 3 of 9 of its stage 2-flash that has not finished" in line(chain)
    shutil.rmtree(chain / "1-warm"), shutil.rmtree(chain / "2-flash")
    assert "is a run before its first step that has not finished" in line(chain)


def test_what_else_a_folder_may_be_is_said(tmp_path: Path) -> None:
    part = a_run(tmp_path / "codec")
    (part / "model").mkdir()
    assert "trained a part of a model" in line(part)
    lora = a_run(tmp_path / "lora")
    (lora / "lora").mkdir()
    (lora / "lora" / LORA).touch()
    for place in (lora, lora / "lora"):
        assert "holds a LoRA alone: give its base with --model, and it with --student" in line(place)
    for bits in ("8", "4"):
        write_bundle(tmp_path / "ladder" / bits)
    assert f"several models: give one, such as {tmp_path / 'ladder' / '4'}" in line(tmp_path / "ladder")
    (tmp_path / "none").mkdir()
    assert "is no model: it has neither" in line(tmp_path / "none")


@pytest.mark.parametrize("text", ["[", "[]", '{"options": []}', '{"options": {"steps": "many"}}', "9" * 5000])
def test_a_damaged_run_is_one_line(tmp_path: Path, text: str) -> None:
    run = a_run(tmp_path / "run")
    (run / "run.json").write_text(text)
    assert "run.json is damaged" in line(run)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "x/" * 2000, "\udcff", "org/" + "x" * 300, ""])
def test_odd_names_are_no_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str) -> Path:
        raise UserError("nothing there")

    monkeypatch.setattr("fewstep.pipeline.resolve._fetch", fetch)
    assert line(name)


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "a", "--model"],
        ["export", "-o", "out"],
        ["quantize", "--prompts", "0", "-o", "out"],
        ["bench"],
        ["bench", "--baseline"],
        ["evaluate", "--scenes", "0", "-o", "out"],
    ],
)
def test_every_command_calls_it_unfinished(
    tmp_path: Path, words: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "run", 40, (34,))
    assert cli.run([*words, "run"]) == 2
    error = capsys.readouterr().err
    assert "run is a run at step 34 of 40 that has not finished" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("memory", 24), ("memory", 2**35), ("memory", b"24GiB"),
        ("size", (64, 64)), ("size", 768), ("size", [768, 512]),
        ("student", ["a"]), ("student", 1), ("student", b"a"),
        ("tiny_decoder", 1), ("tiny_decoder", True),
        ("bits", "8"), ("bits", 8.0), ("bits", 5), ("bits", True), ("bits", [8]),
        ("device", 3), ("device", "tpu"), ("device", None), ("device", {}),
        ("compile", "yes"), ("compile", 1), ("compile", None),
        ("image", "a.png"), ("batch", "2"), ("batch", 1.0), ("batch", 0),
        ("lora", 3), ("lora", [b"a"]),
    ],
)  # fmt: skip
def test_options_of_another_type_are_one_line(tmp_path: Path, option: str, value: object) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    for model in (tmp_path, "pocket"):
        with pytest.raises(UserError, match=f"^{option} must be ") as caught:
            fewstep.load(model, **{option: value})  # pyright: ignore[reportArgumentType]
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["student", "tiny_decoder"])
def test_a_path_is_as_good_as_its_text(option: str) -> None:
    for value in (Path("there"), "there", None):
        assert loading._checked(option, value) == (None if value is None else "there")


@pytest.mark.parametrize("model", [3, b"pocket", ["pocket"], 1.5, True])
def test_a_model_of_another_type_is_one_line(model: object) -> None:
    message = f"a model is named by a string or a path, not {type(model).__name__}"
    with pytest.raises(UserError, match=message):
        fewstep.load(model)  # pyright: ignore[reportArgumentType]
