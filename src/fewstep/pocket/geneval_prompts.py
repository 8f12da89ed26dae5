"""Scene prompts with a known truth, by GenEval's categories, and real images of them.

Ghosh, Hajishirzi and Schmidt, *GenEval* (arXiv 2310.11513), section 3: one object, two objects, counting,
colours, position, attribute binding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewstep.core.types import UserError
from fewstep.pocket.captions import COLOURS, STYLE_WORDS, Background, plural
from fewstep.pocket.compose import RELATIONS, Composer, Rng, Sample
from fewstep.pocket.concepts import held_out, held_out_scene
from fewstep.pocket.render import Renderings

CATEGORIES = ("single", "two", "counting", "colours", "position", "binding")
CELLS = 2 * len(CATEGORIES)
"""Categories, times their seen and held-out halves."""

OBJECTS = tuple(
    """dog; cat; fox; lion; tiger; horse; pig; giraffe; elephant; rabbit; bat; bear; panda; koala; kangaroo;
    zebra; unicorn; hedgehog; penguin; duck; owl; swan; eagle; flamingo; parrot; rooster; frog; crocodile;
    turtle; snake; dolphin; octopus; crab; lobster; shark; tropical fish; squid; snail; butterfly; ant;
    honeybee; lady beetle; spider; scorpion; rose; sunflower; tulip; cactus; palm tree; mushroom;
    evergreen tree; maple leaf; banana; pineapple; watermelon; lemon; strawberry; pear; peach; mango;
    coconut; tomato; carrot; broccoli; avocado; eggplant; onion; garlic; bread; croissant; pretzel;
    cheese wedge; hamburger; pizza; hot dog; taco; sandwich; waffle; bagel; egg; doughnut; cookie;
    birthday cake; cupcake; lollipop; candy; ice cream; teapot; beer mug; wine glass; guitar; violin; drum;
    trumpet; saxophone; accordion; balloon; camera; television; laptop; telephone; radio; microphone; key;
    hammer; axe; wrench; screwdriver; magnet; ladder; pencil; paintbrush; light bulb; candle; umbrella;
    crown; top hat; backpack; handbag; necktie; t-shirt; dress; high-heeled shoe; ring; gem stone; trophy;
    soccer ball; basketball; kite; teddy bear; robot; ghost; snowman; bed; chair; bathtub; toilet; door;
    bucket; broom; toothbrush; bicycle; motorcycle; skateboard; airplane; helicopter; rocket; parachute;
    sailboat; anchor; fire engine; ambulance; bus; taxi; tractor; locomotive; house; castle; tent; volcano;
    sun; cloud; rainbow; star; alarm clock; compass; telescope; microscope; syringe; bell; envelope;
    package; wrapped gift; bomb; shield; money bag; Christmas tree; jack-o-lantern""".replace(
        "\n    ", " "
    ).split("; ")
)
"""Common single objects that look distinct: no plurals, no pairs such as mouse and rat."""

COLOURED_OBJECTS = {
    "heart": ("red", "orange", "yellow", "green", "blue", "purple", "brown", "pink"),
    "circle": ("red", "orange", "yellow", "green", "blue", "purple", "brown"),
    "square": ("red", "orange", "yellow", "green", "blue", "purple", "brown"),
    "book": ("green", "blue", "orange"),
    "apple": ("red", "green"),
}
"""Objects with renderings in several colours, such as "blue heart": for the category binding."""


@dataclass(frozen=True)
class Scene:
    """A prompt and its truth.

    Attributes:
        category: one of :data:`CATEGORIES`.
        prompt: the text.
        rows: the rendering of each object, as rows of the renderings.
        objects: name of each object, in the prompt's order; counting repeats one.
        background: colour of the background, where the prompt names one.
        relation: of the first object to the second, one of ``RELATIONS``, where the prompt names one.
        held_out: the (concept, style) pair of a single object, or the set of objects, was never trained on.
            Every pair of a held-out set was trained on.
    """

    category: str
    prompt: str
    rows: tuple[int, ...]
    objects: tuple[str, ...]
    background: str | None
    relation: str | None
    held_out: bool


def prompts(renderings: Renderings, count: int, seed: int = 0) -> list[Scene]:
    """Return ``count`` scenes, the same number of each category, half of them held out; always the same.

    A larger ``count`` with the same seed keeps the first scenes of every category and half.

    Raises:
        UserError: ``count`` is no positive multiple of 12, or the renderings hold too few of the objects.
    """
    if count < 1 or count % CELLS:
        raise UserError(
            f"scenes come in {CELLS}s ({len(CATEGORIES)} categories, seen and held out), not {count} of them"
        )
    sampler = _SceneSampler(renderings, seed)
    return [
        scene
        for category in CATEGORIES
        for held in (False, True)
        for scene in sampler.sample(category, held, count // CELLS)
    ]


def scene_images(renderings: Renderings, scenes: Sequence[Scene], seed: int = 1) -> NDArray[np.uint8]:
    """Return a new composition of every scene: uint8 ``[N, 3, size, size]``."""
    composer = Composer(renderings, renderings.size)
    images: list[NDArray[np.uint8]] = []
    for index, scene in enumerate(scenes):
        rng = np.random.Generator(np.random.Philox(key=[seed, 2**41 + index]))
        sample = _compose(
            composer, scene.category, scene.rows, scene.relation, Background(scene.background), rng
        )
        images.append(np.ascontiguousarray(np.asarray(sample.image).transpose(2, 0, 1)))
    return np.stack(images)


def _compose(
    composer: Composer,
    category: str,
    rows: Sequence[int],
    relation: str | None,
    background: Background,
    rng: Rng,
) -> Sample:
    if category == "counting":
        return composer.counted(rows[0], len(rows), background, rng)
    if len(rows) > 1:
        return composer.several(list(rows), relation, background, rng)
    return composer.sticker(rows[0], rng, background)


class _SceneSampler:
    """Samples scenes category by category."""

    def __init__(self, renderings: Renderings, seed: int) -> None:
        self._composer, self._seed = Composer(renderings, renderings.size), seed
        self._styles: dict[str, dict[str, int]] = {}
        names = [concept.name for concept in renderings.concepts]
        for row, (index, style) in enumerate(renderings.pairs):
            self._styles.setdefault(names[index], {})[style] = row
        self._objects = [name for name in OBJECTS if name in self._styles]
        self._coloured = [
            (name, colour)
            for name, colours in COLOURED_OBJECTS.items()
            for colour in colours
            if f"{colour} {name}" in self._styles
        ]
        if min(len(self._objects), len(self._coloured)) < 4:
            raise UserError("these renderings hold too few of the things that scene prompts ask for")

    def sample(self, category: str, held: bool, count: int) -> list[Scene]:
        """Return the first ``count`` scenes of a category and half, no prompt twice."""
        cell = 2 * CATEGORIES.index(category) + held
        found: dict[str, Scene] = {}
        for attempt in range(4000 * count):
            rng = np.random.Generator(np.random.Philox(key=[self._seed, 2**40 + (cell << 32) + attempt]))
            scene = self._try(category, held, rng)
            if scene is not None and scene.prompt not in found:
                found[scene.prompt] = scene
            if len(found) == count:
                return list(found.values())
        raise UserError(
            f"these renderings hold only {len(found)} prompts of the category {category}; ask for fewer"
        )

    def _try(self, category: str, held: bool, rng: Rng) -> Scene | None:
        """Return one sample, or none if it is of the other half, or if its prompt does not name all of it."""
        names = self._names(category, rng)
        style = tuple(STYLE_WORDS)[int(rng.integers(len(STYLE_WORDS)))]
        if any(style not in self._styles[name] for name in names):
            return None
        is_held_out = held_out(names[0], style) if len(names) == 1 else _is_held_out_set(names)
        # All pairs of a held-out set are seen, so that only the set is new.
        if is_held_out != held or (len(names) > 1 and any(held_out(name, style) for name in names)):
            return None
        colours = [colour for colour in COLOURS if colour != "white"]  # the default background
        background = colours[int(rng.integers(len(colours)))] if category == "colours" else None
        relation = RELATIONS[int(rng.integers(len(RELATIONS)))] if category == "position" else None
        rows = tuple(self._styles[name][style] for name in names)
        prompt = _compose(self._composer, category, rows, relation, Background(background), rng).prompt
        style_words = STYLE_WORDS[style] if len(names) == 1 else ("",)
        text = prompt.lower()
        words = {plural(name) if category == "counting" else name for name in names}
        if not all(word.lower() in text for word in (*words, background or "", relation or "")):
            return None
        if not any(word.lower() in text for word in style_words):
            return None
        return Scene(category, prompt, rows, names, background, relation, held)

    def _names(self, category: str, rng: Rng) -> tuple[str, ...]:
        if category == "binding":
            while True:
                (a, first), (b, second) = (
                    self._coloured[int(i)] for i in rng.integers(len(self._coloured), size=2)
                )
                if a != b and first != second:
                    return f"{first} {a}", f"{second} {b}"
        number = 2 if category in ("two", "position") else 1
        names = tuple(self._objects[int(i)] for i in rng.choice(len(self._objects), number, replace=False))
        return names * int(rng.integers(2, 5)) if category == "counting" else names


def _is_held_out_set(names: Sequence[str]) -> bool:
    """Return the composer's decision on a set of objects, or on an object and its count."""
    counting = len(set(names)) == 1
    return held_out_scene([f"{len(names)} {names[0]}"] if counting else names)
