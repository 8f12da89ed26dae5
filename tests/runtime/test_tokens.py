from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from fewstep.runtime.tokens import PromptWarning, Tokens, spell
from fewstep.types import UserError
from tiny_bundle import LENGTH, write_bundle


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    bundle = write_bundle(tmp_path_factory.mktemp("tokens"))
    return Tokens(bundle.path("tokenizer.json"), bundle.length)


def test_short_prompts_are_padded(tokens: Tokens) -> None:
    rows = tokens(["a cat", ""])
    assert rows.shape == (2, LENGTH) and rows.dtype == np.int64
    assert list(rows[1]) == [0] + [1] * (LENGTH - 1)
    assert rows[0, 0] == 0 and rows[0, -1] == 1 and len(set(rows[0])) > 3


def test_long_prompts_are_cut_with_a_count(tokens: Tokens) -> None:
    with pytest.warns(PromptWarning, match=f"{LENGTH - 2} of 10000 tokens were kept"):
        rows = tokens(["a " * 10_000])
    assert rows.shape == (1, LENGTH)


@pytest.mark.parametrize(
    ("prompt", "spelled"),
    [
        ("a red apple", "a red apple"),
        ("🍎, 3D style", "red apple , 3D style"),
        ("a 👍🏽 for ❤️", "a thumbs up sign for heavy black heart"),
        ("“a cat’s café”", '"a cat\'s café"'),
        ("ａ ① cat", "a 1 cat"),
    ],
)
def test_signs_are_spelled(prompt: str, spelled: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert spell(prompt) == spelled


def test_other_scripts_are_left_out_with_a_warning() -> None:
    with pytest.warns(PromptWarning, match="English only: '苹果'"):
        assert spell("a 苹果 apple") == "a apple"


@pytest.mark.parametrize("prompt", ["一个红苹果", "красное яблоко", "苹果, 苹果!"])
def test_nothing_left_is_an_error(prompt: str) -> None:
    with pytest.raises(UserError, match="English only"):
        spell(prompt)


def test_a_tokenizer_of_another_length_is_refused(tokens: Tokens, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    with pytest.raises(UserError, match=f"gives {LENGTH} tokens a prompt, not 99"):
        Tokens(bundle.path("tokenizer.json"), 99)(["a"])
