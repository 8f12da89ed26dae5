"""A stickers folder small enough for tests: coloured discs in the layout of ``fewstep data stickers``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fewstep.pocket import write_shards
from fewstep.pocket.compose import Composer
from fewstep.pocket.concepts import Concept
from fewstep.pocket.render import Renderings, load

SIZE = 128
STYLES = ("3d", "flat")


def make(folder: Path, pictures: int = 24) -> Path:
    """Write renderings, ``pictures`` training pictures and a few held-out ones into ``folder``."""
    folder.mkdir(parents=True)
    drawn = _discs()
    concepts = [asdict(c) for c in drawn.concepts]
    (folder / f"renderings-{SIZE}.json").write_text(
        json.dumps({"concepts": concepts, "pairs": drawn.pairs, "size": SIZE})
    )
    np.save(folder / f"renderings-{SIZE}.npy", drawn.images)
    read = load(folder, SIZE)
    for name, training, many in (("train", True, pictures), ("heldout", False, 6)):
        composer = Composer(read, SIZE, seed=int(not training), scenes=0.2, training=training)
        write_shards.write(composer, folder / name, name, many, 16, 1)
    return folder


def _discs() -> Renderings:
    concepts = [Concept(f"disc {i}", (f"dot {i}",), ("round",), f"{i:x}", "test", STYLES) for i in range(20)]
    pairs = [(i, style) for style in STYLES for i in range(len(concepts))]
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    inside = (x**2 + y**2 < 0.9).astype(np.uint8)
    pictures = [np.stack([inside * c for c in (6 * k, 90, 250 - 6 * k, 255)], -1) for k in range(len(pairs))]
    return Renderings(concepts, pairs, np.stack(pictures).astype(np.uint8))
