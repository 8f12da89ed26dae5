"""The documentation: it builds as a site, its links lead somewhere, and its sentences are short."""

from __future__ import annotations

import re
import shlex
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

from fewstep.cli.app import application

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
README = ROOT / "README.md"
LINKED = [README, ROOT / "CONTRIBUTING.md", ROOT / "gpu/README.md", *DOCS]
PROSE = [README, *DOCS]

MEDIAN_WORDS = 18
LONGEST_SENTENCE = 30
README_WORDS = 500
README_NUMBERS = 40

FENCE = re.compile(r"^( *)(```+|~~~+|:::+)[^\n]*\n.*?^\1\2[ \t]*$\n?", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(\s*<?([^)\s>]*)>?(?:\s+\"[^\"]*\")?\s*\)")
REFERENCE = re.compile(r"^ {0,3}\[[^\]]+\]:\s*<?(\S+?)>?\s*$", re.MULTILINE)
HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.+?)\s*#*\s*$", re.MULTILINE)
TARGET = re.compile(r"^\(([\w-]+)\)=\s*$", re.MULTILINE)
ITEM = re.compile(r"^\s*(?:[-*+]|\d+[.)])\s+")
SKIPPED = re.compile(r"^\s*(?:\||#{1,6}\s|:::|-{3,}\s*$|\([\w-]+\)=\s*$)")
INDENTED = re.compile(r"^(?: {4}|\t)")
SENTENCE_END = re.compile(r"(?<=[.!?])[)\]\"'*_”]*\s+(?=[\"'(\[*_“]*[A-Z0-9`])")
ABBREVIATION = re.compile(r"\b(e\.g|i\.e|cf|vs|Fig|Eq|Sec|et al)\.(?=\s)")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def without_code_blocks(text: str) -> str:
    return COMMENT.sub("", FENCE.sub("\n", text))


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs and list items outside code blocks, tables and headings, as plain text.

    A span of inline code counts as the one word ``Code``, a link as its text.
    """
    plain = REFERENCE.sub("", without_code_blocks(text))
    plain = LINK.sub(lambda match: "" if match[1] else match[2], CODE.sub("Code", plain))
    lines: list[str] = []
    in_list = False
    for line in [*plain.splitlines(), ""]:
        code = not lines and not in_list and INDENTED.match(line)
        ends = not line.strip() or SKIPPED.match(line) or code
        if (ends or ITEM.match(line)) and lines:
            yield " ".join(lines)
            lines = []
        if line.strip():
            in_list = bool(ITEM.match(line)) or (in_list and line.startswith(" "))
        if not ends:
            lines.append(ITEM.sub("", line).strip().removeprefix("> "))


def sentences(text: str) -> Iterator[str]:
    for paragraph in paragraphs(text):
        yield from SENTENCE_END.split(ABBREVIATION.sub(r"\1", paragraph))


def words(sentence: str) -> int:
    return sum(any(character.isalnum() for character in word) for word in sentence.split())


def anchors(path: Path) -> set[str]:
    """Anchors of a page: labels, and headings as GitHub and MyST name them."""
    text = without_code_blocks(text_of(path))
    found = set(TARGET.findall(text))
    seen: Counter[str] = Counter()
    for heading in HEADING.findall(text):
        title = LINK.sub(r"\2", heading).replace("`", "").strip().lower()
        slug = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def targets(path: Path) -> Iterator[str]:
    text = CODE.sub("", without_code_blocks(text_of(path)))
    yield from (match[3] for match in LINK.finditer(text))
    yield from REFERENCE.findall(text)


def broken(path: Path) -> Iterator[str]:
    """Relative links of a page that lead to no file, or to no heading of one."""
    for target in targets(path):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        place, _, anchor = target.partition("#")
        file = (path.parent / place).resolve() if place else path
        if not file.exists():
            yield f"{path.relative_to(ROOT)}: {target} leads to no file"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            yield f"{path.relative_to(ROOT)}: {target} leads to no heading"


def commands(path: Path) -> Iterator[list[str]]:
    """The arguments of every ``fewstep`` command in a page's shell blocks."""
    for block in re.findall(r"^```sh\n(.*?)^```$", text_of(path), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.wordchars += ":{},…%@$"
            for stop, group in groupby(lexer, lambda word: set(word) <= set(";|&")):
                words = list(group)
                starts = [i for i, word in enumerate(words) if re.fullmatch(r"(\S*/)?fewstep", word)]
                runs = [i for i in starts if i == 0 or words[i - 1] in ("-m", "do")]
                if runs and not stop:
                    # The command line itself takes a lone dash as a value. Its parser does not.
                    yield ["stdin" if word == "-" else word for word in words[runs[0] + 1 :]]


def test_sentences_are_found_where_prose_is() -> None:
    text = (
        "# A heading. Not prose.\n\nOne `a. B` two. `A` is three [four](five.md#six).\n\n"
        "| a | table. |\n|---|---|\n\n"
        "```sh\ncode. Code.\n```\n\n    indented code.\n\n- item one\n  goes on\n- item two, e.g. This\n"
    )
    assert list(sentences(text)) == [
        "One Code two.",
        "Code is three four.",
        "item one goes on",
        "item two, e.g This",
    ]
    assert [words(sentence) for sentence in sentences(text)] == [3, 4, 4, 4]


@pytest.mark.parametrize("path", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    assert not list(broken(path))


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_sentence_is_long(path: Path) -> None:
    long = [
        f"{path.relative_to(ROOT)}: {words(sentence)} words: {sentence}"
        for sentence in sentences(text_of(path))
        if words(sentence) > LONGEST_SENTENCE
    ]
    assert not long, "\n".join(long)


def test_sentences_are_short() -> None:
    counts = [words(sentence) for path in PROSE for sentence in sentences(text_of(path))]
    assert statistics.median(count for count in counts if count) <= MEDIAN_WORDS


def test_the_readme_is_short() -> None:
    text = LINK.sub(r"\2", REFERENCE.sub("", without_code_blocks(text_of(README))))
    assert words(text) <= README_WORDS
    assert len(re.findall(r"\d+", text)) <= README_NUMBERS


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_known(path: Path) -> None:
    for command in commands(path):
        if command[:1] == ["distill"] and "." in command[1]:  # a method of the reader's own
            command = ["distill", "trajectory", *command[2:]]
        application().parse_args(command, exit_on_error=False, print_error=False)


@pytest.mark.system
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
    command += ["-d", str(tmp_path / "doctrees"), str(ROOT / "docs"), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/index.html").is_file()
