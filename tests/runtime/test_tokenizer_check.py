"""What makes the tokenizers library panic, abort or search for ever does not come to it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from fewstep.core.types import UserError
from fewstep.pipeline.resolve import SHIPPED
from fewstep.runtime.tokenizer import Tokens
from fewstep.runtime.tokenizer_check import OTHER_GROWTH, UNICODE_GROWTH, check, guarded
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


def replacing(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


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
    "text before text": (("normalizer",), {"type": "Prepend", "prepend": "x" * 10**5}),
    "some text before text, often": (("normalizer",), sequence(*[{"type": "Prepend", "prepend": "xxx"}] * 4)),
    "text for nothing": (("normalizer",), replacing("", "a" * 100)),
    "text for what may be nothing": (("normalizer",), replacing("a*", "a" * 100, "Regex")),
    "text that grows in turns": (
        ("normalizer",),
        sequence(*[replacing("\u0627", "\ufdfa"), {"type": "NFKD"}] * 3),
    ),
    "a part without a type": (
        ("normalizer",),
        sequence(*[{"pattern": {"String": "a"}, "content": "aa"}] * 40),
    ),
    "a table with a long text": (
        ("normalizer",),
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(4) + b"x" * 9999).decode()},
    ),
    "a table that is none": (("normalizer",), {"type": "Precompiled", "precompiled_charsmap": "\u00e9"}),
    "text that grows, and a table of nothing": (
        ("normalizer",),
        sequence({"type": "Precompiled", "precompiled_charsmap": ""}, replacing("a", "a" * 100)),
    ),
    "bytes of bytes": (
        ("pre_tokenizer",),
        {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": True}] * 20},
    ),
    "a template of many tokens": (("post_processor", "single"), [*[START] * 5000, PROMPT]),
    "a long token for padding": (("padding", "pad_token"), "x" * 10**5),
    "a long token for unknown words": (("model", "unk_token"), "x" * 10**5),
    "a long end of words": (("model", "end_of_word_suffix"), "x" * 10**5),
    "a long added token": (("added_tokens",), [{"id": 1, "content": "x" * 10**5}]),
    "a long text of a decoder": (("decoder",), {"type": "BPEDecoder", "suffix": "x" * 10**5}),
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


T5 = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(4) + b"a" * 18).decode()}
USUAL: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "CLIP": (
        sequence({"type": "NFC"}, replacing(r"\s+", " ", "Regex"), {"type": "Lowercase"}),
        {"type": "ByteLevel"},
    ),
    "T5": (sequence(T5, replacing(" {2,}", "\u2581", "Regex")), {"type": "Metaspace"}),
    "BERT": ({"type": "BertNormalizer"}, {"type": "BertPreTokenizer"}),
    "Llama": (
        sequence({"type": "Prepend", "prepend": "\u2581"}, replacing(" ", "\u2581")),
        {"type": "Split"},
    ),
    "Gemma": (replacing(" ", "\u2581"), {"type": "Split", "pattern": {"String": " "}}),
}


@pytest.mark.parametrize("family", USUAL)
def test_what_text_encoders_have_is_taken(path: Path, family: str) -> None:
    for key, value in zip(("normalizer", "pre_tokenizer"), USUAL[family], strict=True):
        edit(path, key, value=value)
    check(path)


@pytest.mark.parametrize("sign", ["a", "\ufdfa", "\u0390", "\u0130", "\U0001d160", "\u4e00"])
def test_growth_is_no_more_than_is_reckoned(sign: str) -> None:
    for kind, most in (UNICODE_GROWTH | OTHER_GROWTH).items():
        if (make := getattr(normalizers, kind, None)) is not None:
            assert len(make().normalize_str(sign * 10)) <= 10 * most, kind


def test_a_panic_is_one_line_and_a_stop_is_a_stop() -> None:
    class PanicException(BaseException):
        pass

    def raises(error: BaseException) -> None:
        raise error

    with pytest.raises(UserError, match="x cannot be loaded as a tokenizer: attempt to subtract"):
        guarded(raises, PanicException("attempt to subtract\nwith overflow"), where="x")
    with pytest.raises(KeyboardInterrupt):
        guarded(raises, KeyboardInterrupt(), where="x")
