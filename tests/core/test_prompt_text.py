"""Prompts and captions: the same text on both sides, read in the encodings that people save."""

from __future__ import annotations

import codecs
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.core.prompt_text import PromptWarning, clean, decode_caption, syntax, unknown_words
from fewstep.core.types import UserError
from fewstep.pipeline.params import check
from fewstep.runtime.tokenizer import normalize_text
from tiny_bundle import write_bundle


@pytest.mark.parametrize(
    ("typed", "plain"),
    [
        ("\ufeffa “red” apple", 'a "red" apple'),
        ("‘a’ ‚b’ „c“ «d» e′ f´s", "'a' 'b' \"c\" \"d\" e' f's"),
        ("a – b — c ‐ d − e…", "a - b - c - d - e..."),
        ("a\tb\r\nc\u2028d\u00a0e\u3000f\x85g\x00h\x1bi", "a b c d e f g h i"),
        ("re\u0301d", "réd"),
        ("soft\u00adly zero\u200bwidth \u202eleft\u202c", "softly zerowidth left"),
        ("ａ　ｃａｔ！", "a cat!"),
        ("苹果 и яблоко", "苹果 и яблоко"),
        ("👩\u200d🚀 ❤\ufe0f", "👩\u200d🚀 ❤\ufe0f"),
        ("  a cat  ", "a cat"),
        ("", ""),
    ],
)
def test_text_is_cleaned(typed: str, plain: str) -> None:
    assert clean(typed) == plain


@settings(derandomize=True, max_examples=300)
@given(st.text())
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    line = clean(text)
    assert clean(line) == line
    assert "\n" not in line and not any(ord(sign) < 32 for sign in line)


@settings(derandomize=True)
@given(st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1)).map(" ".join))
def test_plain_ascii_stays(line: str) -> None:
    assert clean(line) == line


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_caption_is_read_in_every_encoding_that_says_so(encoding: str) -> None:
    assert decode_caption("a “red” café 🍎\n".encode(encoding), "a.txt") == 'a "red" café 🍎'
    big = codecs.BOM_UTF16_BE + "a cat".encode("utf-16-be")
    assert decode_caption(big, "a.txt") == "a cat"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "cp1252"])
def test_another_encoding_is_one_line_that_names_the_file(encoding: str) -> None:
    with pytest.raises(UserError, match=r"^a\.txt is not UTF-8 text: save it as UTF-8$"):
        decode_caption("a café".encode(encoding), "a.txt")


@pytest.mark.parametrize("typed", ["\ufeffa “red” apple", "a\tcat’s hat", "ａ cat"])
def test_a_prompt_is_read_as_the_same_caption_is(
    typed: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import fewstep

    bundle = write_bundle(tmp_path_factory.mktemp("text"))
    model = fewstep.load(bundle.folder).model
    [(prompt, _)] = check(model, (), typed, seed=0).jobs
    assert prompt == decode_caption(typed.encode(), "a.txt") == normalize_text(typed)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a (red:1.5) apple", ["(red:1.5)"]),
        ("(red, big:.8) <lora:x:1> [cat:dog:0.5]", ["(red, big:.8)", "<lora:x:1>", "[cat:dog:0.5]"]),
        ("((masterpiece)), a cat BREAK a dog", ["((masterpiece))", "BREAK"]),
        ("<lyco:a:0.5> <hypernet:b:1>", ["<lyco:a:0.5>", "<hypernet:b:1>"]),
        ("a clock (10:30), 3 < 4, f(x), a break, (small)", []),
    ],
)
def test_commands_of_other_programs_are_told_to_be_text(prompt: str, parts: list[str]) -> None:
    assert syntax(prompt) == parts


def test_a_request_warns_of_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    import fewstep

    model = fewstep.load(write_bundle(tmp_path_factory.mktemp("text")).folder).model
    with pytest.warns(PromptWarning, match=r"^\(red:1\.5\), <lora:x:1>: read as text"):
        check(model, (), "a (red:1.5) <lora:x:1> apple", seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(model, (), "a red apple (ripe)", seed=0)


def test_unknown_words_are_those_that_break_up() -> None:
    tokens = {"a": 1, "red": 1, "apple": 1, "sakura": 4, "doggo": 2, "pls": 2, "größe": 3}
    for text, words in (
        ("a red apple", []),
        ("a red sakura", ["sakura"]),
        ("doggo pls", ["doggo", "pls"]),
        ("a red apple doggo", []),
        ("a größe", ["größe"]),
        ("apple's doggo's", []),
    ):
        assert unknown_words(text, tokens.__getitem__) == words
