"""Diversity: how far apart the pictures of one prompt are over its seeds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def diversity(features: NDArray[np.floating]) -> NDArray[np.float64]:
    """Mean pairwise Euclidean distance over seeds, one a prompt: ``[P, S, d]`` -> ``[P]``.

    Raises:
        ValueError: fewer than two seeds, which have no distance.
    """
    seeds = features.shape[1]
    if seeds < 2:
        raise ValueError("diversity needs at least two seeds a prompt")
    features = np.asarray(features, np.float64)
    first, second = np.triu_indices(seeds, 1)
    return np.linalg.norm(features[:, first] - features[:, second], axis=2).mean(1)
