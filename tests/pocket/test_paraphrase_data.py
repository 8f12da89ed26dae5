"""People's own words: what is said keeps what is meant."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np

from fewstep.pocket.captions import COLOURS, STYLE_WORDS
from fewstep.pocket.concepts import Concept, held_out
from fewstep.pocket.paraphrase_data import (
    Paraphrase,
    ParaphraseSampler,
    alternative_names,
    default_style,
    random_word_pairs,
    split_captions,
)

STYLES = ("3d", "flat", "noto", "twemoji")
KNOWN = [
    Concept(name, (synonym,), ("animal",), code, "animal", STYLES)
    for name, synonym, code in (("dog", "puppy", "1"), ("cat", "pussy", "2"), ("owl", "night bird", "3"))
]
PHRASES = ParaphraseSampler(KNOWN, [["puppy", "doggo"], ["kitty"], []], [[], ["soft purr"], []], ["zzyx"], [])


def test_what_is_meant_is_a_plain_prompt_of_what_is_said() -> None:
    rng = np.random.default_rng(0)
    drawn = [PHRASES.draw(rng) for _ in range(400)]
    plain = {f"{c.name}, {words[0]}" for c in KNOWN for words in STYLE_WORDS.values()}
    for phrase in drawn:
        meant, _, ground = phrase.plain_prompt.partition(" on a ")
        assert meant in plain
        assert not ground or ground.removesuffix(" background") in COLOURS
    assert len({phrase.prompt for phrase in drawn}) > 300
    assert any("doggo" in phrase.prompt and phrase.plain_prompt.startswith("dog, ") for phrase in drawn)
    assert any("soft purr" in phrase.prompt and phrase.plain_prompt.startswith("cat, ") for phrase in drawn)
    assert any("zzyx" in phrase.prompt for phrase in drawn)


def test_a_style_that_is_named_is_meant_and_else_the_usual_one() -> None:
    rng = np.random.default_rng(1)
    hints = {"3d": "3d", "flat": "flat", "noto": "noto", "twemoji": "tw"}
    right = 0
    for phrase in (PHRASES.draw(rng) for _ in range(300)):
        name, _, rest = phrase.plain_prompt.partition(", ")
        style = next(s for s, words in STYLE_WORDS.items() if rest.startswith(words[0]))
        concept = next(c for c in KNOWN if c.name == name)
        right += hints[style] in phrase.prompt.lower() or style == default_style(concept)
    assert right >= 295  # a typing slip may hit the style


def test_the_usual_style_is_one_that_training_has_seen() -> None:
    many = [Concept(f"thing {i}", (), (), str(i), "g", STYLES) for i in range(200)]
    some = [c for c in many if not all(held_out(c.name, style) for style in STYLES)]
    assert len(some) > 150 and all(not held_out(c.name, default_style(c)) for c in some)
    assert {default_style(c) for c in many} > {"3d"}


def test_words_near_a_name_are_names_and_others_are_not() -> None:
    def at(angle: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        return np.array([np.cos(angle), np.sin(angle)], np.float32)

    vectors = {
        "dog": at(0),
        "puppy": at(0.2),
        "cat": at(2),
        "pussy": at(2.2),
        "owl": at(4),
        "night bird": at(4),
    }
    vectors |= {"hound": at(0.1), "feline": at(1.9), "tax": at(5.2), "Dog": at(0)}
    found = alternative_names(KNOWN, vectors, ["hound", "feline", "tax", "puppy"])
    assert found == [["puppy", "hound"], ["pussy", "feline"], ["night bird"]]


def test_pairs_are_of_a_concepts_tag_and_another_word_each_once() -> None:
    found = random_word_pairs(KNOWN, ["zzyx"], 200, np.random.default_rng(0))
    assert len(found) == len(set(found)) > 3
    tags = {"animal", "dog", "cat", "owl"}
    assert all(len(p.split()) == 2 and tags & set(p.split()) and len(set(p.split())) == 2 for p in found)
    assert {"zzyx animal", "zzyx dog", "dog zzyx"} <= set(found)


def test_a_caption_of_one_thing_that_names_no_style_means_the_usual_one(tmp_path: Path) -> None:
    dog = {"concept": "dog", "style": "noto"}
    truths = [
        {"prompt": "a puppy on red", "objects": [dog], "ground": "red"},
        {"prompt": "a puppy", "objects": [dog], "ground": "plain white"},
        {"prompt": "Noto puppy", "objects": [dog], "ground": "plain white"},
        {"prompt": "two dogs", "objects": [dog, dog], "ground": "plain white"},
    ]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for row, truth in enumerate(truths):
            data = json.dumps(truth).encode()
            entry = tarfile.TarInfo(f"{row}.json")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    told, several, bare = split_captions([tmp_path / "0.tar"], KNOWN)
    assert (told, several) == (["Noto puppy"], ["two dogs"])
    plain = f"dog, {STYLE_WORDS[default_style(KNOWN[0])][0]}"
    assert bare == [
        Paraphrase("a puppy on red", f"{plain} on a red background"),
        Paraphrase("a puppy", plain),
    ]


def test_a_colour_beside_a_thing_that_exists_in_colours_is_not_said_in_vain() -> None:
    books = [Concept(name, ("book",), (), name, "object", STYLES) for name in ("blue book", "green book")]
    coloured = ParaphraseSampler([*books, KNOWN[0]], [["book"], ["book"], []], [[], [], []], ["zzyx"], [])
    said = [coloured.draw(np.random.default_rng(seed)).prompt.lower() for seed in range(600)]
    assert not any(f"{colour} book" in one for one in said for colour in ("red", "teal", "black"))
    assert any(f"{colour} dog" in one for one in said for colour in COLOURS)
