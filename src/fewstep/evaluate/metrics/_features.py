"""The base of metrics of features: they collect all features and measure them at the end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fewstep.evaluate.metric import ImageBatch, Prompt


class FeatureMetric:
    """Collects the features of one model's images."""

    def __init__(self) -> None:
        self._batches: list[NDArray[np.float32]] = []
        self.prompts: list[Prompt] = []
        """The prompt of each image, ``[N]``."""

    def update(self, images: ImageBatch, prompts: Sequence[Prompt]) -> None:
        """Keep the features of ``images`` and their prompts."""
        self._batches.append(images.features)
        self.prompts += prompts

    @property
    def features(self) -> NDArray[np.float32]:
        """All features so far, ``[N, d]``."""
        return np.concatenate(self._batches)


def rows_by_prompt(prompts: Sequence[Prompt]) -> dict[Prompt, list[int]]:
    """Return the rows of each prompt's images, in the order of the prompts."""
    rows: dict[Prompt, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    return rows
