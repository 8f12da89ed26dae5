"""Prompts longer than text encoders read: what is left out is said."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
import tiny_flux
from fewstep.core.prompt_text import PromptWarning
from fewstep.families import common, flux, sd3
from fewstep.families.base import Family
from fewstep.pipeline.pipeline import Pipeline
from fewstep.pocket.config import byte_tokenizer
from fewstep.train.text_cache import encode

LONG = "a red apple on a table " * 40
READ = tiny.LENGTH - 2
"""Tokens of a prompt between the marks of its beginning and its end."""


def family(kind: str) -> Family:
    if kind == "flux":
        return flux.assemble(tiny_flux.parts("dev"), name="f", side=8)
    return sd3.assemble(tiny.parts(with_t5=kind == "sd3"), name="s", guidance=2.0)


def said(model: Family, prompts: list[str]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.text(prompts)
    assert all(one.category is PromptWarning for one in caught)
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("kind", ["sd3", "sd3 without T5", "flux"])
def test_a_cut_prompt_is_named_once_with_its_tokens(kind: str) -> None:
    model = family(kind)
    tokens = len(byte_tokenizer(tiny.LENGTH)(LONG, add_special_tokens=False).input_ids)
    line = f"the prompt is too long: {READ} of {tokens} tokens were kept"
    assert said(model, [LONG, "a cat", LONG]) == [line]
    assert said(model, [LONG, LONG.replace("apple", "pear")])[0] == line
    assert len(said(model, [LONG, LONG.replace("apple", "pear")])) == 2


@pytest.mark.parametrize("many", [0, 1, READ - 1, READ])
def test_a_prompt_that_fits_is_not_named(many: int) -> None:
    assert said(family("sd3"), ["x" * many]) == []


def test_one_token_too_many_is_named() -> None:
    assert said(family("sd3"), ["x" * (READ + 1)])[0].startswith("the prompt is too long: ")


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_prompt_that_t5_reads_whole_is_not_called_cut(kind: str) -> None:
    model = family(kind)
    name = "tokenizer_3" if kind == "sd3" else "tokenizer_2"
    text: Any = model.text
    model = replace(model, text=replace(text, parts={**model.parts, name: byte_tokenizer(200)}))
    (line,) = said(model, ["x" * 100])
    assert line == f"CLIP reads the first {READ} of the prompt's 100 tokens, T5 all"
    (line,) = said(model, ["x" * 300])
    assert line == "the prompt is too long: 198 of 300 tokens were kept"


def test_a_negative_prompt_that_is_cut_is_named() -> None:
    pipe = Pipeline(family("sd3 without T5"))
    with pytest.warns(PromptWarning, match="^the negative prompt is too long: "):
        pipe("a cat", seed=1, steps=1, negative=LONG)
    with pytest.warns(PromptWarning, match="^the prompt is too long: "):
        pipe(LONG, seed=1, steps=1, negative="a cat")


def test_captions_are_counted_in_one_line(tmp_path: Path) -> None:
    model = family("sd3 without T5")
    captions = [f"{index} {LONG}" for index in range(5)] + ["a cat", "a dog"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encode(model.text, "mark", captions, tmp_path)
    (line,) = [str(one.message) for one in caught]
    assert line.startswith("5 of 7 captions are longer") and f"{READ} of" in line


def test_other_warnings_pass_through_the_count() -> None:
    with pytest.warns(RuntimeWarning, match="other"), common.cuts_counted(1, "captions"):
        warnings.warn("other", RuntimeWarning, stacklevel=1)
