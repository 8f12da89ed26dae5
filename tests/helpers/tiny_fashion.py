"""A small data set with the classes and the layout of Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fewstep.data import shards
from fewstep.fashion.data import CLASSES, SIDE


def make(folder: Path, train: int = 300, test: int = 100) -> None:
    """Write shards of blobs, one place per class."""
    for part, count in (("train", train), ("test", test)):
        rng = np.random.default_rng(count)
        examples = []
        for row in range(count):
            label = row % len(CLASSES)
            image = rng.integers(0, 60, (SIDE, SIDE))
            image[2 * label : 2 * label + 9, 2 * label : 2 * label + 9] += 150
            pixels = Image.fromarray(image.astype(np.uint8))
            examples.append((f"{row:05d}", pixels, CLASSES[label], {"label": label}))
        path = folder / part / f"{part}-00.tar"
        path.parent.mkdir(parents=True)
        shards.write_shard(path, examples)
