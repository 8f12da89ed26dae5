from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from fewstep.core.prompt_text import PromptWarning, negative_prompt
from fewstep.core.types import UserError
from fewstep.runtime.tokenizer import Tokens, normalize_text
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
        assert normalize_text(prompt) == spelled


def test_other_scripts_are_left_out_with_a_warning() -> None:
    with pytest.warns(PromptWarning, match="English only: '苹果'"):
        assert normalize_text("a 苹果 apple") == "a apple"


@pytest.mark.parametrize("prompt", ["一个红苹果", "красное яблоко", "苹果, 苹果!"])
def test_nothing_left_is_an_error(prompt: str) -> None:
    with pytest.raises(UserError, match="English only"):
        normalize_text(prompt)


def test_a_tokenizer_of_another_length_is_refused(tokens: Tokens, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    with pytest.raises(UserError, match=f"gives {LENGTH} tokens a prompt, not 99"):
        Tokens(bundle.path("tokenizer.json"), 99)(["a"])


POCKET = Path(__file__).parents[2] / "models/pocket-teacher/tokenizer/tokenizer.json"
FOREIGN = """rote Äpfel auf dem Tisch
ein kleiner Hund mit blauem Hut
drei gelbe Bananen
der Mond über dem Meer
ein fliegendes Einhorn
une pomme rouge sur la table
un petit chien avec un chapeau bleu
un gâteau avec des bougies
una manzana roja sobre la mesa
un perro pequeño con sombrero azul
un pez rojo
una mela rossa sul tavolo""".splitlines()


def _unsure(tokens: Tokens, prompts: list[str]) -> list[str]:
    """Those of the prompts that hold words which the tokenizer may not know, as it says."""
    found: list[str] = []
    for prompt in prompts:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            tokens([prompt])
        if any("may not know these words" in str(each.message) for each in said):
            found.append(prompt)
    return found


def test_words_of_other_languages_are_told_and_english_ones_hardly_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fewstep.runtime.tokenizer.MOST_WARNINGS", 1000)
    prompts, tokens = Path(__file__).parents[2] / "src/fewstep/pocket/prompts", Tokens(POCKET, 32)
    assert _unsure(tokens, FOREIGN) == FOREIGN
    assert _unsure(tokens, (prompts / "examples.txt").read_text().splitlines()) == []
    lines = [line.partition("\t")[0] for line in (prompts / "human_written.tsv").read_text().splitlines()]
    assert len(_unsure(tokens, lines)) <= 0.04 * len(lines)


def test_the_words_are_named() -> None:
    with pytest.warns(PromptWarning, match="may not know these words: rote, Äpfel, auf, dem, Tisch "):
        Tokens(POCKET, 32)(["rote Äpfel auf dem Tisch"])


def test_of_many_prompts_the_first_are_told() -> None:
    tokens = Tokens(POCKET, 32)
    assert _unsure(tokens, FOREIGN) == FOREIGN[:5]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Tokens(POCKET, 32)(FOREIGN)
    assert len(said) == 5 and "; such words in further prompts are not named" in str(said[-1].message)


def test_a_tokenizer_of_bytes_says_nothing_of_words(tokens: Tokens) -> None:
    assert _unsure(tokens, FOREIGN[:2]) == []


def test_a_negative_prompt_is_called_so() -> None:
    with negative_prompt("苹果"):
        with pytest.raises(UserError, match="the negative prompt has none"):
            normalize_text("苹果")
        with pytest.raises(UserError, match="the prompt has none"):
            normalize_text("梨")
    with pytest.warns(PromptWarning, match="left out of the negative prompt"), negative_prompt("a 苹果"):
        normalize_text("a 苹果")
