"""The command line as a person meets it: real processes on a tiny bundle."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fewstep
from fewstep.cli import app as cli
from fewstep.core.optional import install
from fewstep.images.io import open_image
from tiny_bundle import write_bundle

SOURCE = Path(fewstep.__file__).parents[1]
Capture = pytest.CaptureFixture[str]
COMMAND = [sys.executable, "-m", "fewstep"]
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"
}  # fmt: skip

HELPED = [
    "", "generate", "show", "models", "data folder", "data stickers", "sample-teacher",
    "train pocket-vae", "train pocket-text", "train pocket-paraphrases", "train pocket-teacher",
    "train scene-detector", "distill flash", "distill trajectory", "distill dmd", "distill tdm",
    "distill ladd", "distill lcm", "estimate-memory", "gradient-noise", "ablate pocket",
    "ablate fashion", "export", "quantize",
    "evaluate", "bench",
]  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "tiny").folder


@pytest.fixture
def at(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder; the model is ``../tiny`` from there by a link."""
    (tmp_path / "tiny").symlink_to(bundle)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def run(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    more = {"capture_output": True, "text": True, "env": ENVIRONMENT, "timeout": 60, **more}
    return subprocess.run([*COMMAND, *arguments], check=False, **more)


def generate(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return run("generate", "--model", "../tiny", *arguments, **more)


def inside(*arguments: str) -> int:
    """The same in this process: quicker, where the process itself is not the point."""
    return cli.run(["generate", "--model", "../tiny", *arguments])


def start_many() -> subprocess.Popen[bytes]:
    """A process that writes 20,000 pictures into ``out/``, if nobody stops it."""
    arguments = [*COMMAND, "generate", "a", "--model", "../tiny", "-n", "20000", "-o", "out/"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whom a shell's & told to ignore it
    try:
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    finally:
        signal.signal(signal.SIGINT, before)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(open_image(path))


def assert_one_line(done: subprocess.CompletedProcess[str], message: str, status: int = 2) -> None:
    assert done.returncode == status, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fewstep: ") and message in lines[0], done.stderr


def test_a_prompt_becomes_a_picture(at: Path) -> None:
    done = generate("a red apple, 3D style", "--seed", "3")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "a-red-apple-3d-style-3.png\n"
    assert [path.name for path in at.iterdir()] == ["a-red-apple-3d-style-3.png"]
    assert pixels(at / "a-red-apple-3d-style-3.png").shape == (32, 32, 3)


def test_bad_values_end_in_one_line_and_no_file(at: Path) -> None:
    rows = {
        "prompt is empty": [""],
        "there is no prompt": [],
        "English only": ["苹果"],
        "steps must be a whole number from 1 to 8": ["a", "--steps", "0"],
        "guidance": ["a", "--guidance", "nan"],
        "test_app.py is not": ["a", "--image", __file__],
        "cannot make the folder": ["a", "-o", "/dev/full/x/"],
        "cannot write /dev/full: No space left": ["a", "-o", "/dev/full"],
        "a name is missing in -o ' '": ["a", "-o", " "],
        "cannot write": ["a", "-o", "/proc/x.png"],
        "Did you mean --steps?": ["a", "--stepz", "3"],
    }
    for message, arguments in rows.items():
        assert_one_line(generate(*arguments), message)
    assert not list(at.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--steps", "2.5"], "not a whole number"),
        (["a", "--threads", "many"], "'many' is not a whole number"),
        (["a", "-n", "0"], "n must be"),
        (["a", "--seed", "-1"], "seed must be"),
        (["a", "--strength", "0.5"], "strength is for image-to-image"),
        (["a", "--style", "noir"], "the styles of this model: 3D, flat"),
        (["a", "--backend", "torch"], "runs on onnx"),
        (["a", "--backend", "tpu"], "there is no runtime engine tpu: give one of onnx"),
        (["a", "-o", "x.bmp"], "images are written as .png, .jpg, .jpeg or .webp, not as 'x.bmp'"),
        (["a", "-o", "-", "-n", "2"], "standard output takes one image"),
        (["a", "-o", "-", "--json"], "standard output takes one image"),
        (["a", "-o", "{word}.png"], "cannot read the pattern"),
        (["a", "--prompts", "nowhere.txt"], "cannot read the prompts in nowhere.txt"),
        (["--from", "nowhere.png"], "there is no image nowhere.png"),
        (["a", "--steps"], "requires an argument"),
    ],
)
def test_bad_options(at: Path, capsys: Capture, arguments: list[str], message: str) -> None:
    assert inside(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fewstep: ") and err.count("\n") == 1 and message in err
    assert not list(at.iterdir())


def test_commands_are_suggested(capsys: Capture) -> None:
    assert cli.run(["generat", "a"]) == 2
    assert capsys.readouterr().err == "fewstep: there is no command generat: did you mean generate?\n"
    assert cli.run(["xyz"]) == 2
    assert "the commands are generate, show, models" in capsys.readouterr().err
    assert cli.run(["data", "stikers"]) == 2
    assert capsys.readouterr().err == "fewstep: there is no command data stikers: did you mean stickers?\n"
    assert cli.run(["data", "xyz"]) == 2
    assert "the commands are stickers, fashion, folder" in capsys.readouterr().err


def test_a_closed_or_full_standard_error_changes_nothing(at: Path) -> None:
    for number, (prompt, error, status) in enumerate(
        [("a 中 cat", "2>&-", 0), ("a 中 cat", "2>/dev/full", 0), ("", "2>&-", 2), ("", "2>/dev/full", 2)]
    ):
        command = (
            f"exec {sys.executable} -m fewstep generate --model ../tiny '{prompt}' -o {number}.png {error}"
        )
        done = subprocess.run(["sh", "-c", command], env=ENVIRONMENT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (status, "" if status else f"{number}.png\n")


def test_an_error_cannot_steer_the_terminal(at: Path, capsys: Capture) -> None:
    assert cli.run(["generate", "a", "--model", "\x1b]0;title\x07\x1b[31mred"]) == 2
    assert "\x1b" not in (err := capsys.readouterr().err) and "red" in err


def test_a_terminal_without_the_letters_gets_their_numbers(at: Path) -> None:
    command = [sys.executable, "-m", "fewstep", "generate", "--model", "../tiny", "a äpfel", "--seed", "1"]
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "a-\\xe4pfel-1.png\n")


def test_a_reader_that_leaves_is_no_error_of_ours() -> None:
    command = f"{sys.executable} -m fewstep --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "")


def test_10000_words_are_refused(at: Path) -> None:
    assert_one_line(generate("word " * 10_000, "-o", "x.png"), "49999 characters; at most 10000")
    assert not list(at.iterdir())


def test_a_long_prompt_is_cut_with_one_line(at: Path) -> None:
    done = generate("word " * 1_000, "-o", "x.png")
    assert_one_line(done, "22 of 4000 tokens were kept", status=0)
    assert (at / "x.png").exists()


@pytest.mark.parametrize("output", ["y" * 300 + ".png", "q{seed:0999}.png", "q{seed.__class__}.png"])
def test_impossible_names_are_refused(at: Path, output: str) -> None:
    assert_one_line(generate("a", "-o", output), "")
    assert not list(at.iterdir())


def test_a_closed_standard_input_is_said(at: Path) -> None:
    command = f"exec {sys.executable} -m fewstep generate --model ../tiny - <&-"
    done = subprocess.run(["sh", "-c", command], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert_one_line(done, "standard input")


def test_a_sheet_is_named_once(at: Path) -> None:
    assert generate("a", "-n", "3", "--grid", "-o", "sheet.png").stdout == "sheet.png\n"


def test_emoji_are_read(at: Path) -> None:
    done = generate("🍎", "red apple", "--seed", "1", "-o", "{index}.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert (pixels(at / "1.png") == pixels(at / "2.png")).all()


def test_a_truncated_bundle(at: Path, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "cut").folder
    data = (folder / "transformer.onnx").read_bytes()
    (folder / "transformer.onnx").write_bytes(data[: len(data) // 2])
    assert_one_line(run("generate", "a", "--model", str(folder)), "transformer.onnx has")
    assert not list(at.iterdir())


def test_a_cut_input_picture(at: Path, tmp_path: Path) -> None:
    inside("a", "-o", str(tmp_path / "whole.png"))
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    assert_one_line(generate("a", "--image", str(tmp_path / "cut.png")), "cut.png is not")


def test_a_full_disk_leaves_no_partial_file(at: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    assert_one_line(generate("a", "-o", "x.png", preexec_fn=limit), "cannot write x.png: File too large")
    assert not list(at.iterdir())


def test_full_standard_output(at: Path) -> None:
    with open("/dev/full", "w") as full:
        draw = ["generate", "a", "--model", "../tiny", "-o", "x.png"]
        for arguments in (draw, ["show", "x.png"], ["--help"], ["--version"]):
            done = run(*arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
            assert_one_line(done, "cannot write to standard output: No space left on device")


def test_a_closed_pipe_ends_quietly(at: Path) -> None:
    with start_many() as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b"out/a-")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 2
    assert 0 < len(list((at / "out").iterdir())) < 20000
    assert not list((at / "out").glob(".*"))


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGINT, 130, b"fewstep: interrupted\n"), (signal.SIGTERM, 143, b"fewstep: terminated\n")],
)
def test_ctrl_c_and_sigterm_end_at_once_with_whole_pictures(
    at: Path, number: signal.Signals, status: int, said: bytes
) -> None:
    with start_many() as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (status, said)
    assert not list((at / "out").glob(".*"))
    made = list((at / "out").iterdir())
    assert 0 < len(made) < 20000
    for path in made:
        assert path.suffix == ".png"
        assert pixels(path).shape == (32, 32, 3)


def test_from_makes_the_same_file(at: Path) -> None:
    inside("a hat", "a dog", "-n", "4", "--seed", "7", "--steps", "2", "--style", "3D", "-o", "{index}.png")
    done = generate("a cat", "--image", "3.png", "--strength", "0.6", "-o", "cat.png")
    assert done.returncode == 0
    for name in ("1.png", "6.png", "cat.png"):
        done = run("generate", "--from", name, "-o", "again.png")
        assert (done.returncode, done.stderr) == (0, "")
        assert (at / "again.png").read_bytes() == (at / name).read_bytes()


def test_from_takes_changes(at: Path) -> None:
    inside("a dog", "--seed", "7", "-o", "dog.png")
    inside("a dog", "--seed", "8", "--steps", "2", "-o", "other.png")
    assert inside("--from", "dog.png", "--seed", "8", "--steps", "2", "-o", "changed.png") == 0
    assert (at / "changed.png").read_bytes() == (at / "other.png").read_bytes()


def test_from_tells_another_model(at: Path, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "other", shift=2.0).folder
    inside("a dog", "-o", "dog.png")
    done = run("generate", "--from", "dog.png", "--model", str(other), "-o", "again.png")
    assert done.returncode == 0
    assert "warning: the model is not the one" in done.stderr


@pytest.mark.parametrize("model", ["evil_family:tiny", "evil_package.family:tiny", "evil_family:../tiny"])
def test_from_imports_no_family_that_an_image_names(
    at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, model: str
) -> None:
    written = tmp_path / "imported"
    (tmp_path / "code/evil_package").mkdir(parents=True)
    for path in ("evil_family.py", "evil_package/__init__.py", "evil_package/family.py"):
        (tmp_path / "code" / path).write_text(f"open({str(written)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    (at / "tiny").mkdir()
    inside("a dog", "-o", "dog.png")
    image = open_image("dog.png")
    image.info["fewstep"] = json.dumps({**json.loads(image.info["fewstep"]), "model": model})
    fewstep.save(image, "evil.png")
    assert cli.run(["generate", "--from", "evil.png", "-o", "x.png"]) == 2
    assert f"say so with --model {model}" in capsys.readouterr().err
    assert not written.exists() and not (at / "x.png").exists()


def test_from_fetches_no_model_unasked(at: Path, capsys: Capture) -> None:
    inside("a dog", "-o", "dog.png")
    (at.parent / "tiny").unlink()
    assert cli.run(["generate", "--from", "dog.png"]) == 2
    assert "say so with --model ../tiny" in capsys.readouterr().err


def test_from_misses_its_input_picture(at: Path, capsys: Capture) -> None:
    inside("a dog", "-o", "dog.png")
    inside("a cat", "--image", "dog.png", "-o", "cat.png")
    inside("a bird", "-o", "dog.png")
    assert inside("--from", "cat.png") == 2
    assert "dog.png is gone or has changed" in capsys.readouterr().err


def test_show(at: Path, capsys: Capture) -> None:
    inside("a dog", "--seed", "7", "-o", "dog.png")
    capsys.readouterr()
    assert cli.run(["show", "dog.png"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("a dog\nSteps: 4, Sampler: Euler, CFG scale: 1, Seed: 7, Size: 32x32, Model hash")
    assert cli.run(["show", "--json", "dog.png"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["prompt"], facts["seed"], facts["model"]) == ("a dog", 7, "../tiny")


def test_show_of_other_pictures(at: Path, capsys: Capture) -> None:
    from PIL import PngImagePlugin

    Image.new("RGB", (8, 8)).save("plain.png")
    assert cli.run(["show", "plain.png"]) == 2
    assert "does not say how it was made" in capsys.readouterr().err
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "a dog\x1b[31m\nSteps: 20")
    Image.new("RGB", (8, 8)).save("other.png", pnginfo=chunks)
    assert cli.run(["show", "other.png"]) == 0
    assert capsys.readouterr().out == "a dog [31m\nSteps: 20\n"


def test_json_lines(at: Path) -> None:
    done = generate("a cat", "a dog", "-n", "2", "--seed", "5", "--json", "-o", "out/")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["prompt"], line["seed"]) for line in lines] == [
        ("a cat", 5), ("a cat", 6), ("a dog", 5), ("a dog", 6)
    ]  # fmt: skip
    for line in lines:
        assert set(line) == {"path", "prompt", "seed", "steps", "model", "seconds"}
        assert (at / line["path"]).is_file() and 0 < line["seconds"] < 60


def test_a_bar_on_the_terminal_leaves_standard_output_alone(at: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm"}
    with subprocess.Popen(
        [*COMMAND, "generate", "a", "--model", "../tiny", "-n", "4000", "-o", "out/"],
        stdout=subprocess.PIPE, stderr=theirs, env=environment,
    ) as process:  # fmt: skip
        os.close(theirs)
        assert process.stdout is not None
        shown = threading.Thread(target=drain, args=(ours, bar := bytearray()))
        shown.start()
        lines = process.stdout.read().splitlines()
        shown.join()
    assert process.returncode == 0
    assert len(lines) == 4000 and all((at / line.decode()).is_file() for line in lines)
    assert b"drawing" in bar


def drain(terminal: int, into: bytearray) -> None:
    """Read all that a program shows on a terminal, until it leaves."""
    try:
        while data := os.read(terminal, 4096):
            into += data
    except OSError:  # so Linux says that the other side is gone
        pass
    finally:
        os.close(terminal)


def test_grid_is_one_sheet(at: Path, capsys: Capture) -> None:
    assert inside("a cat", "a dog", "-n", "3", "--seed", "5", "--grid", "-o", "sheet.png") == 0
    assert [path.name for path in at.iterdir()] == ["sheet.png"]
    sheet = pixels(at / "sheet.png")
    assert sheet.shape == (2 * 36 + 4, 3 * 36 + 4, 3)
    inside("a dog", "--seed", "7", "-o", "dog.png")
    assert (sheet[40:72, 76:108] == pixels(at / "dog.png")).all()
    capsys.readouterr()
    assert cli.run(["show", "--json", "sheet.png"]) == 0
    assert [record["seed"] for record in json.loads(capsys.readouterr().out)["sheet"]] == [5, 6, 7, 5, 6, 7]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize(
    "asked",
    [
        ["a cat", "a dog", "-n", "3", "--seed", "5"],
        ["a cat", "a cat", "--seed", "5"],
        ["a cat", "--seed", "5"],
        ["a cat", "-n", "11", "--seed", "5", "--steps", "2", "--style", "flat"],
        ["a cat", "-n", "2", "--image", "start.png", "--strength", "0.5"],
    ],
    ids=["prompts and seeds", "a prompt twice", "one", "two batches", "from an image"],
)
def test_a_sheet_is_made_again(at: Path, asked: list[str], suffix: str) -> None:
    inside("a start", "-o", "start.png")
    assert inside(*asked, "--grid", "-o", f"sheet.{suffix}") == 0
    assert cli.run(["generate", "--from", f"sheet.{suffix}", "--grid", "-o", f"again.{suffix}"]) == 0
    assert (at / f"again.{suffix}").read_bytes() == (at / f"sheet.{suffix}").read_bytes()


def test_the_images_of_a_sheet_are_made_again_one_by_one(at: Path, capsys: Capture) -> None:
    inside("a cat", "a dog", "-n", "5", "--seed", "5", "--grid", "-o", "sheet.png")
    capsys.readouterr()
    assert cli.run(["generate", "--from", "sheet.png", "-o", "{index}.png"]) == 0
    assert capsys.readouterr().out.split() == [f"{index}.png" for index in range(1, 11)]
    sheet = pixels(at / "sheet.png")
    for index in range(10):
        row, column = divmod(index, 4)
        top, left = 4 + 36 * row, 4 + 36 * column
        assert (sheet[top : top + 32, left : left + 32] == pixels(at / f"{index + 1}.png")).all()


def test_options_change_what_they_name_of_a_sheet(at: Path) -> None:
    inside("a cat", "a dog", "-n", "2", "--seed", "5", "--grid", "-o", "sheet.png")
    for change, same in {
        ("--seed", "9"): ["a cat", "a dog", "-n", "2", "--seed", "9"],
        ("-n", "1"): ["a cat", "a dog", "--seed", "5"],
        ("a fish",): ["a fish", "-n", "2", "--seed", "5"],
        ("--steps", "2"): ["a cat", "a dog", "-n", "2", "--seed", "5", "--steps", "2"],
    }.items():
        assert inside("--from", "sheet.png", *change, "--grid", "-o", "changed.png") == 0
        assert inside(*same, "--grid", "-o", "expected.png") == 0
        assert (pixels(at / "changed.png") == pixels(at / "expected.png")).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{}, {"seed": 9}], "not made by one call"),
        ([{}, {"steps": 2}], "not made by one call"),
        ([{}, {"model": "other"}], "not made by one call"),
        ([{"batch": 10**9}], "batch must be"),
        ([{"batch": 10**30}], "batch must be"),
        ([{"seed": -1}], "seed must be"),
        ([{"steps": 10**30}], "steps must be"),
        ([{"model": "\x1b]0;title\x07\x1b[31mred/../x"}], "say so with --model"),
        ([{"prompt": "\x1b\x07"}], "prompt is empty"),
        ([], "lists no image"),
        ([{"size": [10**30] * 3}], "size"),
    ],
)
def test_a_stranger_s_sheet_is_one_line(
    at: Path, capsys: Capture, changes: list[dict[str, Any]], message: str
) -> None:
    inside("a cat", "--seed", "5", "-o", "cat.png")
    image = open_image("cat.png")
    facts = json.loads(image.info["fewstep"])
    fewstep.save(image, "x.png")
    image.info["fewstep"] = json.dumps({"sheet": [{**facts, **change} for change in changes]})
    fewstep.save(image, "sheet.webp")
    capsys.readouterr()
    assert cli.run(["generate", "--from", "sheet.webp", "-o", "out/"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fewstep: ") and err.count("\n") == 1 and message in err
    assert "\x1b" not in err and not (at / "out").exists()


def test_show_of_a_sheet(at: Path, capsys: Capture) -> None:
    inside("a cat", "a dog", "-n", "2", "--seed", "5", "--grid", "-o", "sheet.jpg")
    capsys.readouterr()
    assert cli.run(["show", "sheet.jpg"]) == 0
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert [block.splitlines()[:2] for block in blocks] == [
        ["image 1 of 4", "a cat"], ["image 2 of 4", "a cat"], ["image 3 of 4", "a dog"],
        ["image 4 of 4", "a dog"],
    ]  # fmt: skip
    assert [int(block.partition("Seed: ")[2].partition(",")[0]) for block in blocks] == [5, 6, 5, 6]


def test_a_sheet_that_is_too_large_is_refused_before_it_is_drawn(
    at: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.images.grid.SHEET_PIXELS", 75 * 75)
    monkeypatch.setattr("fewstep.cli.generate.draw", lambda *_: pytest.fail("drawn"))
    assert inside("a", "-n", "5", "--grid", "-o", "x.jpg") == 2
    assert "a sheet of 112 x 76 pixels is too large for .jpg" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "webp"])
def test_other_formats_keep_the_record(at: Path, capsys: Capture, suffix: str) -> None:
    assert inside("a cat: red, big", "--seed", "7", "-n", "2", "-o", f"x.{suffix}") == 0
    assert cli.run(["generate", "--from", f"x-2.{suffix}", "-o", f"again.{suffix}"]) == 0
    assert (at / f"again.{suffix}").read_bytes() == (at / f"x-2.{suffix}").read_bytes()
    inside("a cat: red, big", "--seed", "7", "-n", "2", "-o", "x.png")
    shown = []
    for path in (f"x-2.{suffix}", "x-2.png"):
        capsys.readouterr()
        assert cli.run(["show", path]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and shown[0].startswith("a cat: red, big\nSteps: 4")


def test_an_image_goes_to_standard_output(at: Path) -> None:
    done = generate("a cat", "--seed", "7", "-o", "-", text=False)
    assert (done.returncode, done.stderr) == (0, b"") and not list(at.iterdir())
    inside("a cat", "--seed", "7", "-o", "x.png")
    assert done.stdout == (at / "x.png").read_bytes()
    done = generate("-", "-n", "4", "--seed", "7", "--grid", "-o", "-", text=False, input=b"a cat\n")
    inside("a cat", "-n", "4", "--seed", "7", "--grid", "-o", "sheet.png")
    assert done.stdout == (at / "sheet.png").read_bytes()


def test_an_input_image_comes_from_standard_input(at: Path) -> None:
    inside("a dog", "--seed", "7", "-o", "dog.png")
    arguments = ("a cat", "--seed", "7", "--strength", "0.6")
    inside(*arguments, "--image", "dog.png", "-o", "file.png")
    data = (at / "dog.png").read_bytes()
    for value in (["--image", "-"], ["--image=-"]):
        done = generate(*arguments, *value, "-o", "stream.png", text=False, input=data)
        assert (done.returncode, done.stderr) == (0, b"")
        assert (pixels(at / "stream.png") == pixels(at / "file.png")).all()
        record = json.loads(open_info(at / "stream.png"))
        assert (record["image"], record["image_sha256"]) == ("", "")
    assert_one_line(generate("a", "--image", "-", input="text"), "standard input is not")
    assert_one_line(generate("-", "--image", "-", input="a"), "holds the prompts or the image")


def open_info(path: Path) -> str:
    with Image.open(path) as image:
        return image.info["fewstep"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--style", "-"], "unknown style '-'"),
        (["a", "--negative-prompt", "-"], "takes no negative"),
        (["a", "--steps", "-"], "--steps: '-' is not a whole number"),
        (["a", "--guidance", "-"], "--guidance: '-' is not a number"),
        (["a", "--backend", "-"], "there is no runtime engine -"),
        (["a", "--prompts", "-"], "cannot read the prompts in -: No such file"),
        (["--from", "-"], "there is no image -"),
        (["a", "--model", "-"], "there is no model '-'"),
    ],
)
def test_a_dash_is_a_value_of_other_options(
    at: Path, capsys: Capture, arguments: list[str], message: str
) -> None:
    assert cli.run(["generate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and message in err
    assert not list(at.iterdir())


def test_a_dash_is_a_negative_prompt(bundle: Path, at: Path, tmp_path: Path) -> None:
    guided = write_bundle(tmp_path / "guided", guidance=2.0).folder
    arguments = ("generate", "a", "--model", str(guided), "--seed", "1", "-o", "x.png")
    done = run(*arguments, "--negative-prompt", "-")
    assert_one_line(done, "a prompt is empty")
    assert run(*arguments, "--negative-prompt", "a - b").returncode == 0
    assert json.loads(open_info(at / "x.png"))["negative"] == "a - b"


@pytest.mark.filterwarnings("always")
def test_a_path_that_somebody_typed_is_no_stream(at: Path, capsys: Capture) -> None:
    assert inside("/dev/stdin", "--seed", "1", "-o", "x.png") == 0
    assert "/dev/stdin looks like a file" in capsys.readouterr().err
    assert json.loads(open_info(at / "x.png"))["prompt"] == "/dev/stdin"


@pytest.mark.filterwarnings("always")
def test_a_prompt_that_is_a_file_is_named(at: Path, capsys: Capture) -> None:
    (at / "notes").touch()
    (at / "apple").mkdir()
    for prompt in ("B.safetensors", "q3.png", "./notes", "notes", "no/where.TXT"):
        assert inside(prompt, "--seed", "1", "-o", "x.png") == 0
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"the prompt {prompt} looks like a file, and is drawn as text" in err
    for prompt in ("apple", "a red apple", "3.5 apples", "a/b", "an apple.", "é" * 300):
        assert inside(prompt, "--seed", "1", "-o", "x.png") == 0
        assert "looks like a file" not in capsys.readouterr().err


SIGNALLED = """
import os, signal, sys
class AtImport:
    def find_spec(self, name, *_):
        if name == sys.argv[-1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, AtImport())
from fewstep.cli.app import main
sys.argv = ["fewstep", "models"] + sys.argv[-1:]
main()
"""


@pytest.mark.parametrize(
    "module", ["fewstep.core.progress", "fewstep.core.types", "cyclopts", "fewstep.pipeline.loading"]
)
def test_a_signal_while_modules_are_imported_is_one_line(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, module],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert_one_line(done, "interrupted", 130)


def test_hardly_anything_is_imported_before_signals_are_heard() -> None:
    code = (
        "import sys; before = set(sys.modules); import fewstep.cli.app; print(*(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert {"fewstep", "fewstep.cli.app", "fewstep.core.signals"} <= set(done.stdout.split())
    assert not {"typing", "re", "threading", "fewstep.core.types", "dataclasses"} & set(done.stdout.split())


def test_a_pipe_or_device_takes_one_image(at: Path) -> None:
    whole = generate("a cat", "--seed", "7", "-o", "-", text=False).stdout
    for name in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
        done = generate("a cat", "--seed", "7", "-o", name, text=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, whole, b"")
    os.mkfifo(at / "pipe")
    with subprocess.Popen(["cat", "pipe"], stdout=subprocess.PIPE) as reader:
        assert generate("a cat", "--seed", "7", "-o", "pipe").stdout == "pipe\n"
        assert reader.communicate(timeout=20)[0] == whole
    assert [path.name for path in at.iterdir()] == ["pipe"]
    assert_one_line(generate("a", "-n", "2", "-o", "pipe"), "takes one image")
    assert_one_line(generate("a", "-n", "2", "-o", "/dev/stdout"), "takes one image")


def test_standard_output_that_takes_no_image_is_said(at: Path) -> None:
    with open("/dev/full", "w") as full:
        done = generate("a", "-o", "-", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert_one_line(done, "cannot write to standard output: No space left on device")
    command = f"exec {sys.executable} -m fewstep generate --model ../tiny a -o - >&-"
    done = subprocess.run(["sh", "-c", command], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert_one_line(done, "standard output is closed")
    command = f"{sys.executable} -m fewstep generate --model ../tiny a -o - | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stderr == "" and done.returncode in (0, 2)  # 0 where the pipe took all before its end
    assert not list(at.iterdir())


def on_terminal(*arguments: str) -> tuple[int, bytes, bytes]:
    """Exit status, and what a terminal shows of standard output and standard error."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=theirs, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as run:
        os.close(theirs)
        assert run.stderr is not None
        drain(ours, shown := bytearray())
        return run.wait(), bytes(shown), run.stderr.read()


def test_a_terminal_gets_no_image(at: Path) -> None:
    status, shown, errors = on_terminal("generate", "a", "--model", "../tiny", "-o", "-")
    assert (status, shown) == (2, b"") and b"a terminal, which shows no image" in errors


def test_no_sign_of_a_path_steers_the_terminal_and_a_pipe_gets_it_as_it_is(at: Path) -> None:
    path = b"\x1b[31m\xe9\n.png"
    status, shown, errors = on_terminal("generate", "a", "--model", "../tiny", "-o", os.fsdecode(path))
    assert (status, errors) == (0, b"") and b"\x1b" not in shown and shown.count(b"\n") == 1
    done = generate("a", "-o", os.fsdecode(path), text=False)
    assert (done.returncode, done.stdout) == (0, path + b"\n")
    assert os.listdir(os.fsencode(at)) == [path]


def test_prompts_from_standard_input_and_a_file(at: Path) -> None:
    (at / "list.txt").write_text("\ufeffa bird\n\n  a fish \n", encoding="utf-8")
    done = generate("a cat", "-", "--prompts", "list.txt", "--json", input="a dog\n\n🍎\n")
    assert [json.loads(line)["prompt"] for line in done.stdout.splitlines()] == [
        "a cat", "a dog", "🍎", "a bird", "a fish"
    ]  # fmt: skip
    assert_one_line(generate("-", input=""), "there is no prompt in standard input")
    (at / "list.txt").write_bytes(b"caf\xe9\n")
    assert_one_line(generate("--prompts", "list.txt"), "not UTF-8")


def test_only_the_named_file_is_overwritten(at: Path) -> None:
    inside("a cat", "--seed", "1", "-o", "x.png")
    first = (at / "x.png").read_bytes()
    inside("a cat", "--seed", "2", "-o", "x.png")
    assert (at / "x.png").read_bytes() != first
    for _ in range(2):
        inside("a cat", "-n", "2", "-o", "y.png")
    assert {path.name for path in at.glob("y*")} == {"y-1.png", "y-2.png", "y-1-2.png", "y-2-2.png"}


def test_models(capsys: Capture, monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    monkeypatch.setattr("fewstep.pipeline.resolve.SHIPPED", bundle.parent)
    assert cli.run(["models"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "size", "steps", "licence", "folder"]
    assert row.split() == ["tiny", "0.0", "MB", "4", "MIT", str(bundle)]
    assert cli.run(["models", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    size = sum(path.stat().st_size for path in bundle.iterdir())
    assert 0 < facts.pop("size") <= size
    assert facts == {"name": "tiny", "steps": 4, "license": "MIT", "folder": str(bundle)}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed(
    tmp_path: Path, shell: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(home := tmp_path / "home"))
    home.mkdir()
    script = tmp_path / "script"
    assert cli.run(["--install-completion", "--shell", shell, "-o", str(script)]) == 0
    assert capsys.readouterr() == (f"{script}\n", "") and not list(home.iterdir())
    text = script.read_text(encoding="utf-8")
    assert "sample-teacher" in text and "gradient-accumulation-steps" in text
    assert cli.run(["--install-completion", "--shell", shell]) == 0
    installed = Path(capsys.readouterr().out.rstrip("\n"))
    assert installed.is_relative_to(home) and installed.read_text(encoding="utf-8") == text


def test_an_unknown_shell_is_one_line(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from cyclopts.completion import detect

    def fail() -> str:
        raise detect.ShellDetectionError

    monkeypatch.setattr("cyclopts.completion.detect.detect_shell", fail)
    monkeypatch.setattr("cyclopts.completion.detect_shell", fail)
    assert cli.run(["--install-completion"]) == 2
    assert capsys.readouterr().err.startswith("fewstep: the shell is unknown: give --shell bash")


def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    assert cli.run(["--install-completion", "--shell", "bash", "-o", str(tmp_path / "script")]) == 0
    complete = '. ./script; COMP_WORDS=({}); COMP_CWORD={}; _fewstep; echo "${{COMPREPLY[@]}}"'
    for words, index, expected in (
        ("fewstep gen", 1, "generate"),
        ("fewstep generate --neg", 2, "--negative-prompt"),
        ("fewstep distill fl", 2, "flash"),
    ):
        command = ["bash", "-c", complete.format(words, index)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_help_shows_each_default_once(capsys: Capture) -> None:
    for command in HELPED:
        assert cli.run([*command.split(), "--help"]) == 0
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "--empty-" not in text and "default: ()" not in text and "default: False" not in text
        assert not re.search(r"\[default: [^]]*\]( \[choices: [^]]*\])? \[default", text)


def test_help_and_version_load_nothing_heavy() -> None:
    code = """
import sys
from fewstep.cli.app import run
for line in ("--help", "--version", "-V", "generate --help", "--install-completion --help"):
    assert run(line.split()) == 0
assert not {"numpy", "PIL", "onnxruntime", "torch"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, check=True)
    said = done.stdout.decode()
    assert "Generate images from text prompts." in said and fewstep.__version__ in said and "--steps" in said


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setitem(cli.COMMANDS, "train", ("fewstep.no_torch:train", "Train."))
    monkeypatch.setitem(sys.modules, "fewstep.no_torch", None)
    with pytest.raises(ImportError):  # a fault of ours is not dressed up
        cli.run(["train"])
    monkeypatch.setitem(cli.COMMANDS, "train", ("surely_not_installed.torch:train", "Train."))
    assert cli.run(["train"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fewstep: this needs surely_not_installed") and error.count("\n") == 1
    assert error.endswith(f"{install('train')}\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["generate", "a", "--quiet"], "there is no option --quiet: see fewstep generate --help"),
        (["models", "--quiet"], "there is no option --quiet: see fewstep models --help"),
        (["--quiet"], "there is no option --quiet: see fewstep --help"),
        (["generate", "a", "--widht=3"], "there is no option --widht: see fewstep generate --help"),
        (["generate", "a", "-q"], "there is no option -q: see fewstep generate --help"),
        (["generate", "a", "--outptu", "x"], "there is no option --outptu. Did you mean --output?"),
        (["train", "pocket-teacher", "--quiet"], "there is no option --quiet: see fewstep train pocket-"),
        (["generate", "a", "--no-grid"], "there is no option --no-grid: leave --grid out instead"),
        (["generate", "a", "--json=yes", "--grid=3"], "--grid takes no value: give --grid alone"),
        (["generate", "a", "--steps", "3", "--steps", "4"], "--steps is given more than once"),
        (["generate", "a", "--steps=abc"], "--steps: 'abc' is not a whole number"),
        (["generate", "a", "--guidance", "much"], "--guidance: 'much' is not a number"),
        (["generate", "a", "--seed", "--steps", "3"], "--seed requires an argument"),
        (["generate", "a", "--bits", "5"], "--bits: '5' is none of its values. Choose from 32, 16, 8, 4."),
        (["generate", "a", "--device", "cuba"], "Choose from auto, cpu, cuda. Did you"),
        (["export", "pocket"], "-o or --output is missing: see fewstep export --help"),
        (["quantize", "pocket"], "-o or --output is missing: see fewstep quantize --help"),
        (["evaluate", "pocket"], "-o or --output is missing: see fewstep evaluate --help"),
        (["show"], "IMAGE is missing: see fewstep show --help"),
        (["data", "folder"], "SOURCE is missing: see fewstep data folder --help"),
        (["generate", "a", "--" + "x" * 5000], "there is no option"),
        (["generate", "a", "--steps", "\x1b[31m" * 2000], "is not a whole number"),
    ],
)
def test_what_the_parser_refuses_is_said_well(arguments: list[str], line: str, capsys: Capture) -> None:
    assert cli.run(arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith(f"fewstep: {line}" if line[0] in "t-SP" else "fewstep: ")
    assert line in error and error.count("\n") == 1 and "\x1b" not in error


@pytest.mark.parametrize(
    ("words", "warned"),
    [
        (["a", "red", "apple"], True),
        (["red", "apple"], True),
        (["ein", "großer", "Apfel,", "3D"], True),
        (["apple"], False),
        (["a red apple", "pear"], False),
        (["🍎", "🍐"], False),
    ],
)
def test_words_without_quotes_are_asked_about(at: Path, words: list[str], warned: bool) -> None:
    done = generate(*words, "--seed", "1")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(words)
    line = f"warning: these are {len(words)} prompts of one word each; if one was meant, quote it:"
    assert (f'fewstep: {line} "{" ".join(words)}"\n' in done.stderr) == warned


def test_a_pipe_gets_a_path_as_it_is(at: Path, capsys: Capture) -> None:
    path = "a\x1b]0;title\x07\u202e\nb.png"
    assert inside("a cat", "--seed", "1", "-o", path) == 0
    out, error = capsys.readouterr()
    assert out == f"{path}\n" and error == "" and (at / path).is_file()  # standard output is no terminal
    assert inside("a cat", "--seed", "1", "--json", "-o", path) == 0
    out, _ = capsys.readouterr()
    assert json.loads(out)["path"] == path and not set("\x1b\x07\u202e") & set(out)


def test_what_no_model_takes_is_refused_before_one_is_loaded(
    at: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("fewstep.cli.generate.load", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr("fewstep.cli.generate.is_bundle", lambda model: False)
    (at / "broken.png").write_bytes(b"PNG")
    for more, line in (
        (["--steps", "0"], "steps must be a whole number from 1 to 100"),
        (["--seed", "-1"], "seed must be"),
        (["-n", "0"], "n must be"),
        (["--strength", "0.5"], "strength is for image-to-image"),
        (["--guidance", "nan"], "guidance must be a number"),
        (["--image", "none.png"], "there is no image none.png"),
        (["--image", "broken.png"], "is not an image"),
        ([""], "a prompt is empty"),
    ):
        assert cli.run(["generate", "a", "--model", "org/name", *more]) == 2
        error = capsys.readouterr().err
        assert line in error and error.count("\n") == 1


def test_what_a_torch_model_cannot_be_is_said_without_torch(at: Path) -> None:
    (at / "sd").mkdir()
    (at / "sd" / "model_index.json").write_text("{}")
    code = """
import sys
from fewstep.cli.app import run
status = run(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(status)
"""
    for more, line in (
        (["--memory", "lots"], "--memory must be a size such as 24GiB, not lots"),
        (["--student", "none"], "there is no student none"),
        (["--tiny-decoder", "none"], "there is no tiny-decoder none"),
    ):
        command = [sys.executable, "-c", code, "generate", "a", "--model", "sd", *more]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        assert_one_line(done, line)


def test_libraries_speak_of_numbers_alone(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(sys, "warnoptions", [])
    show = cli._our_warnings(lambda message, *_, **__: shown.append(str(message)))
    for category in (FutureWarning, UserWarning, DeprecationWarning, RuntimeWarning):
        show(category.__name__, category)
    assert shown == ["RuntimeWarning"] and capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    show("all", UserWarning)
    assert shown[-1] == "all"


@pytest.mark.parametrize(
    "words",
    [
        ["export", "x", "-o", "y", "--steps", "2.5"],
        ["bench", "--rounds", "2.5"],
        ["bench", "--batch-size", "1", "--batch-size", "2.5"],
        ["evaluate", "--seeds", "2.5", "-o", "y"],
        ["data", "stickers", "-o", "y", "--images", "2.5"],
        ["distill", "flash", "--steps", "2.5"],
        ["train", "pocket-vae", "--steps", "2.5"],
        ["sample-teacher", "--teacher", "x", "-o", "y", "--num-samples", "2.5"],
        ["estimate-memory", "--batch-size", "2.5"],
        ["ablate", "pocket", "--student-steps", "2.5"],
    ],
)
def test_no_command_rounds_a_whole_number(at: Path, capsys: Capture, words: list[str]) -> None:
    assert cli.run(words) == 2
    assert "'2.5' is not a whole number" in capsys.readouterr().err
    assert not (at / "y").exists()
