"""Frechet distance between two normal distributions (Dowson and Landau, 1982; Heusel et al., 2017).

For large sets only: with fewer pictures than feature dimensions the covariance is singular and the distance
is biased upwards, which is why the harness reports KID.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Moments = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Mean ``[d]`` and covariance ``[d, d]``."""


def moments(features: NDArray[np.floating]) -> Moments:
    """Mean and unbiased covariance of features ``[N, d]``, N at least 2."""
    features = np.asarray(features, np.float64)
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)).astype(np.float64, copy=False)


def frechet(a: Moments, b: Moments) -> float:
    """``|m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)``; zero when both are the same normal."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    root = _root(cov_a)
    # The middle matrix is symmetric, unlike A B, so its eigenvalues are real and found stably.
    cross = np.linalg.eigvalsh(root @ cov_b @ root)
    difference = mean_a - mean_b
    trace = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(cross.clip(0)).sum()
    return float(difference @ difference + trace)


def _root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Symmetric square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T
