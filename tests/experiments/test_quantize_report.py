"""A ladder of bundles and what it says of itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tests.helpers import taught

import fewstep
from fewstep.cli.app import run
from fewstep.experiments.quantize_report import CALIBRATION_PROMPTS
from fewstep.export.common import onnx_quantize, sensitivity
from fewstep.runtime.bundle import read
from fewstep.train.preview import SHOWN

pytestmark = [
    pytest.mark.slow(55),
    pytest.mark.filterwarnings("ignore::fewstep.runtime.tokenizer.PromptWarning"),
]
"""The tiny tokenizer cuts the prompts that are shown."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> taught.Taught:
    return taught.make(tmp_path_factory.mktemp("taught"))


def quantize(made: taught.Taught, out: Path, *words: str) -> int:
    own = words if "--prompts" in words else ("--prompts", "0", *words)
    return run(["quantize", str(made.teacher), "-o", str(out), *own])


OBSERVED: dict[str, set[str]] = {}
"""Weights of each graph whose inputs were known when their cost was measured."""


@pytest.fixture(scope="module")
def ladder(made: taught.Taught, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, real = tmp_path_factory.mktemp("ladder"), sensitivity.sensitivity

    def spy(graph: str, module: Any, outcome: Any, on_progress: Any, inputs: Mapping[str, Any]) -> Any:
        OBSERVED[graph] = set(inputs)
        return real(graph, module, outcome, on_progress, inputs)

    with pytest.MonkeyPatch.context() as patch:
        for module in (onnx_quantize, sensitivity):
            patch.setattr(module, "SMALLEST", 256)
        patch.setattr(sensitivity, "sensitivity", spy)
        patch.chdir(out)  # where there are no stickers
        assert quantize(made, out, "--rounds", "1", "--bits", "8", "--bits", "4") == 0
    return out


def test_every_rung_is_a_bundle_that_draws(ladder: Path) -> None:
    sizes = {bits: read(ladder / str(bits)).size for bits in (16, 8, 4)}
    assert sizes[16] > sizes[8] >= sizes[4]  # few of so small a net's weights have groups
    drawn = {
        bits: np.stack([fewstep.load(ladder / str(bits))(prompt, seed=1)[0] for prompt in SHOWN[:4]])
        for bits in sizes
    }
    errors = [np.square(drawn[bits].astype(float) - drawn[16]).mean() for bits in (8, 4)]
    assert errors[0] < min(2, errors[1] / 5)


def test_the_report_tells_what_was_written(ladder: Path) -> None:
    report = (ladder / "report.md").read_text()
    assert f"{read(ladder / '4').size / 1e6:.1f}" in report
    assert {"16", "8", "4"} <= {
        line.split("|")[1].strip() for line in report.splitlines() if line.startswith("|")
    }
    told = json.loads((ladder / "sensitivity.json").read_text())
    for bits in ("8", "4"):
        taken = sum(weight["bytes"][str(weight["given"][bits])] for weight in told)
        least = sum(min(weight["bytes"].values()) for weight in told)
        assert taken <= max(
            least, sum(weight["size"] for weight in told) * sensitivity.BUDGET_BITS[int(bits)] / 8
        )
    assert f"Calibrated on {len(SHOWN)} prompts of the contact sheet" in report
    observed = [weight for weight in told if weight["name"] in OBSERVED[weight["graph"]]]
    assert {weight["graph"] for weight in observed} == {weight["graph"] for weight in told}
    assert (ladder / "sheet.png").stat().st_size > 1000


def test_captions_are_drawn_and_a_folder_without_is_told_of(
    made: taught.Taught, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[str] = []

    def calibrate(family: Any, parts: Any, prompts: Sequence[str], on_progress: Any) -> Any:
        drawn.extend(prompts)
        raise KeyboardInterrupt

    monkeypatch.setattr(sensitivity, "calibrate", calibrate)
    words = ["quantize", str(made.teacher), "-o", str(tmp_path / "out"), "--prompts", "0", "--data"]
    assert run([*words, str(made.shards)]) == 130
    assert len(drawn) == CALIBRATION_PROMPTS
    assert set(drawn) == set(taught.PROMPTS)
    (tmp_path / "empty").mkdir()
    assert run([*words, str(tmp_path / "empty")]) == 2
    assert "no .tar shards" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bits", "5"], "--bits 5"),
        (["--rounds", "0"], "--rounds"),
        (["--prompts", "9", "--data", "no"], "no renderings"),
        (["--prompts", "0", "--data", "no"], "no: no .tar shards there"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(
    made: taught.Taught, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert quantize(made, tmp_path / "out", *words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_given_is_looked_at_before_anything_is_traced(
    made: taught.Taught, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "about.json").write_text('{"styles": "3D"}')
    assert quantize(made, tmp_path / "out", "--metadata", str(tmp_path / "about.json")) == 2
    assert '"styles" must be a list of words' in capsys.readouterr().err
    shard = sorted(made.shards.glob("*.tar"))[0]
    assert quantize(made, tmp_path / "out", "--prompts", "9", "--data", str(shard)) == 2
    assert "a shard alone has nothing to evaluate with" in capsys.readouterr().err
    shutil.copytree(made.teacher, tmp_path / "broken")
    assert quantize(made, tmp_path / "broken") == 2
    assert f"{tmp_path / 'broken'} is a model: choose another folder" in capsys.readouterr().err
    file = tmp_path / "broken" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.weight"][0, 0] = float("nan")
    save_file(weights, file)
    assert run(["quantize", str(tmp_path / "broken"), "-o", str(tmp_path / "out"), "--prompts", "0"]) == 2
    assert "transformer: the weight proj_out.weight has NaN" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_a_folder_is_refused_at_once(
    made: taught.Taught, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("mine")
    for place in (tmp_path / "mine", tmp_path / "mine" / "deeper"):
        assert quantize(made, place) == 2
        assert capsys.readouterr().err == f"fewstep: {tmp_path / 'mine'} is a file: give a folder\n"
    assert (tmp_path / "mine").read_text() == "mine"
