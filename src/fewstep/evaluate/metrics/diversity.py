"""Diversity: the mean distance between the features of one prompt's images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fewstep.core import stats
from fewstep.core.stats import Interval
from fewstep.evaluate.metric import FEATURES
from fewstep.evaluate.metrics._features import FeatureMetric, rows_by_prompt


class Diversity(FeatureMetric):
    """``diversity``, a mean over prompts; nothing where prompts have one image each.

    Against the teacher: ``diversity_ratio``.
    """

    needs: ClassVar[frozenset[str]] = frozenset({FEATURES})

    def compute(self) -> Mapping[str, Interval]:
        values = self._per_prompt()
        return {} if values is None else {"diversity": stats.mean(values)}

    def compare(self, teacher: Diversity) -> Mapping[str, Interval]:
        ours, theirs = self._per_prompt(), teacher._per_prompt()
        ratio = None if ours is None or theirs is None else stats.ratio(ours, theirs)
        return {} if ratio is None else {"diversity_ratio": ratio}

    def _per_prompt(self) -> NDArray[np.float64] | None:
        rows = np.array(list(rows_by_prompt(self.prompts).values()))
        return diversity(self.features[rows]) if rows.shape[1] > 1 else None


METRIC = Diversity


def diversity(features: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the mean pairwise Euclidean distance over seeds, one per prompt: ``[P, S, d]`` -> ``[P]``.

    Raises:
        ValueError: fewer than two seeds, which have no distance.
    """
    seeds = features.shape[1]
    if seeds < 2:
        raise ValueError("diversity needs at least two seeds per prompt")
    features = np.asarray(features, np.float64)
    first, second = np.triu_indices(seeds, 1)
    return np.linalg.norm(features[:, first] - features[:, second], axis=2).mean(1)
