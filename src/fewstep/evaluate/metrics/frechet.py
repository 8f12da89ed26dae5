"""Fréchet distance between two normal distributions (Dowson and Landau, 1982; Heusel et al., 2017).

It is for sets that are much larger than the dimension of the features. With fewer images the covariance is
singular and the distance is biased upwards, so KID is the better figure there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fewstep.core.stats import Interval, jackknife
from fewstep.evaluate.metric import FEATURES, REFERENCES, References
from fewstep.evaluate.metrics._features import FeatureMetric, rows_by_prompt

Moments = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Mean ``[d]`` and covariance ``[d, d]``."""

BLOCKS = 20
"""Blocks of prompts that the jackknife leaves out, one at a time: one distance takes seconds at d = 1024."""


class Frechet(FeatureMetric):
    """``frechet``: the Fréchet distance between the model's images and the references.

    The interval is a grouped jackknife over blocks of prompts. There is none for fewer than 3 prompts.
    """

    needs: ClassVar[frozenset[str]] = frozenset({FEATURES, REFERENCES})

    def __init__(self, references: References) -> None:
        super().__init__()
        self._real = moments(references.features)

    def compute(self) -> Mapping[str, Interval]:
        features, rows = self.features, list(rows_by_prompt(self.prompts).values())
        blocks = min(BLOCKS, len(rows))
        if blocks < 3:
            return {}
        without: list[float] = []
        for block in range(blocks):
            kept = [row for index, own in enumerate(rows) if index % blocks != block for row in own]
            without.append(frechet(moments(features[kept]), self._real))
        return {"frechet": jackknife(frechet(moments(features), self._real), np.array(without))}


METRIC = Frechet


def frechet(a: Moments, b: Moments) -> float:
    """Return ``|m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)``; 0 when both are the same normal."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    root = _root(cov_a)
    # The middle matrix is symmetric, unlike A B, so its eigenvalues are real and the solver is stable.
    cross = np.linalg.eigvalsh(root @ cov_b @ root)
    difference = mean_a - mean_b
    trace = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(cross.clip(0)).sum()
    return float(difference @ difference + trace)


def moments(features: NDArray[np.floating]) -> Moments:
    """Return the mean and the unbiased covariance of features ``[N, d]``, N at least 2."""
    features = np.asarray(features, np.float64)
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)).astype(np.float64, copy=False)


def _root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the symmetric square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T
