"""Random captions of stickers and scenes, as users write prompts: phrasings, synonyms, cases and typos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fewstep.pocket.concepts import Concept

Rng = np.random.Generator
T = TypeVar("T")

STYLE_WORDS: dict[str, tuple[str, ...]] = {
    "3d": ("3D style", "3D", "3D render", "in 3D", "3D style", "glossy 3D style", "fluent 3D style"),
    "flat": ("flat style", "flat", "flat vector style", "flat design", "flat style", "minimal flat style"),
    "noto": ("Noto style", "noto", "Noto emoji style", "in noto style", "Noto style", "google noto style"),
    "twemoji": ("Twemoji style", "twemoji", "in twemoji style", "Twemoji style", "twitter emoji style"),
}
"""Style -> phrases that ask for it. The first one is what the ``--style`` option adds to a prompt."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (24, 24, 27),
    "grey": (148, 152, 160),
    "red": (222, 56, 50),
    "orange": (247, 142, 38),
    "yellow": (252, 214, 56),
    "green": (64, 168, 84),
    "blue": (52, 114, 222),
    "purple": (136, 76, 196),
    "pink": (246, 144, 188),
    "brown": (134, 88, 56),
    "teal": (32, 160, 160),
    "pale blue": (196, 222, 248),
    "pale green": (204, 236, 204),
    "pale yellow": (253, 243, 196),
    "pale pink": (252, 218, 230),
    "dark blue": (24, 44, 104),
    "dark green": (20, 78, 48),
    "light grey": (224, 226, 230),
    "beige": (240, 228, 204),
}

_OPENERS = (
    "",
    "",
    "",
    "",
    "a photo of ",
    "a picture of ",
    "an image of ",
    "draw me ",
    "draw ",
    "please draw ",
    "show me ",
    "i want ",
    "make ",
    "can you draw ",
    "an icon of ",
    "an emoji of ",
    "a sticker of ",
    "an illustration of ",
    "generate ",
    "create ",
    "give me ",
    "sticker: ",
    "a cute picture of ",
    "one ",
    "paint ",
    "i would like ",
    "could you please make ",
    "i'd love to see ",
    "need ",
)
_CLOSERS = (
    " please",
    " pls",
    ", thanks",
    ", thank you",
    " icon",
    " emoji",
    " sticker",
    " clipart",
    " drawing",
    " picture",
)
FILLER_ADJECTIVES = (
    "cute",
    "little",
    "big",
    "small",
    "tiny",
    "nice",
    "beautiful",
    "simple",
    "lovely",
    "cool",
    "fancy",
    "single",
    "detailed",
    "pretty",
    "typical",
    "classic",
)
"""Adjectives that leave the image unchanged."""
_NEGATIONS = (
    "no text",
    "without text",
    "no people",
    "nothing else",
    "no frame",
    "without a border",
    "no shadow",
    "no words please",
    "not a photo",
)
_NEGATED_OBJECTS = (
    "a cat",
    "a dog",
    "a car",
    "a shark",
    "an apple",
    "a house",
    "a tree",
    "a bird",
    "a banana",
    "a heart",
    "a horse",
    "a face",
    "a star",
    "a boat",
    "a flower",
    "a person",
)
"""Objects that a caption names only to exclude them."""
_BACKGROUND_TEMPLATES = (
    "on a {} background",
    "on {} background",
    "with a {} background",
    "against a {} background",
    "on {}",
    "{} background",
    "in front of a {} backdrop",
)
NUMBER_WORDS = {2: ("two", "2", "a pair of", "two"), 3: ("three", "3", "three"), 4: ("four", "4", "four")}
_IRREGULAR = {
    "person": "people",
    "man": "men",
    "woman": "women",
    "child": "children",
    "mouse": "mice",
    "sheep": "sheep",
    "fish": "fish",
    "leaf": "leaves",
    "knife": "knives",
    "wolf": "wolves",
    "tooth": "teeth",
    "foot": "feet",
    "goose": "geese",
    "dice": "dice",
    "scissors": "scissors",
}


@dataclass(frozen=True)
class Background:
    """A background: one colour, or a vertical gradient from ``first`` to ``second``.

    The colours are keys of :data:`COLOURS`. ``first=None`` is plain white.
    """

    first: str | None = None
    second: str | None = None

    @property
    def description(self) -> str | None:
        """The colours in words; ``None`` for plain white."""
        return self.first if self.second is None else f"{self.first} to {self.second} gradient"


def sticker_caption(concept: Concept, style: str, background: Background, rng: Rng) -> str:
    """Return a caption of one sticker. About one in six names no style."""
    subject = with_article(_name(concept, rng), rng)
    style_phrase = choose(STYLE_WORDS[style], rng) if rng.random() < 0.84 else None
    return add_variation(join_phrases(subject, style_phrase, background_phrase(background, rng), rng), rng)


def scene_caption(
    names: Sequence[str], relation: str | None, style: str | None, background: Background, rng: Rng
) -> str:
    """Return a caption of two or more objects, whose ``names`` are joined by ``relation`` or by "and"."""
    parts = [with_article(name, rng) for name in names]
    joined = f" {relation} ".join(parts) if relation else ", ".join(parts[:-1]) + " and " + parts[-1]
    style_phrase = choose(STYLE_WORDS[style], rng) if style and rng.random() < 0.7 else None
    return add_variation(join_phrases(joined, style_phrase, background_phrase(background, rng), rng), rng)


def counted_caption(concept: Concept, count: int, style: str, background: Background, rng: Rng) -> str:
    """Return a caption of ``count`` copies of one concept; ``count`` is 2 to 4."""
    style_phrase = choose(STYLE_WORDS[style], rng) if rng.random() < 0.7 else None
    subject = f"{choose(NUMBER_WORDS[count], rng)} {plural(_name(concept, rng))}"
    return add_variation(join_phrases(subject, style_phrase, background_phrase(background, rng), rng), rng)


def plain_prompt(concept: Concept, style: str) -> str:
    """Return the plain prompt of a concept in a style, such as "red apple, 3D style"."""
    return f"{concept.name}, {STYLE_WORDS[style][0]}"


def plural(name: str) -> str:
    """Return ``name`` with its last word in the plural, by rules that suffice for emoji labels."""
    head, _, last = name.rpartition(" ")
    if last.lower() in _IRREGULAR:
        last = _IRREGULAR[last.lower()]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{head} {last}".strip()


def _name(concept: Concept, rng: Rng) -> str:
    """Return the concept's name (in 64 % of the cases), a synonym, or both."""
    draw = rng.random()
    if not concept.synonyms or draw < 0.64:
        return concept.name
    synonym = choose(concept.synonyms, rng)
    if draw < 0.9:
        return synonym
    return f"{concept.name} ({synonym})" if draw < 0.94 else f"{synonym} {concept.name}"


def with_article(name: str, rng: Rng) -> str:
    """Return the name with a random article or none, and in 8 % of the cases with a filler adjective."""
    if rng.random() < 0.08:
        name = f"{choose(FILLER_ADJECTIVES, rng)} {name}"
    draw = rng.random()
    if draw < 0.45:
        return name
    if draw < 0.55:
        return f"the {name}"
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def background_phrase(background: Background, rng: Rng) -> str | None:
    """Return a phrase that asks for the background, or ``None``. Plain white is mostly left unsaid."""
    if background.first is None:
        return (
            choose(_BACKGROUND_TEMPLATES, rng).format(choose(("white", "plain"), rng))
            if rng.random() < 0.06
            else None
        )
    return choose(_BACKGROUND_TEMPLATES, rng).format(background.description)


def join_phrases(subject: str, style: str | None, background: str | None, rng: Rng) -> str:
    """Join the subject, the style and the background in a random order, with or without commas."""
    comma = ", " if rng.random() < 0.6 else " "
    if style is None:
        if background and rng.random() < 0.1:
            return f"{background}{comma}{subject}"
        return f"{subject} {background}" if background else subject
    tail = ""
    if background:
        tail = f"{comma}{background}" if rng.random() < 0.5 else f" {background}"
    draw = rng.random()
    if draw < 0.6 or style.startswith("in "):
        return f"{subject}{comma}{style}{tail}" if rng.random() < 0.7 else f"{subject}{tail}{comma}{style}"
    if draw < 0.8:
        return f"{style} {subject}{tail}"
    return f"{style}: {subject}{tail}" if draw < 0.87 else f"{subject}{tail} {style}"


def add_variation(text: str, rng: Rng) -> str:
    """Add random openers, closers, negations, upper case, typos and full stops to a caption."""
    text = choose(_OPENERS, rng) + text
    draw = rng.random()
    if draw < 0.05:
        text += choose(_CLOSERS, rng)
    elif draw < 0.08:
        text += f", {choose(_NEGATIONS, rng)}"
    elif draw < 0.09:
        negation = choose((", not", ", and not", " instead of", " without"), rng)
        text += f"{negation} {choose(_NEGATED_OBJECTS, rng)}"
    draw = rng.random()
    if draw < 0.03:
        text = add_typo(text, rng)
    elif draw < 0.06:
        text = text.upper()
    elif draw < 0.12:
        text = text[:1].upper() + text[1:]
    return text + ("." if rng.random() < 0.04 else "")


def add_typo(text: str, rng: Rng) -> str:
    """Return the text with one typo: two letters swapped, or one letter dropped or doubled."""
    at = int(rng.integers(0, max(1, len(text) - 1)))
    kind = int(rng.integers(3))
    if kind == 0:
        return text[:at] + text[at + 1 : at + 2] + text[at : at + 1] + text[at + 2 :]
    return text[:at] + text[at + 1 :] if kind == 1 else text[:at] + text[at : at + 1] + text[at:]


def choose(options: Sequence[T], rng: Rng) -> T:
    """Return one of the options, drawn uniformly."""
    return options[int(rng.integers(len(options)))]
