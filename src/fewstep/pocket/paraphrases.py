"""Prompts in people's own words, each with the plain prompt that means the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.data.captions import truths_of
from fewstep.pocket import captions, concepts
from fewstep.pocket.captions import COLOURS, STYLE_WORDS, Background, Rng, pick
from fewstep.pocket.concepts import Concept
from fewstep.pocket.labelled_captions import HINTS
from fewstep.pocket.sources import STYLES

NEAR = 0.6
"""Cosine of two sentence vectors from which on a word names a concept."""

# No "and" and no "next to": those ask for a second thing.
_AFTER = (
    "in the {}",
    "on a {}",
    "on the {}",
    "with {}",
    "with a {}",
    "for {}",
    "for the {}",
    "for my {}",
    "from the {}",
    "at {}",
    "of {}",
    "to {}",
    "like a {}",
    "under the {}",
)
_DOING = (
    "running",
    "jumping",
    "eating",
    "flying",
    "sleeping",
    "sitting",
    "looking at me",
    "smiling",
    "swimming",
    "waving",
    "growing",
    "ringing",
    "floating",
    "at night",
    "outside",
    "from above",
    "close up",
    "on a plate",
    "by the sea",
)


@dataclass(frozen=True)
class Paraphrase:
    """What somebody says, and the plain prompt that means it."""

    said: str
    meant: str


@dataclass(frozen=True)
class Phrases:
    """Draws phrases.

    Attributes:
        concepts: what can be asked for.
        names: by concept, what else people call it.
        sayings: by concept, pairs of words that mean it.
        words: what is said beside it and changes nothing.
        bare: captions of the data set that name no style.
    """

    concepts: Sequence[Concept]
    names: Sequence[Sequence[str]]
    sayings: Sequence[Sequence[str]]
    words: Sequence[str]
    bare: Sequence[Paraphrase]

    def draw(self, rng: Rng) -> Paraphrase:
        """One of any concept; it names no style in more than half of the cases, and then means the usual."""
        if self.bare and rng.random() < 0.2:
            return pick(self.bare, rng)
        index = int(rng.integers(len(self.concepts)))
        concept = self.concepts[index]
        style = pick(concept.styles, rng) if rng.random() < 0.45 else None
        ground = Background(pick(list(COLOURS), rng)) if rng.random() < 0.2 else Background()
        thing = captions.article(self._around(self._name(index, rng), concept, rng), rng)
        look = None if style is None else pick(STYLE_WORDS[style], rng)
        said = captions.arrange(thing, look, captions.background(ground, rng), rng)
        said = captions.finish(said, rng) if rng.random() < 0.5 else said
        said = captions.slip(said, rng) if rng.random() < 0.04 else said
        return Paraphrase(said, _meant(concept, style, ground.words))

    @cached_property
    def _coloured(self) -> set[str]:
        """What concepts of its colours are of: "book", for there is a blue book and a green one."""
        halves = (concept.name.partition(" ") for concept in self.concepts)
        return {thing for colour, _, thing in halves if colour in COLOURS}

    def _name(self, index: int, rng: Rng) -> str:
        draw = rng.random()
        others = () if draw < 0.4 else self.names[index] if draw < 0.85 else self.sayings[index]
        return pick(others or (self.concepts[index].name,), rng)

    def _around(self, name: str, concept: Concept, rng: Rng) -> str:
        """The name among words that change nothing; its own tags are the likeliest of them."""
        draw = rng.random()
        if draw < 0.3:
            return name
        if draw < 0.45:
            return f"{pick(captions.MOODS, rng)} {name}"
        if draw < 0.52 and name not in self._coloured:
            return f"{pick(list(COLOURS), rng)} {name}"
        if draw < 0.6:
            return f"{name} {pick(_DOING, rng)}"
        other = pick(concept.tags, rng) if concept.tags and rng.random() < 0.5 else pick(self.words, rng)
        if draw < 0.72:
            return f"{other} {name}"
        return f"{name} {pick(_AFTER, rng).format(other)}"


def _meant(concept: Concept, style: str | None, ground: str | None) -> str:
    where = f" on a {ground} background" if ground else ""
    return captions.plain(concept, style or default_style(concept)) + where


def default_style(concept: Concept) -> str:
    """The style that is meant where none is named: the first that training has seen of the thing."""
    seen = [style for style in STYLES if style in concept.styles]
    return next((style for style in seen if not concepts.held_out(concept.name, style)), seen[0])


def other_names(
    known: Sequence[Concept], vectors: Mapping[str, Any], words: Sequence[str]
) -> list[list[str]]:
    """What else people call each concept: its synonyms, tags that few others have, and ``words`` whose
    sentence vectors lie nearest to it.

    Args:
        known: the concepts.
        vectors: text -> unit vector, of every name, synonym and word.
        words: words of unknown meaning.
    """
    names = [list(concept.synonyms) for concept in known]
    at = [i for i, concept in enumerate(known) for _ in (concept.name, *concept.synonyms)]
    called = np.stack([vectors[name] for c in known for name in (c.name, *c.synonyms)]).astype(np.float32)
    taken = {name.lower() for c in known for name in (c.name, *c.synonyms)}
    for word in words:
        if word in taken:
            continue
        cosines = called @ np.asarray(vectors[word], np.float32)
        nearest = int(cosines.argmax())
        if cosines[nearest] >= NEAR:
            names[at[nearest]].append(word)
    return names


def pairs(known: Sequence[Concept], words: Sequence[str], many: int, rng: Rng) -> list[str]:
    """Two words each, as people put them together: a tag of a concept behind another one or behind, now and
    then before, one of ``words``. Most mean nothing."""
    tagged = [concept for concept in known if concept.tags]
    found: dict[str, None] = {}
    for _ in range(many):
        concept = pick(tagged, rng)
        head = pick((*concept.tags, concept.name), rng)
        other = pick(concept.tags if rng.random() < 0.5 else words, rng)
        if other != head:
            found[f"{other} {head}" if rng.random() < 0.75 else f"{head} {other}"] = None
    return list(found)


def captions_of(
    shards: Sequence[Path], known: Sequence[Concept]
) -> tuple[list[str], list[str], list[Paraphrase]]:
    """The captions of the shards: those of one thing and its style, those of several things, and those of one
    thing that name no style, with the usual style meant."""
    by_name = {concept.name: concept for concept in known}
    told: list[str] = []
    several: list[str] = []
    bare: list[Paraphrase] = []
    for truth in truths_of(shards):
        said, objects = truth["prompt"], truth["objects"]
        if len(objects) > 1:
            several.append(said)
        elif HINTS[objects[0]["style"]] in said.lower():
            told.append(said)
        else:
            ground = None if truth["ground"] == "plain white" else truth["ground"]
            bare.append(Paraphrase(said, _meant(by_name[objects[0]["concept"]], None, ground)))
    return told, several, bare
