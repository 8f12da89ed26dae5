"""Random paraphrases of plain prompts, in the words that users choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewstep.data.captions import truths_of
from fewstep.pocket import captions, concepts
from fewstep.pocket.captions import COLOURS, STYLE_WORDS, Background, Rng, choose
from fewstep.pocket.concepts import Concept
from fewstep.pocket.labelled_captions import STYLE_SUBSTRINGS
from fewstep.pocket.sources import STYLES

MIN_COSINE = 0.6
"""Least cosine similarity of two sentence embeddings at which a word counts as a concept's name."""

# Without "and" and "next to", which ask for a second object.
_SUFFIX_TEMPLATES = (
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
_ACTIVITIES = (
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
    """A user's prompt, and the plain prompt of the same meaning."""

    prompt: str
    plain_prompt: str


@dataclass(frozen=True)
class ParaphraseSampler:
    """Draw random paraphrases.

    Attributes:
        concepts: the concepts.
        names: for each concept its alternative names.
        word_pairs: for each concept the pairs of words that name it.
        filler_words: words to add that leave the image unchanged.
        unstyled: captions of the data set that name no style.
    """

    concepts: Sequence[Concept]
    names: Sequence[Sequence[str]]
    word_pairs: Sequence[Sequence[str]]
    filler_words: Sequence[str]
    unstyled: Sequence[Paraphrase]

    def draw(self, rng: Rng) -> Paraphrase:
        """Draw a paraphrase. More than half of them name no style: the default style is meant."""
        if self.unstyled and rng.random() < 0.2:
            return choose(self.unstyled, rng)
        index = int(rng.integers(len(self.concepts)))
        concept = self.concepts[index]
        style = choose(concept.styles, rng) if rng.random() < 0.45 else None
        background = Background(choose(list(COLOURS), rng)) if rng.random() < 0.2 else Background()
        subject = captions.with_article(self._with_filler(self._random_name(index, rng), concept, rng), rng)
        style_phrase = None if style is None else choose(STYLE_WORDS[style], rng)
        prompt = captions.join_phrases(
            subject, style_phrase, captions.background_phrase(background, rng), rng
        )
        if rng.random() < 0.5:
            prompt = captions.add_variation(prompt, rng)
        if rng.random() < 0.04:
            prompt = captions.add_typo(prompt, rng)
        return Paraphrase(prompt, _plain_prompt(concept, style, background.description))

    @cached_property
    def _names_with_colours(self) -> set[str]:
        """The names that exist in colours: "book", since there is a blue book and a green one."""
        parts = (concept.name.partition(" ") for concept in self.concepts)
        return {name for colour, _, name in parts if colour in COLOURS}

    def _random_name(self, index: int, rng: Rng) -> str:
        draw = rng.random()
        alternatives = () if draw < 0.4 else self.names[index] if draw < 0.85 else self.word_pairs[index]
        return choose(alternatives or (self.concepts[index].name,), rng)

    def _with_filler(self, name: str, concept: Concept, rng: Rng) -> str:
        """Return the name with random filler words, often the concept's own tags, or alone."""
        draw = rng.random()
        if draw < 0.3:
            return name
        if draw < 0.45:
            return f"{choose(captions.FILLER_ADJECTIVES, rng)} {name}"
        if draw < 0.52 and name not in self._names_with_colours:
            return f"{choose(list(COLOURS), rng)} {name}"
        if draw < 0.6:
            return f"{name} {choose(_ACTIVITIES, rng)}"
        other = (
            choose(concept.tags, rng)
            if concept.tags and rng.random() < 0.5
            else choose(self.filler_words, rng)
        )
        if draw < 0.72:
            return f"{other} {name}"
        return f"{name} {choose(_SUFFIX_TEMPLATES, rng).format(other)}"


def _plain_prompt(concept: Concept, style: str | None, background: str | None) -> str:
    suffix = f" on a {background} background" if background else ""
    return captions.plain_prompt(concept, style or default_style(concept)) + suffix


def default_style(concept: Concept) -> str:
    """Return the style of prompts that name none: the first one that is a training pair, else the first."""
    styles = [style for style in STYLES if style in concept.styles]
    return next((style for style in styles if not concepts.held_out(concept.name, style)), styles[0])


def alternative_names(
    known: Sequence[Concept], vectors: Mapping[str, NDArray[np.floating]], words: Sequence[str]
) -> list[list[str]]:
    """Return the alternative names of each concept: its synonyms, and the words nearest to its names.

    A word is assigned to the concept of the most similar name or synonym, if their cosine similarity is at
    least :data:`MIN_COSINE`.

    Args:
        known: The concepts.
        vectors: Text -> unit embedding ``[D]``, of every name, synonym and word.
        words: Candidate words.
    """
    names = [list(concept.synonyms) for concept in known]
    owners = [i for i, concept in enumerate(known) for _ in (concept.name, *concept.synonyms)]
    name_vectors = np.stack([vectors[name] for c in known for name in (c.name, *c.synonyms)]).astype(
        np.float32
    )
    taken = {name.lower() for c in known for name in (c.name, *c.synonyms)}
    for word in words:
        if word in taken:
            continue
        cosines = name_vectors @ np.asarray(vectors[word], np.float32)
        nearest = int(cosines.argmax())
        if cosines[nearest] >= MIN_COSINE:
            names[owners[nearest]].append(word)
    return names


def random_word_pairs(known: Sequence[Concept], words: Sequence[str], count: int, rng: Rng) -> list[str]:
    """Return distinct pairs of words, most of them without meaning.

    A pair is a tag or name of a concept with another of its tags or one of ``words``, mostly in front of it.

    Args:
        known: The concepts.
        words: Words to combine with tags.
        count: Number of draws; equal pairs count once.
        rng: Source of randomness.
    """
    tagged = [concept for concept in known if concept.tags]
    word_pairs: dict[str, None] = {}
    for _ in range(count):
        concept = choose(tagged, rng)
        head = choose((*concept.tags, concept.name), rng)
        other = choose(concept.tags if rng.random() < 0.5 else words, rng)
        if other != head:
            word_pairs[f"{other} {head}" if rng.random() < 0.75 else f"{head} {other}"] = None
    return list(word_pairs)


def split_captions(
    shards: Sequence[Path], known: Sequence[Concept]
) -> tuple[list[str], list[str], list[Paraphrase]]:
    """Return the captions of the shards in three groups.

    The groups are captions of one object that name its style, captions of several objects, and captions of
    one object without a style, as paraphrases of the plain prompt in the default style.
    """
    by_name = {concept.name: concept for concept in known}
    styled: list[str] = []
    several: list[str] = []
    unstyled: list[Paraphrase] = []
    for truth in truths_of(shards):
        caption, objects = truth["prompt"], truth["objects"]
        if len(objects) > 1:
            several.append(caption)
        elif STYLE_SUBSTRINGS[objects[0]["style"]] in caption.lower():
            styled.append(caption)
        else:
            background = None if truth["ground"] == "plain white" else truth["ground"]
            plain_prompt = _plain_prompt(by_name[objects[0]["concept"]], None, background)
            unstyled.append(Paraphrase(caption, plain_prompt))
    return styled, several, unstyled
