"""Retrieval: which rendering is nearest to a generated picture, among the renderings of all concepts.

Concepts are ranked by their nearest rendering in any style (cosine of features). Top-k is whether the concept
asked for is among the first k; the same is done for (concept, style) pairs. Ties count by the chance that a
random order would put the right one first, so that features which collapse to a point score as chance.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray


def topk_accuracy(
    features: NDArray[np.floating],
    wanted: Sequence[Hashable],
    gallery: NDArray[np.floating],
    labels: Sequence[Hashable],
    k: int,
) -> NDArray[np.float64]:
    """Probability in [0, 1] that each picture's label is among the ``k`` nearest labels, ``[N]``.

    Args:
        features: of the generated pictures, ``[N, d]``.
        wanted: the label asked for, one a picture; each must be in the gallery.
        gallery: features of the reference renderings, ``[M, d]``.
        labels: the label of each rendering, ``[M]``; several renderings may share one.
        k: how many labels count as found.

    Raises:
        ValueError: a wanted label has no rendering in the gallery.
    """
    index = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    missing = [label for label in wanted if label not in index]
    if missing:
        raise ValueError(f"no reference rendering of {missing[0]!r}")
    scores = _best(unit(features) @ unit(gallery).T, np.array([index[label] for label in labels]), len(index))
    own = scores[np.arange(len(wanted)), [index[label] for label in wanted]][:, None]
    nearer = (scores > own).sum(1)
    level = (scores == own).sum(1)
    return np.clip((k - nearer) / level, 0.0, 1.0)


def unit(features: NDArray[np.floating]) -> NDArray[np.float64]:
    """Features ``[N, d]`` scaled to length one; a zero row stays zero."""
    features = np.asarray(features, np.float64)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length > 0, length, 1.0)


def _best(similarity: NDArray[np.float64], at: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Nearest rendering of each label: ``[N, M]`` -> ``[N, count]``."""
    order = np.argsort(at, kind="stable")
    starts = np.searchsorted(at[order], np.arange(count))
    return np.maximum.reduceat(similarity[:, order], starts, axis=1)
