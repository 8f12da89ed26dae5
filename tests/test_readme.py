"""What the README tells people to type works.

The quick commands run, in order, in an empty folder. The slow ones must exist: a make target, or a command
of ours that knows every option named.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICK = ("generate", "show", "models")
BUNDLE = ROOT / "src/fewstep/models/pocket/bundle.json"
PICTURE = "docs/pictures/demo.png"  # made by the software, once there are weights
# Until the first trained Pocket is committed there is nothing to generate with.
shipped = pytest.mark.skipif(not BUNDLE.is_file(), reason="the shipped bundle is absent, so nothing draws")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def lines() -> list[list[str]]:
    """Every command of the README's shell blocks, split into words."""
    commands = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in commands) if words]


def fewstep(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fewstep", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    return done


def quick(words: list[str]) -> bool:
    return words[0] == "fewstep" and words[1] in QUICK and "--model" not in words


@shipped
def test_the_quick_commands_make_what_they_say(tmp_path: Path) -> None:
    commands = [words for words in lines() if quick(words)]
    assert len(commands) >= 5
    for words in commands:
        fewstep(words[1:], tmp_path)
        if "-o" in words:
            with Image.open(tmp_path / words[words.index("-o") + 1]) as picture:
                picture.load()
                assert picture.getextrema() != ((0, 0),) * 3
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "apple.png").read_bytes()


@shipped
@pytest.mark.parametrize("code", blocks("python"))
def test_the_python_runs(code: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir())


def test_the_slow_commands_exist(tmp_path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    slow = [words for words in lines() if not quick(words)]
    assert slow
    for words in slow:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), f"make {words[1]} is no target"
            continue
        if words[0].startswith("gpu/"):
            assert os.access(ROOT / words[0], os.X_OK), f"{words[0]} is no script"
            continue
        assert words[0] == "fewstep", f"the README runs {words[0]}"
        named = [*(bool(re.fullmatch(r"[a-z][a-z-]*", word)) for word in words), False]
        commands = words[1 : named.index(False)]
        said = fewstep([*commands, "--help"], tmp_path).stdout
        missing = [word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word) and word not in said]
        assert not missing, f"fewstep {' '.join(commands)} knows no {missing}"


def test_ci_runs_the_command_of_the_readme() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert script[-1] == "make test"
    assert ["make", "test"] in lines()


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+?)\)", README)
    local = [target for target in targets if "://" not in target]
    assert local
    missing = [target for target in local if not (ROOT / target).exists()]
    assert not missing or (missing == [PICTURE] and not BUNDLE.is_file())
