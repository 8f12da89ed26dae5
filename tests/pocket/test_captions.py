"""Captions: many phrasings, true to the picture, and reproducible."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.pocket import captions
from fewstep.pocket.captions import COLOURS, STYLE_WORDS, Background
from fewstep.pocket.concepts import Concept, held_out, normalize_code

APPLE = Concept("red apple", ("ripe",), ("fruit", "ripe"), "1f34e", "food-fruit", ("3d", "flat"))


def lines(many: int = 400) -> list[str]:
    rng = np.random.Generator(np.random.Philox(key=1))
    return [captions.sticker_caption(APPLE, "3d", Background("pale blue"), rng) for _ in range(many)]


def test_captions_name_the_thing_and_vary() -> None:
    said = lines()
    assert len(set(said)) > 300
    named = [s for s in said if "apple" in s.lower() or "ripe" in s.lower()]
    assert len(named) > 0.93 * len(said)  # the rest are typing slips
    assert sum("pale blue" in s.lower() for s in said) > 0.9 * len(said)
    assert 0.7 < sum("3d" in s.lower() for s in said) / len(said) < 0.95


def test_captions_are_reproducible() -> None:
    assert lines(50) == lines(50)


@pytest.mark.parametrize(
    ("one", "many"),
    [("cat", "cats"), ("police box", "police boxes"), ("fairy", "fairies"), ("key", "keys")],
)
def test_plurals(one: str, many: str) -> None:
    assert captions.plural(one) == many


def test_plain_prompts_carry_the_first_style_word() -> None:
    assert captions.plain_prompt(APPLE, "3d") == "red apple, 3D style"
    assert set(STYLE_WORDS) == {"3d", "flat", "noto", "twemoji"}


def test_colours_are_apart() -> None:
    values = np.array(list(COLOURS.values()), float)
    distance = np.linalg.norm(values[:, None] - values[None], axis=-1) + 1e9 * np.eye(len(values))
    assert distance.min() > 12


def test_codes_and_the_split_are_stable() -> None:
    assert normalize_code("2764-FE0F-200D-1F525") == "2764-200d-1f525"
    share = np.mean([held_out(f"thing {i}", "3d") for i in range(4000)])
    assert abs(share - 0.2) < 0.02
