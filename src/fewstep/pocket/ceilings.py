"""Real renderings, composed anew, to show what the metrics allow at best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fewstep.pocket import render
from fewstep.pocket.captions import COLOURS, Background
from fewstep.pocket.compose import Composer
from fewstep.pocket.stickers import Reference

Redraw = Callable[[Sequence[Reference]], Sequence[Reference]]
"""References -> other images of the same pairs, in the same order."""


def ceiling_sources(folder: Path, size: int = 128) -> Mapping[str, Redraw]:
    """Return two upper bounds of retrieval (lower bounds of KID), by their label in the tables.

    "real, placed anew" differs from the references in size and position by a pixel or two, as training
    images do. "real, coloured" also has a background that no prompt of the evaluation asks for.

    Raises:
        UserError: nothing was rendered in ``folder`` at this size.
    """
    rendered = render.load(folder, size)
    composer = Composer(rendered, size)
    rows = {(rendered.concepts[index].name, style): row for row, (index, style) in enumerate(rendered.pairs)}
    colours = [name for name in COLOURS if name != "white"]

    def redraw(chosen: Sequence[Reference], coloured: bool) -> list[Reference]:
        drawn: list[Reference] = []
        for reference in chosen:
            row = rows[reference.concept, reference.style]
            # The generators of the references have the key 7.
            rng = np.random.Generator(np.random.Philox(key=[8, row]))
            ground = Background(colours[int(rng.integers(len(colours)))]) if coloured else Background()
            image = np.asarray(composer.sticker(row, rng, ground).image)
            drawn.append(replace(reference, image=np.ascontiguousarray(image.transpose(2, 0, 1))))
        return drawn

    return {
        "real, placed anew": lambda chosen: redraw(chosen, coloured=False),
        "real, coloured": lambda chosen: redraw(chosen, coloured=True),
    }
