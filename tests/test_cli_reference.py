"""The reference of the command line is what its tool writes, and documents name commands that it has."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs/reference/cli.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTION = re.compile(r"--?[a-z][a-z0-9-]*")
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def sections() -> dict[str, str]:
    """Commands such as ``distill flash``, each with its part of the reference."""
    parts = re.split(r"^##+ fewstep ?(.*)$", REFERENCE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def commands(text: str) -> Iterator[list[str]]:
    """Commands in shell blocks and in inline code, as words after ``fewstep``."""
    lines = "\n".join(SHELL.findall(text)).replace("\\\n", " ").splitlines()
    spans = re.findall(r"`(fewstep [^`\n]+)`", BLOCK.sub("", text))
    for line in (*lines, *spans):
        for command in re.split(r";|&&|\|", line):
            try:
                words = shlex.split(command, comments=True)
            except ValueError:  # an apostrophe in a comment of another line
                continue
            if "fewstep" in words:
                yield words[words.index("fewstep") + 1 :]


def unknown(words: list[str], known: dict[str, str]) -> list[str]:
    """The command, where there is none of this name, or its options that the reference lacks."""
    if not words or words[0].startswith("-"):
        return []
    names = [" ".join(words[:count]) for count in (2, 1)]
    name = next((name for name in names if name in known), None)
    if name is None:
        return [words[0]]
    there = set(OPTION.findall(known[name]))
    return [word for word in words if OPTION.fullmatch(word) and word not in there and word != "--help"]


def test_the_reference_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / "tools/cli_reference.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert REFERENCE.read_text(encoding="utf-8") == tool.page(), "run: python tools/cli_reference.py"
    assert {"generate", "distill flash", "bench"} <= sections().keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_documents_name_commands_that_there_are(page: Path) -> None:
    known = sections()
    found = list(commands(page.read_text(encoding="utf-8")))
    assert not [(words, odd) for words in found if (odd := unknown(words, known))]


def test_an_unknown_command_or_option_is_found() -> None:
    known = {"generate": "* `--steps INT`", "distill": "", "distill flash": "* `--lora INT`"}
    text = "`fewstep plan` and `fewstep generate --step 2`\n```sh\nfewstep distill flash --lora 4  # --a\n"
    text += "```\n"
    assert [unknown(words, known) for words in commands(text)] == [[], ["plan"], ["--step"]]


def test_scripts_that_documents_run_are_there() -> None:
    blocks = [block for page in PAGES for block in SHELL.findall(page.read_text(encoding="utf-8"))]
    found = {script for block in blocks for script in re.findall(r"^gpu/[\w.]+", block, re.MULTILINE)}
    assert found
    assert not [script for script in found if not os.access(ROOT / script, os.X_OK)]
