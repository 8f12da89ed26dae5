"""What people say for a picture: many phrasings, synonyms, cases and slips, drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewstep.pocket.concepts import Concept

Rng = np.random.Generator

STYLE_WORDS: dict[str, tuple[str, ...]] = {
    "3d": ("3D style", "3D", "3D render", "in 3D", "3D style", "glossy 3D style", "fluent 3D style"),
    "flat": ("flat style", "flat", "flat vector style", "flat design", "flat style", "minimal flat style"),
    "noto": ("Noto style", "noto", "Noto emoji style", "in noto style", "Noto style", "google noto style"),
    "twemoji": ("Twemoji style", "twemoji", "in twemoji style", "Twemoji style", "twitter emoji style"),
}
"""Style -> ways to ask for it. The first is the one that the command line's ``--style`` uses."""

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
MOODS = (
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
"""Words that people add and that change nothing."""
_WITHOUT = (
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
_OTHERS = (
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
"""What is named only to say that it is not wanted."""
_ON = (
    "on a {} background",
    "on {} background",
    "with a {} background",
    "against a {} background",
    "on {}",
    "{} background",
    "in front of a {} backdrop",
)
NUMBERS = {2: ("two", "2", "a pair of", "two"), 3: ("three", "3", "three"), 4: ("four", "4", "four")}
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
    """A background: one colour or, when ``second`` is set, a gradient to it. ``None`` names: plain white."""

    first: str | None = None
    second: str | None = None

    @property
    def words(self) -> str | None:
        return self.first if self.second is None else f"{self.first} to {self.second} gradient"


def sticker(concept: Concept, style: str, ground: Background, rng: Rng) -> str:
    """A caption of one sticker; about one in six names no style."""
    thing = article(_name(concept, rng), rng)
    look = pick(STYLE_WORDS[style], rng) if rng.random() < 0.84 else None
    return finish(arrange(thing, look, background(ground, rng), rng), rng)


def things(
    names: Sequence[str], relation: str | None, style: str | None, ground: Background, rng: Rng
) -> str:
    """A caption of a scene of two or more different things: ``names`` joined by ``relation`` or "and"."""
    parts = [article(name, rng) for name in names]
    joined = f" {relation} ".join(parts) if relation else ", ".join(parts[:-1]) + " and " + parts[-1]
    look = pick(STYLE_WORDS[style], rng) if style and rng.random() < 0.7 else None
    return finish(arrange(joined, look, background(ground, rng), rng), rng)


def counted(concept: Concept, count: int, style: str, ground: Background, rng: Rng) -> str:
    """A caption of two to four of one thing."""
    look = pick(STYLE_WORDS[style], rng) if rng.random() < 0.7 else None
    thing = f"{pick(NUMBERS[count], rng)} {plural(_name(concept, rng))}"
    return finish(arrange(thing, look, background(ground, rng), rng), rng)


def plain(concept: Concept, style: str) -> str:
    """The canonical prompt of a pair: "red apple, 3D style"."""
    return f"{concept.name}, {STYLE_WORDS[style][0]}"


def plural(name: str) -> str:
    """English plural of the last word; good enough for emoji labels."""
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
    """The label mostly, a synonym now and then, or both."""
    draw = rng.random()
    if not concept.synonyms or draw < 0.64:
        return concept.name
    synonym = pick(concept.synonyms, rng)
    if draw < 0.9:
        return synonym
    return f"{concept.name} ({synonym})" if draw < 0.94 else f"{synonym} {concept.name}"


def article(name: str, rng: Rng) -> str:
    """The name with an article or without, now and then with a word that changes nothing."""
    if rng.random() < 0.08:
        name = f"{pick(MOODS, rng)} {name}"
    draw = rng.random()
    if draw < 0.45:
        return name
    if draw < 0.55:
        return f"the {name}"
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def background(ground: Background, rng: Rng) -> str | None:
    """A way to ask for the ground; plain white mostly needs none."""
    if ground.first is None:
        return pick(_ON, rng).format(pick(("white", "plain"), rng)) if rng.random() < 0.06 else None
    return pick(_ON, rng).format(ground.words)


def arrange(thing: str, look: str | None, ground: str | None, rng: Rng) -> str:
    """Word order: the thing, its look and its ground, however people put them."""
    comma = ", " if rng.random() < 0.6 else " "
    if look is None:
        return (
            f"{ground}{comma}{thing}"
            if ground and rng.random() < 0.1
            else " ".join(filter(None, (thing, ground)))
        )
    tail = f"{comma}{ground}" if ground and rng.random() < 0.5 else f" {ground}" if ground else ""
    draw = rng.random()
    if draw < 0.6 or look.startswith("in "):
        return f"{thing}{comma}{look}{tail}" if rng.random() < 0.7 else f"{thing}{tail}{comma}{look}"
    if draw < 0.8:
        return f"{look} {thing}{tail}"
    return f"{look}: {thing}{tail}" if draw < 0.87 else f"{thing}{tail} {look}"


def finish(text: str, rng: Rng) -> str:
    """What people put around a caption: how they begin and end it, their cases and slips."""
    text = pick(_OPENERS, rng) + text
    draw = rng.random()
    if draw < 0.05:
        text += pick(_CLOSERS, rng)
    elif draw < 0.08:
        text += f", {pick(_WITHOUT, rng)}"
    elif draw < 0.09:
        text += f"{pick((', not', ', and not', ' instead of', ' without'), rng)} {pick(_OTHERS, rng)}"
    draw = rng.random()
    if draw < 0.03:
        text = slip(text, rng)
    elif draw < 0.06:
        text = text.upper()
    elif draw < 0.12:
        text = text[:1].upper() + text[1:]
    return text + ("." if rng.random() < 0.04 else "")


def slip(text: str, rng: Rng) -> str:
    """One typing slip: two neighbours swapped, a letter dropped or doubled."""
    at = int(rng.integers(0, max(1, len(text) - 1)))
    kind = int(rng.integers(3))
    if kind == 0:
        return text[:at] + text[at + 1 : at + 2] + text[at : at + 1] + text[at + 2 :]
    return text[:at] + text[at + 1 :] if kind == 1 else text[:at] + text[at : at + 1] + text[at:]


def pick(options: Sequence[Any], rng: Rng) -> Any:
    """One of the options, each as likely."""
    return options[int(rng.integers(len(options)))]
