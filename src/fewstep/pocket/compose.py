"""Compose stickers and scenes from renderings, each with its caption and its ground truth."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np
from PIL import Image

from fewstep.pocket import captions
from fewstep.pocket.captions import COLOURS, Background
from fewstep.pocket.concepts import held_out, held_out_scene
from fewstep.pocket.render import Renderings

Rng = np.random.Generator
VERSION = 3
"""Version of the composer. Data sets of different versions cannot be mixed."""
RELATIONS = ("to the left of", "to the right of", "above", "below")


@dataclass(frozen=True)
class PlacedObject:
    """One object of an image. ``box`` is (left, top, right, bottom), relative to the image's side."""

    concept: str
    style: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Sample:
    """A composed image with its caption and its ground truth."""

    image: Image.Image
    prompt: str
    kind: str
    objects: list[PlacedObject]
    background: Background
    relation: str | None = None
    held_out: bool = False

    def truth(self) -> dict[str, object]:
        """Return all fields but the image, ready for JSON."""
        return {
            "prompt": self.prompt,
            "kind": self.kind,
            "objects": [asdict(o) for o in self.objects],
            "ground": self.background.description or "plain white",
            "relation": self.relation,
            "held_out": self.held_out,
        }


@dataclass
class Composer:
    """Compose samples from renderings. A sample is a function of the seed and its index.

    Attributes:
        renderings: the images to compose from.
        size: side of the composed images, pixels.
        seed: seed of the data set.
        scenes: share of images with more than one object.
        training: True composes only training pairs and scenes, False only held-out ones.
    """

    renderings: Renderings
    size: int = 128
    seed: int = 0
    scenes: float = 0.3
    training: bool = True
    _rows: list[int] = field(init=False, default_factory=list[int])

    def __post_init__(self) -> None:
        rows = range(len(self.renderings.pairs))
        self._rows = [row for row in rows if held_out(*self._pair(row)) != self.training]

    def __call__(self, index: int) -> Sample:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, index]))
        if rng.random() < self.scenes:
            return self._scene(rng)
        # Stickers visit all pairs in a new order each epoch, so that every pair is seen equally often.
        epoch, position = divmod(index, len(self._rows))
        order = np.random.Generator(np.random.Philox(key=[self.seed, 2**40 + epoch])).permutation(
            len(self._rows)
        )
        return self.sticker(self._rows[int(order[position])], rng)

    def sticker(self, row: int, rng: Rng, background: Background | None = None) -> Sample:
        """Compose one object, by default on plain white in 55 % of the cases."""
        index, style = self.renderings.pairs[row]
        background = background or (Background() if rng.random() < 0.55 else _random_background(rng))
        # Captions do not say where the object is: more jitter would teach the net soft edges.
        side = float(rng.uniform(0.84, 0.87))
        box = _square(0.5 + float(rng.uniform(-0.008, 0.008)), 0.5 + float(rng.uniform(-0.008, 0.008)), side)
        concept = self.renderings.concepts[index]
        objects = [PlacedObject(concept.name, style, box)]
        caption = captions.sticker_caption(concept, style, background, rng)
        return Sample(
            self._paint([row], objects, background),
            caption,
            "sticker",
            objects,
            background,
            None,
            not self.training,
        )

    def _scene(self, rng: Rng) -> Sample:
        return self._several(rng) if rng.random() < 0.6 else self._counted(rng)

    def _several(self, rng: Rng) -> Sample:
        count = 3 if rng.random() < 0.2 else 2
        rows = self._random_rows(count, rng)
        background = Background() if rng.random() < 0.5 else _random_background(rng)
        relation = RELATIONS[int(rng.integers(4))] if count == 2 and rng.random() < 0.7 else None
        return self.several(rows, relation, background, rng)

    def several(self, rows: list[int], relation: str | None, background: Background, rng: Rng) -> Sample:
        """Compose two objects side by side or one above the other, or three in a row."""
        count = len(rows)
        side = float(rng.uniform(0.42, 0.5)) if count == 2 else float(rng.uniform(0.28, 0.33))
        centres = _centres(relation, count, rng)
        pairs = [self._pair(row) for row in rows]
        objects = [
            PlacedObject(n, s, _square(x, y, side)) for (n, s), (x, y) in zip(pairs, centres, strict=True)
        ]
        style = pairs[0][1] if len({s for _, s in pairs}) == 1 else None
        caption = captions.scene_caption([n for n, _ in pairs], relation, style, background, rng)
        return Sample(
            self._paint(rows, objects, background),
            caption,
            "several",
            objects,
            background,
            relation,
            not self.training,
        )

    def _counted(self, rng: Rng) -> Sample:
        count = int(rng.integers(2, 5))
        row = self._random_rows(1, rng, count)[0]
        background = Background() if rng.random() < 0.5 else _random_background(rng)
        return self.counted(row, count, background, rng)

    def counted(self, row: int, count: int, background: Background, rng: Rng) -> Sample:
        """Compose ``count`` copies of one object; ``count`` is 2 to 4."""
        side = {2: 0.45, 3: 0.38, 4: 0.38}[count] * float(rng.uniform(0.95, 1.05))
        layouts = {
            2: [(0.27, 0.5), (0.73, 0.5)],
            3: [(0.5, 0.27), (0.27, 0.72), (0.73, 0.72)],
            4: [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)],
        }
        name, style = self._pair(row)
        objects = [PlacedObject(name, style, _square(x, y, side)) for x, y in layouts[count]]
        concept = self.renderings.concepts[self.renderings.pairs[row][0]]
        caption = captions.counted_caption(concept, count, style, background, rng)
        image = self._paint([row] * count, objects, background)
        return Sample(image, caption, "counted", objects, background, None, not self.training)

    def _random_rows(self, num_objects: int, rng: Rng, count: int = 1) -> list[int]:
        """Draw rows of different concepts, mostly of one style, on this side of the held-out split."""
        while True:
            rows = [self._rows[int(rng.integers(len(self._rows)))] for _ in range(num_objects)]
            names = [self._pair(row)[0] for row in rows]
            styles = {self._pair(row)[1] for row in rows}
            if len(set(names)) < num_objects or (len(styles) > 1 and rng.random() < 0.9):
                continue
            if held_out_scene(names if num_objects > 1 else [f"{count} {names[0]}"]) != self.training:
                return rows

    def _pair(self, row: int) -> tuple[str, str]:
        index, style = self.renderings.pairs[row]
        return self.renderings.concepts[index].name, style

    def _paint(self, rows: list[int], objects: list[PlacedObject], background: Background) -> Image.Image:
        canvas = background_image(background, self.size)
        for row, placed in zip(rows, objects, strict=True):
            left, top, right, _ = (v * self.size for v in placed.box)
            side = max(1, round(right - left))
            image = Image.fromarray(np.asarray(self.renderings.images[row])).resize(
                (side, side), Image.Resampling.LANCZOS
            )
            canvas.paste(image, (round(left), round(top)), image)
        return canvas


def background_image(background: Background, size: int) -> Image.Image:
    """Return a plain canvas or one with a vertical gradient, RGB ``size`` x ``size``."""
    first = np.array(COLOURS[background.first or "white"], np.float32)
    second = np.array(COLOURS[background.second], np.float32) if background.second else first
    ramp = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    rows = first * (1 - ramp) + second * ramp
    return Image.fromarray(np.broadcast_to(rows, (size, size, 3)).round().astype(np.uint8))


def _random_background(rng: Rng) -> Background:
    names = list(COLOURS)
    first = names[int(rng.integers(len(names)))]
    if rng.random() < 0.8:
        return Background(first)
    second = names[int(rng.integers(len(names)))]
    return Background(first, second) if second != first else Background(first)


def _square(x: float, y: float, side: float) -> tuple[float, float, float, float]:
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


def _centres(relation: str | None, count: int, rng: Rng) -> list[tuple[float, float]]:
    """Return the objects' centres, such that ``relation`` holds between the first and the second."""
    if count == 3:
        return [(0.18, 0.5), (0.5, 0.5), (0.82, 0.5)]
    left, right, top, bottom = (0.26, 0.5), (0.74, 0.5), (0.5, 0.26), (0.5, 0.74)
    jitter = float(rng.uniform(-0.06, 0.06))
    if relation in (None, RELATIONS[0], RELATIONS[1]):
        pair = [(left[0], 0.5 + jitter), (right[0], 0.5 - jitter)]
        return pair[::-1] if relation == RELATIONS[1] else pair
    pair = [(0.5 + jitter, top[1]), (0.5 - jitter, bottom[1])]
    return pair[::-1] if relation == RELATIONS[3] else pair
