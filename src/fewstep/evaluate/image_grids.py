"""The image grid of a model whose prompt set draws none of its own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from fewstep.evaluate.metrics._features import rows_by_prompt
from fewstep.evaluate.prompt_set import Measured
from fewstep.images.grid import sheet

PROMPTS = 12
SEEDS = 4


def first_prompts(measured: Measured) -> Image:
    """Return a grid of the first prompts, a row each, with the images of the first seeds."""
    rows = list(rows_by_prompt(measured.prompts).values())[:PROMPTS]
    seeds = min(len(rows[0]), SEEDS)
    images: list[NDArray[np.uint8]] = []
    labels: list[str] = []
    for row in rows:
        images += [measured.pixels[index] for index in row[:seeds]]
        labels += [measured.prompts[row[0]].text, *(f"seed {measured.seeds[i]}" for i in row[1:seeds])]
    return sheet(np.stack(images), labels, seeds)
