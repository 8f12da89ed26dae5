"""Renderings of everything that scene prompts ask for: a disc each, so small that drawing takes no time."""

from __future__ import annotations

import numpy as np

from fewstep.pocket.captions import STYLE_WORDS
from fewstep.pocket.concepts import Concept
from fewstep.pocket.geneval_prompts import COLOURED_OBJECTS, OBJECTS
from fewstep.pocket.render import Renderings

CONCEPTS = OBJECTS + tuple(
    f"{colour} {name}" for name, colours in COLOURED_OBJECTS.items() for colour in colours
)


def renderings(size: int = 16, names: tuple[str, ...] | None = None) -> Renderings:
    styles = tuple(STYLE_WORDS)
    concepts = [Concept(name, (), (), f"{i:x}", "test", styles) for i, name in enumerate(names or CONCEPTS)]
    pairs = [(i, style) for style in styles for i in range(len(concepts))]
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    inside = (x**2 + y**2 <= 1).astype(np.uint8)
    pictures = np.stack(
        [np.stack([inside * c for c in (k % 200, k // 200 * 40, 90, 255)], -1) for k in range(len(pairs))]
    )
    return Renderings(concepts, pairs, pictures.astype(np.uint8))
