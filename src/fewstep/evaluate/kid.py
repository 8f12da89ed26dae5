"""Kernel inception distance: unbiased squared MMD under a cubic kernel, with a jackknife interval.

Binkowski, Sutherland, Arbel and Gretton, *Demystifying MMD GANs* (2018): ``k(x, y) = (x.y / d + 1)^3`` on
features of dimension ``d``. Two things differ from the usual code, both because pictures come in groups
(several seeds of a prompt, several styles of a concept):

* Only pairs from **different** groups are averaged, within each set and across. That is the U-statistic over
  groups: its expectation is zero when both sets come from the same distribution even if they share their
  prompts, and no picture is ever compared with one made from the same seed and prompt.
* The interval is the delete-one-group jackknife of the full-set statistic, because means over overlapping
  random subsets are not independent and their spread is no confidence interval. The statistic is unbiased at
  every size, so the value has the same expectation as the customary mean over subsets.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from fewstep.core.stats import Interval, jackknife


def kid(
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    groups_x: Sequence[Hashable] | None = None,
    groups_y: Sequence[Hashable] | None = None,
) -> Interval:
    """Squared MMD between features ``x [N, d]`` and ``y [M, d]``: near zero when alike, may be negative.

    Args:
        x: features of the first set.
        y: features of the second set.
        groups_x: which pictures of ``x`` belong together, ``[N]``; each alone when absent.
        groups_y: the same for ``y``; a label that stands on both sides is one group.

    Raises:
        ValueError: fewer than three groups on a side (the jackknife needs them), or lengths that differ.
    """
    own_x = [("x", i) for i in range(len(x))] if groups_x is None else list(groups_x)
    own_y = [("y", i) for i in range(len(y))] if groups_y is None else list(groups_y)
    if len(own_x) != len(x) or len(own_y) != len(y):
        raise ValueError("KID needs one group label a picture")
    if min(len(set(own_x)), len(set(own_y))) < 3:
        raise ValueError("KID needs at least three groups (prompts) on each side")
    index = {label: i for i, label in enumerate(dict.fromkeys([*own_x, *own_y]))}
    at_x = np.array([index[label] for label in own_x])
    at_y = np.array([index[label] for label in own_y])
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    pairs = ((x, at_x, x, at_x, 1.0), (y, at_y, y, at_y, 1.0), (x, at_x, y, at_y, -2.0))
    terms = [_term(*pair, groups=len(index)) for pair in pairs]
    value = sum(full for full, _ in terms)
    return jackknife(value, np.sum([without for _, without in terms], axis=0))


def _kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _term(
    a: NDArray[np.float64],
    at_a: NDArray[np.int64],
    b: NDArray[np.float64],
    at_b: NDArray[np.int64],
    weight: float,
    groups: int,
) -> tuple[float, NDArray[np.float64]]:
    """One of the three means of the MMD over all groups, and ``[groups]`` with each group left out."""
    sums = _between(_kernel(a, b), at_a, at_b, groups)
    size_a, size_b = (np.bincount(at, minlength=groups).astype(np.float64) for at in (at_a, at_b))
    counts = np.outer(size_a, size_b)
    np.fill_diagonal(sums, 0)
    np.fill_diagonal(counts, 0)
    total, number = sums.sum(), counts.sum()
    without = (total - sums.sum(0) - sums.sum(1)) / (number - counts.sum(0) - counts.sum(1))
    return weight * float(total / number), weight * without


def _between(
    gram: NDArray[np.float64], rows: NDArray[np.int64], columns: NDArray[np.int64], groups: int
) -> NDArray[np.float64]:
    """Sum of ``gram`` over each pair of groups, ``[groups, groups]``."""
    by_row = np.zeros((groups, gram.shape[1]))
    np.add.at(by_row, rows, gram)
    by_both = np.zeros((groups, groups))
    np.add.at(by_both, columns, by_row.T)
    return by_both.T.copy()
