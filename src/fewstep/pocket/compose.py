"""Stickers and scenes: pictures made of renderings, each with its caption and its truth."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from fewstep.pocket import captions
from fewstep.pocket.captions import COLOURS, Background
from fewstep.pocket.concepts import held_out, held_out_scene
from fewstep.pocket.render import Renderings

Rng = np.random.Generator
VERSION = 3
"""Of what a composer draws: sets of two versions are not mixed."""
RELATIONS = ("to the left of", "to the right of", "above", "below")


@dataclass(frozen=True)
class Placed:
    """One thing in a picture; ``box`` is (left, top, right, bottom) in units of the picture's side."""

    concept: str
    style: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Sample:
    """A picture, what a person would call it, and what is truly there."""

    image: Image.Image
    prompt: str
    kind: str
    objects: list[Placed]
    ground: Background
    relation: str | None = None
    held_out: bool = False

    def truth(self) -> dict[str, Any]:
        """All but the picture, ready for JSON."""
        return {
            "prompt": self.prompt,
            "kind": self.kind,
            "objects": [asdict(o) for o in self.objects],
            "ground": self.ground.words or "plain white",
            "relation": self.relation,
            "held_out": self.held_out,
        }


@dataclass
class Composer:
    """Draws samples from renderings; sample ``i`` of a seed is always the same one.

    Attributes:
        renderings: the stickers.
        size: side of the pictures in pixels.
        seed: what tells one set from another.
        scenes: share of pictures with more than one thing.
        training: only pairs and sets that are trained on (True), or only those held out (False).
    """

    renderings: Renderings
    size: int = 128
    seed: int = 0
    scenes: float = 0.3
    training: bool = True
    _rows: list[int] = field(init=False, default_factory=list[int])

    def __post_init__(self) -> None:
        kept = [r for r in range(len(self.renderings.pairs)) if held_out(*self._pair(r)) != self.training]
        self._rows = kept

    def __call__(self, index: int) -> Sample:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, index]))
        if rng.random() < self.scenes:
            return self._scene(rng)
        # Stickers go through all pairs in a new order each round, so that every pair is seen equally often.
        round_, place = divmod(index, len(self._rows))
        order = np.random.Generator(np.random.Philox(key=[self.seed, 2**40 + round_])).permutation(
            len(self._rows)
        )
        return self.sticker(self._rows[int(order[place])], rng)

    def sticker(self, row: int, rng: Rng, ground: Background | None = None) -> Sample:
        """One thing, on plain white half of the time."""
        index, style = self.renderings.pairs[row]
        ground = ground or (Background() if rng.random() < 0.55 else _ground(rng))
        # Little play: it is what no caption tells, and a net that cannot know it draws soft edges.
        side = float(rng.uniform(0.84, 0.87))
        box = _box(0.5 + float(rng.uniform(-0.008, 0.008)), 0.5 + float(rng.uniform(-0.008, 0.008)), side)
        concept = self.renderings.concepts[index]
        objects = [Placed(concept.name, style, box)]
        caption = captions.sticker(concept, style, ground, rng)
        return Sample(
            self._paint([row], objects, ground), caption, "sticker", objects, ground, None, not self.training
        )

    def _scene(self, rng: Rng) -> Sample:
        return self._several(rng) if rng.random() < 0.6 else self._counted(rng)

    def _several(self, rng: Rng) -> Sample:
        many = 3 if rng.random() < 0.2 else 2
        rows = self._choose(many, rng)
        ground = Background() if rng.random() < 0.5 else _ground(rng)
        relation = RELATIONS[int(rng.integers(4))] if many == 2 and rng.random() < 0.7 else None
        return self.several(rows, relation, ground, rng)

    def several(self, rows: list[int], relation: str | None, ground: Background, rng: Rng) -> Sample:
        """Two things side by side or one above the other, or three in a row."""
        many = len(rows)
        side = float(rng.uniform(0.42, 0.5)) if many == 2 else float(rng.uniform(0.28, 0.33))
        spots = _spots(relation, many, rng)
        pairs = [self._pair(row) for row in rows]
        objects = [Placed(n, s, _box(x, y, side)) for (n, s), (x, y) in zip(pairs, spots, strict=True)]
        style = pairs[0][1] if len({s for _, s in pairs}) == 1 else None
        caption = captions.things([n for n, _ in pairs], relation, style, ground, rng)
        return Sample(
            self._paint(rows, objects, ground),
            caption,
            "several",
            objects,
            ground,
            relation,
            not self.training,
        )

    def _counted(self, rng: Rng) -> Sample:
        count = int(rng.integers(2, 5))
        row = self._choose(1, rng, count)[0]
        ground = Background() if rng.random() < 0.5 else _ground(rng)
        return self.counted(row, count, ground, rng)

    def counted(self, row: int, count: int, ground: Background, rng: Rng) -> Sample:
        """Two to four of one thing."""
        side = {2: 0.45, 3: 0.38, 4: 0.38}[count] * float(rng.uniform(0.95, 1.05))
        layouts = {
            2: [(0.27, 0.5), (0.73, 0.5)],
            3: [(0.5, 0.27), (0.27, 0.72), (0.73, 0.72)],
            4: [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)],
        }
        name, style = self._pair(row)
        objects = [Placed(name, style, _box(x, y, side)) for x, y in layouts[count]]
        concept = self.renderings.concepts[self.renderings.pairs[row][0]]
        caption = captions.counted(concept, count, style, ground, rng)
        picture = self._paint([row] * count, objects, ground)
        return Sample(picture, caption, "counted", objects, ground, None, not self.training)

    def _choose(self, many: int, rng: Rng, count: int = 1) -> list[int]:
        """Rows of one style (mostly) whose set of things is on this side of the held-out split."""
        while True:
            rows = [self._rows[int(rng.integers(len(self._rows)))] for _ in range(many)]
            names = [self._pair(row)[0] for row in rows]
            styles = {self._pair(row)[1] for row in rows}
            if len(set(names)) < many or (len(styles) > 1 and rng.random() < 0.9):
                continue
            if held_out_scene(names if many > 1 else [f"{count} {names[0]}"]) != self.training:
                return rows

    def _pair(self, row: int) -> tuple[str, str]:
        index, style = self.renderings.pairs[row]
        return self.renderings.concepts[index].name, style

    def _paint(self, rows: list[int], objects: list[Placed], ground: Background) -> Image.Image:
        canvas = background(ground, self.size)
        for row, placed in zip(rows, objects, strict=True):
            left, top, right, _ = (v * self.size for v in placed.box)
            side = max(1, round(right - left))
            picture = Image.fromarray(np.asarray(self.renderings.pictures[row])).resize(
                (side, side), Image.Resampling.LANCZOS
            )
            canvas.paste(picture, (round(left), round(top)), picture)
        return canvas


def background(ground: Background, size: int) -> Image.Image:
    """A plain or vertically graded canvas, RGB ``size`` x ``size``."""
    first = np.array(COLOURS[ground.first or "white"], np.float32)
    second = np.array(COLOURS[ground.second], np.float32) if ground.second else first
    ramp = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    rows = first * (1 - ramp) + second * ramp
    return Image.fromarray(np.broadcast_to(rows, (size, size, 3)).round().astype(np.uint8))


def _ground(rng: Rng) -> Background:
    names = list(COLOURS)
    first = names[int(rng.integers(len(names)))]
    if rng.random() < 0.8:
        return Background(first)
    second = names[int(rng.integers(len(names)))]
    return Background(first, second) if second != first else Background(first)


def _box(x: float, y: float, side: float) -> tuple[float, float, float, float]:
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


def _spots(relation: str | None, many: int, rng: Rng) -> list[tuple[float, float]]:
    """Centres of the things, so that ``relation`` holds between the first and the second."""
    if many == 3:
        return [(0.18, 0.5), (0.5, 0.5), (0.82, 0.5)]
    left, right, top, bottom = (0.26, 0.5), (0.74, 0.5), (0.5, 0.26), (0.5, 0.74)
    wobble = float(rng.uniform(-0.06, 0.06))
    if relation in (None, RELATIONS[0], RELATIONS[1]):
        pair = [(left[0], 0.5 + wobble), (right[0], 0.5 - wobble)]
        return pair[::-1] if relation == RELATIONS[1] else pair
    pair = [(0.5 + wobble, top[1]), (0.5 - wobble, bottom[1])]
    return pair[::-1] if relation == RELATIONS[3] else pair
