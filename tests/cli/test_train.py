"""``fewstep train``, ``distill`` and ``data``: help without PyTorch, errors in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.helpers import tiny_stickers

import fewstep

pytestmark = pytest.mark.slow(10)

HELP = {
    "train": ("pocket-vae", "Train Pocket's MMDiT.", "scene-detector"),
    "distill": ("trajectory",),
    "data": ("stickers", "folder"),
    "train pocket-vae": ("--decoder-only", "Crops per step."),
    "train pocket-text": ("--words", "Captions per step;"),
    "train pocket-paraphrases": ("--init", "Prompts per step;"),
    "train pocket-teacher": ("--drop-caption", "Share of captions that are dropped"),
    "train scene-detector": ("--batch-size", "Images per step."),
    "distill trajectory": ("--student-steps", "The teacher's guidance scale"),
    "distill flash": ("--trajectory-weight", "The net whose features the heads read."),
    "data stickers": ("--images", "Number of training images."),
    "data folder": ("--output", "Folder for the shards."),
    "sample-teacher": ("--student-steps", "Number of samples."),
}
SAMPLE_TEACHER = ["sample-teacher", "--teacher", "nosuch", "--output", "x"]
SAY = """
import sys
from fewstep.cli.app import run
status = run(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(status)
"""


def said(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``fewstep`` in a process of its own, where torch must not be imported."""
    source = str(Path(fewstep.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": source, "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-c", SAY, *arguments], capture_output=True, text=True, cwd=cwd, env=environment
    )


@pytest.mark.parametrize("command", HELP)
def test_help_comes_without_torch(command: str) -> None:
    done = said(*command.split(), "--help")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.replace("│", " ").split())
    assert all(words in text for words in HELP[command])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "pocket-teacher", "--stepz", "3"], "there is no option --stepz. Did you mean --steps?"),
        (["train", "pocket-teacher", "--steps", "0"], "--steps must be at least 1"),
        (["train", "pocket-teacher", "--steps", "many"], "--steps"),
        (["train", "pocket-teacher", "--lr", "nan"], "--lr must be a positive number, not nan"),
        (["train", "pocket-vae", "--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["train", "pocket-text", "--seed", "-1"], "--seed must lie between 0 and"),
        (["distill", "trajectory", "--num-samples", "0"], "--num-samples must be at least 1, not 0"),
        (["distill", "dmd", "--score-point", "there"], "--score-point"),
        (["distill", "flash", "--warm-start-steps", "0"], "--warm-start-steps 0 needs an --init"),
        (["train", "pocket-teacher", "--init", "nosuch"], "--init nosuch: no such folder"),
        (["train", "pocket-text", "--init", "nosuch"], "--init nosuch: no such folder"),
        (["export", "x", "-o", "y", "--to", "diffusers", "--bits", "8"], "bits for diffusers must be"),
        (
            ["export", "x", "-o", "y", "--t5", "5"],
            "--t5 for onnx must be one of drop, keep, 4, 6, 8, 16, 32, not 5",
        ),
        (
            ["export", "x", "-o", "y", "--to", "gguf", "--t5", "keep"],
            "--t5 for gguf must be one of drop, not keep",
        ),
        (
            ["export", "x", "-o", "y", "--to", "paper"],
            "there is no target paper: give one of coreml, diffusers,",
        ),
        ([*SAMPLE_TEACHER, "--num-samples", "0"], "--num-samples must be at least 1, not 0"),
        ([*SAMPLE_TEACHER, "--num-samples", "1", "--gidance", "3"], "Did you mean --guidance?"),
        ([*SAMPLE_TEACHER, "--num-samples", "1", "--steps", "0"], "--steps must be at least 1, not 0"),
        (
            [*SAMPLE_TEACHER, "--num-samples", "1", "--prompts", "none.txt"],
            "cannot read the prompts in none.txt",
        ),
        ([*SAMPLE_TEACHER, "--num-samples", "1"], "no .tar shards there"),
        (["data", "stickers", "--size", "100"], "--size must be 64, 128 or 256"),
        (["data", "folder", "nowhere", "-o", "x"], "nowhere: no such folder"),
        (["show", "a.png", "b.png"], "b.png is one argument too many: see fewstep show --help"),
    ],
)
def test_a_bad_option_is_one_line(tmp_path: Path, arguments: list[str], told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fewstep", *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--to", "onnx"], "exists and is no bundle"),
        (["--to", "openvino"], "exists and is no bundle"),
        (["--to", "coreml"], "exists and is no Core ML export"),
        (["--to", "diffusers"], "exists and is no diffusers folder"),
        (["--to", "single-file"], "must end so"),
        (["--t5", "keep"], "has no T5: leave --t5 out"),
    ],
)
def test_an_export_that_cannot_be_is_refused_before_a_model_is_loaded(
    tmp_path: Path, arguments: list[str], told: str
) -> None:
    teacher = Path(__file__).parents[2] / "models" / "pocket-teacher"
    out = tmp_path / "new" if "--t5" in arguments else tmp_path
    (tmp_path / "mine.txt").touch()
    done = said("export", str(teacher), "-o", str(out), *arguments)
    assert done.returncode == 2 and told in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_is_missing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fewstep.cli.app import run

    data, none = str(tiny_stickers.make(tmp_path / "data", 3)), str(tmp_path / "none")
    (tmp_path / "part").mkdir()
    out = ["--output", str(tmp_path / "out")]
    for arguments, told in (
        (["train", "pocket-vae", "--data", none], "no .tar shards there"),
        (["train", "pocket-text", "--data", none], "holds no renderings"),
        (["train", "scene-detector", "--data", none], "holds no renderings"),
        (["train", "pocket-teacher", "--data", none], "no .tar shards there"),
        (["train", "pocket-teacher", "--data", data, "--codec", none], "fewstep train pocket-vae"),
        (
            ["train", "pocket-teacher", "--data", data, "--codec", data, "--text", none],
            "fewstep train pocket-text",
        ),
        (
            ["train", "pocket-teacher", "--data", data, "--codec", data, "--text", str(tmp_path / "part")],
            "part/tokenizer",
        ),
        (["train", "pocket-vae", "--data", data, "--init", none], "no such folder"),
        (["distill", "trajectory", "--data", none], "no .tar shards there"),
        (["distill", "trajectory", "--data", data, "--teacher", none], "there is no model"),
        (["distill", "trajectory", "--samples", none, "--teacher", none], "holds no plan.json"),
        (["sample-teacher", "--num-samples", "1", "--data", data, "--teacher", none], "there is no model"),
        (["sample-teacher", "--num-samples", "1", "--data", data, "--teacher", "pocket"], "is a bundle"),
        (
            ["sample-teacher", "--num-samples", "1", "--data", data, "--teacher", data],
            "neither bundle.json nor",
        ),
        (
            ["sample-teacher", "--num-samples", "1", "--data", data, "--teacher", none, "--guidance", "x"],
            "--guidance",
        ),
        (["distill", "trajectory", "--data", data, "--teacher", data], "neither bundle.json nor"),
    ):
        assert run([*arguments, *out]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert told in error, error
    assert not (tmp_path / "out").exists()
