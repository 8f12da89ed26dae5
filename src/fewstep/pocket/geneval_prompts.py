"""Prompts of scenes whose truth is known, by GenEval's categories, and real pictures of them.

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
"""Every category has a seen and a held-out half."""

THINGS = tuple(
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
"""Common things, each one thing, of a look of its own: no plurals, no near doubles such as mouse and rat."""

COLOURED = {
    "heart": ("red", "orange", "yellow", "green", "blue", "purple", "brown", "pink"),
    "circle": ("red", "orange", "yellow", "green", "blue", "purple", "brown"),
    "square": ("red", "orange", "yellow", "green", "blue", "purple", "brown"),
    "book": ("green", "blue", "orange"),
    "apple": ("red", "green"),
}
"""Things that the renderings hold in several colours, under a name each ("blue heart"): what binding asks."""


def prompted_concepts() -> tuple[str, ...]:
    """Names of all concepts that prompts ask for."""
    return THINGS + tuple(f"{colour} {thing}" for thing, colours in COLOURED.items() for colour in colours)


@dataclass(frozen=True)
class Scene:
    """A prompt and its whole truth.

    Attributes:
        category: one of :data:`CATEGORIES`.
        prompt: what a person says.
        rows: the rendering of each thing, as rows of the renderings.
        things: name of each thing, in the prompt's order; counting repeats one.
        ground: colour of the background where the prompt names one.
        relation: how the first thing lies to the second, one of ``RELATIONS``, where the prompt says so.
        held_out: the (concept, style) pair of a single thing, or the set of things, was never trained on.
            Of sets, every pair was.
    """

    category: str
    prompt: str
    rows: tuple[int, ...]
    things: tuple[str, ...]
    ground: str | None
    relation: str | None
    held_out: bool


def prompts(renderings: Renderings, many: int, seed: int = 0) -> list[Scene]:
    """``many`` scenes, as many of each category, half of them held out; the same at every call.

    More scenes of a seed go on from fewer: the first of every category and half stay.

    Raises:
        UserError: ``many`` is no positive multiple of 12, or the renderings hold too few of the things.
    """
    if many < 1 or many % CELLS:
        raise UserError(
            f"scenes come in {CELLS}s ({len(CATEGORIES)} categories, seen and held out), not {many} of them"
        )
    maker = _Maker(renderings, seed)
    return [
        scene
        for category in CATEGORIES
        for held in (False, True)
        for scene in maker.make(category, held, many // CELLS)
    ]


def pictures(renderings: Renderings, scenes: Sequence[Scene], seed: int = 1) -> NDArray[np.uint8]:
    """A real picture of every scene, composed anew: uint8 ``[N, 3, size, size]``."""
    composer = Composer(renderings, renderings.size)
    drawn: list[NDArray[np.uint8]] = []
    for index, scene in enumerate(scenes):
        rng = np.random.Generator(np.random.Philox(key=[seed, 2**41 + index]))
        sample = _compose(composer, scene.category, scene.rows, scene.relation, Background(scene.ground), rng)
        drawn.append(np.ascontiguousarray(np.asarray(sample.image).transpose(2, 0, 1)))
    return np.stack(drawn)


def _compose(
    composer: Composer, category: str, rows: Sequence[int], relation: str | None, ground: Background, rng: Rng
) -> Sample:
    if category == "counting":
        return composer.counted(rows[0], len(rows), ground, rng)
    if len(rows) > 1:
        return composer.several(list(rows), relation, ground, rng)
    return composer.sticker(rows[0], rng, ground)


class _Maker:
    """Draws scenes category by category."""

    def __init__(self, renderings: Renderings, seed: int) -> None:
        self._composer, self._seed = Composer(renderings, renderings.size), seed
        self._styles: dict[str, dict[str, int]] = {}
        names = [concept.name for concept in renderings.concepts]
        for row, (index, style) in enumerate(renderings.pairs):
            self._styles.setdefault(names[index], {})[style] = row
        self._things = [name for name in THINGS if name in self._styles]
        self._coloured = [
            (thing, colour)
            for thing, colours in COLOURED.items()
            for colour in colours
            if f"{colour} {thing}" in self._styles
        ]
        if min(len(self._things), len(self._coloured)) < 4:
            raise UserError("these renderings hold too few of the things that scene prompts ask for")

    def make(self, category: str, held: bool, many: int) -> list[Scene]:
        """The first ``many`` scenes of a category and half, no prompt twice."""
        place = 2 * CATEGORIES.index(category) + held
        found: dict[str, Scene] = {}
        for attempt in range(4000 * many):
            rng = np.random.Generator(np.random.Philox(key=[self._seed, 2**40 + (place << 32) + attempt]))
            scene = self._try(category, held, rng)
            if scene is not None and scene.prompt not in found:
                found[scene.prompt] = scene
            if len(found) == many:
                return list(found.values())
        raise UserError(
            f"these renderings hold only {len(found)} prompts of the category {category}; ask for fewer"
        )

    def _try(self, category: str, held: bool, rng: Rng) -> Scene | None:
        """One draw; none if it is on the other side of the split, or its prompt leaves part of it unsaid."""
        names = self._names(category, rng)
        style = tuple(STYLE_WORDS)[int(rng.integers(len(STYLE_WORDS)))]
        if any(style not in self._styles[name] for name in names):
            return None
        new = held_out(names[0], style) if len(names) == 1 else _new_set(names)
        # Of a new set all pairs are old, so that it is the set alone that is new.
        if new != held or (len(names) > 1 and any(held_out(name, style) for name in names)):
            return None
        colours = [colour for colour in COLOURS if colour != "white"]  # what comes unasked
        ground = colours[int(rng.integers(len(colours)))] if category == "colours" else None
        relation = RELATIONS[int(rng.integers(len(RELATIONS)))] if category == "position" else None
        rows = tuple(self._styles[name][style] for name in names)
        prompt = _compose(self._composer, category, rows, relation, Background(ground), rng).prompt
        looks = STYLE_WORDS[style] if len(names) == 1 else ("",)
        said = prompt.lower()
        spoken = {plural(name) if category == "counting" else name for name in names}
        if not all(word.lower() in said for word in (*spoken, ground or "", relation or "")):
            return None
        if not any(look.lower() in said for look in looks):
            return None
        return Scene(category, prompt, rows, names, ground, relation, held)

    def _names(self, category: str, rng: Rng) -> tuple[str, ...]:
        if category == "binding":
            while True:
                (a, first), (b, second) = (
                    self._coloured[int(i)] for i in rng.integers(len(self._coloured), size=2)
                )
                if a != b and first != second:
                    return f"{first} {a}", f"{second} {b}"
        many = 2 if category in ("two", "position") else 1
        names = tuple(self._things[int(i)] for i in rng.choice(len(self._things), many, replace=False))
        return names * int(rng.integers(2, 5)) if category == "counting" else names


def _new_set(names: Sequence[str]) -> bool:
    """As the composer decides it: of a set of things, or of a thing and its count."""
    alike = len(set(names)) == 1
    return held_out_scene([f"{len(names)} {names[0]}"] if alike else names)
