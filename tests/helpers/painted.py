"""Small images drawn by rule, and a cheap extractor, so that tests know the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fewstep.evaluate import Candidate, PromptSet
from fewstep.pocket.prompt_sets import pocket
from fewstep.pocket.stickers import Reference

SIZE = 48
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = ("crimson", "gold", "green", "navy")
STYLES = ("filled", "outlined")


def picture(shape: str, colour: str, style: str, seed: int, size: int = SIZE) -> NDArray[np.uint8]:
    """One shape on a pale background, moved a little by the seed: uint8 ``[3, size, size]``."""
    rng = np.random.default_rng(seed)
    page = Image.new("RGB", (size, size), tuple(int(v) for v in rng.integers(215, 256, 3)))
    pen = ImageDraw.Draw(page)
    radius = size * rng.uniform(0.27, 0.36)
    x, y = size / 2 + rng.uniform(-0.1, 0.1, 2) * size
    look = {"fill": colour} if style == "filled" else {"outline": colour, "width": max(2, size // 16)}
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, **look)
    elif shape == "square":
        pen.rectangle(box, **look)
    elif shape == "triangle":
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], **look)
    elif shape == "cross":
        pen.rectangle((x - radius / 3, y - radius, x + radius / 3, y + radius), **look)
        pen.rectangle((x - radius, y - radius / 3, x + radius, y + radius / 3), **look)
    else:
        pen.ellipse(box, outline=colour, width=size // 6 if style == "filled" else 2)
    return np.asarray(page).transpose(2, 0, 1)


def references(seed: int = 0, size: int = SIZE) -> list[Reference]:
    """40 renderings of 20 concepts in two styles; every other pair is held out."""
    made: list[Reference] = []
    for i, (shape, colour, style) in enumerate((a, b, c) for a in SHAPES for b in COLOURS for c in STYLES):
        concept = f"{colour} {shape}"
        image = picture(shape, colour, style, 1000 * seed + i, size)
        made.append(Reference(concept, style, (i // 2 + i) % 2 == 0, image, f"{style} {concept}"))
    return made


def prompt_set(prompts: int = 200, **parts: Any) -> PromptSet:
    """Pocket's prompt set of the drawn renderings."""
    return pocket.build(references(), prompts, **parts)


class Pixels:
    """Features that are the image itself at 12 x 12: exact copies are at distance zero."""

    name = "pixels-12x12"

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.seen += len(images)
        small = images.reshape(len(images), 3, 12, SIZE // 12, 12, SIZE // 12).mean((3, 5))
        return (small.reshape(len(images), -1) / 255).astype(np.float32)


class Painter:
    """A model that draws what a prompt says: with a fresh place for each seed, or always the same."""

    def __init__(self, moves: bool = True, break_after: int | None = None) -> None:
        self.moves = moves
        self.calls: list[int] = []
        self.break_after = break_after

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        if self.break_after is not None and len(self.calls) >= self.break_after:
            raise KeyboardInterrupt
        self.calls.append(len(prompts))
        words = [prompt.split() for prompt in prompts]
        places = seeds if self.moves else [0] * len(seeds)
        drawn = [picture(w[2], w[1], w[0], 50_000 + s) for w, s in zip(words, places, strict=True)]
        return np.stack(drawn)


def painter(label: str = "painter", **options: bool) -> Candidate:
    return Candidate(label, Painter(**options), f"{label} {options}")
