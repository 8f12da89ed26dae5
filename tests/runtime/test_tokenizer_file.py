"""What makes the tokenizers library panic, abort or search for ever does not come to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fewstep.runtime.tokenizer_file import check, guarded
from fewstep.runtime.tokens import Tokens
from fewstep.source import SHIPPED
from fewstep.types import UserError
from tiny_bundle import LENGTH, write_bundle


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_bundle(tmp_path)
    return tmp_path / "tokenizer.json"


def edit(path: Path, *keys: str, value: Any) -> None:
    told = within = json.loads(path.read_text())
    for key in keys[:-1]:
        within = within[key]
    within[keys[-1]] = value
    path.write_text(json.dumps(told))


SPLIT = {"type": "Split", "behavior": "Removed", "invert": False}
PROMPT, START = (
    {"Sequence": {"id": "A", "type_id": 0}},
    {"SpecialToken": {"id": "<|startoftext|>", "type_id": 0}},
)
WRONG: dict[str, tuple[tuple[str, ...], Any]] = {
    "padding for ever": (("padding", "strategy"), {"Fixed": 2**60}),
    "padding to a multiple": (("padding", "pad_to_multiple_of"), 2**31),
    "padding with a negative number": (("padding", "pad_id"), -1),
    "a stride as long as what is kept": (("truncation", "stride"), LENGTH),
    "endless truncation": (("truncation", "max_length"), 2**53),
    "a number of a word that is too large": (("model", "vocab"), {"a": 2**40}),
    "no words": (("model", "vocab"), None),
    "a template with an unknown token": (("post_processor", "special_tokens"), {}),
    "a template with the prompt twice": (("post_processor", "single"), [PROMPT, START, PROMPT]),
    "a template without the prompt": (("post_processor", "single"), [START]),
    "a pattern of groups in groups": (("pre_tokenizer",), {**SPLIT, "pattern": {"Regex": "(a+)+b"}}),
    "a long pattern": (("pre_tokenizer",), {**SPLIT, "pattern": {"Regex": r"\\p{L}+" * 500}}),
    "text that grows": (
        ("normalizer",),
        {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40,
        },
    ),
    "too many normalizers": (("normalizer",), {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 1000}),
    "an added token of no letters": (("added_tokens",), [{"id": 1, "content": ""}]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_the_library_cannot_take_is_one_line(path: Path, wrong: str) -> None:
    keys, value = WRONG[wrong]
    edit(path, *keys, value=value)
    with pytest.raises(UserError, match=r"tokenizer\.json") as caught:
        Tokens(path, LENGTH)
    assert "\n" not in str(caught.value)


def test_what_is_no_tokenizer_is_one_line(path: Path) -> None:
    for text in (
        "",
        "{}",
        "[]",
        '{"model": {"vocab": {}}}',
        "[" * 10**5,
        '{"model": {"vocab": {}, "merges": ["a b"]}}',
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            Tokens(path, LENGTH)(["a cat"])


def test_ours_are_taken(path: Path) -> None:
    for each in (path, SHIPPED / "pocket" / "tokenizer.json"):
        assert check(each) == each.read_bytes()


def test_a_panic_is_one_line_and_a_stop_is_a_stop() -> None:
    class PanicException(BaseException):
        pass

    def raises(error: BaseException) -> None:
        raise error

    with pytest.raises(UserError, match="x cannot be loaded as a tokenizer: attempt to subtract"):
        guarded(raises, PanicException("attempt to subtract\nwith overflow"), where="x")
    with pytest.raises(KeyboardInterrupt):
        guarded(raises, KeyboardInterrupt(), where="x")
