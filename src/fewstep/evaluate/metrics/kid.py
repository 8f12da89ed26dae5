"""Kernel inception distance (KID): unbiased squared MMD under a cubic kernel, with a jackknife interval.

Bińkowski, Sutherland, Arbel and Gretton, *Demystifying MMD GANs* (arXiv 1801.01401): ``k(x, y) =
(x.y / d + 1)^3`` on features of dimension ``d``. Images come in groups, such as several seeds of a prompt or
several styles of a concept. So two things differ from the usual code:

* Only pairs of **different** groups are averaged, within each set and across. This U-statistic over groups
  has the expectation zero for two sets of one distribution, even if they share their prompts. Two images of
  one prompt and seed are never compared.
* The interval is the delete-one-group jackknife of the full-set statistic. Means over overlapping random
  subsets are not independent, so their spread is no confidence interval. The statistic is unbiased at every
  size, so its expectation is that of the usual mean over subsets.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fewstep.core.stats import Interval, jackknife
from fewstep.evaluate.metric import FEATURES, REFERENCES, Prompt, Reference, References
from fewstep.evaluate.metrics._features import FeatureMetric

FEWEST = 3
"""Groups on either side below which KID has no interval."""


class Kid(FeatureMetric):
    """``kid``: the KID between the model's images and the references; nothing with fewer than 3 groups.

    A group is a ``truth``. A prompt without one is a group of its own, and so is a reference without one.

    Attributes:
        split: the split that is measured, of prompts and of references; all where it is ``None``.
    """

    needs: ClassVar[frozenset[str]] = frozenset({FEATURES, REFERENCES})
    split: str | None = None

    def __init__(self, references: References) -> None:
        super().__init__()
        self._references = references

    def group(self, truth: Any) -> Hashable:
        """Return the group of an image that shows ``truth``."""
        return truth

    def compute(self) -> Mapping[str, Interval]:
        mine = [row for row, prompt in enumerate(self.prompts) if self.split in (None, prompt.split)]
        real = [row for row, each in enumerate(self._references.images) if self.split in (None, each.split)]
        groups = [self._group(self.prompts[row]) for row in mine]
        others = [self._group(self._references.images[row]) for row in real]
        if min(len(set(groups)), len(set(others))) < FEWEST:
            return {}
        return {"kid": kid(self.features[mine], self._references.features[real], groups, others)}

    def _group(self, image: Prompt | Reference) -> Hashable:
        return image if image.truth is None else self.group(image.truth)


METRIC = Kid


def kid(
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    groups_x: Sequence[Hashable] | None = None,
    groups_y: Sequence[Hashable] | None = None,
) -> Interval:
    """Return the squared MMD of features ``x [N, d]`` and ``y [M, d]``: near 0 when alike, may be negative.

    Args:
        x: features of the first set.
        y: features of the second set.
        groups_x: the group of each image of ``x``, ``[N]``; each is its own when absent.
        groups_y: the same for ``y``; a label on both sides is one group.

    Raises:
        ValueError: fewer than three groups on a side (the jackknife needs them), or lengths that differ.
    """
    labels_x = [("x", i) for i in range(len(x))] if groups_x is None else list(groups_x)
    labels_y = [("y", i) for i in range(len(y))] if groups_y is None else list(groups_y)
    if len(labels_x) != len(x) or len(labels_y) != len(y):
        raise ValueError("KID needs one group label per image")
    if min(len(set(labels_x)), len(set(labels_y))) < FEWEST:
        raise ValueError("KID needs at least three groups (prompts) on each side")
    index = {label: i for i, label in enumerate(dict.fromkeys([*labels_x, *labels_y]))}
    at_x = np.array([index[label] for label in labels_x])
    at_y = np.array([index[label] for label in labels_y])
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
    """Return one of the three means of the MMD, and ``[groups]`` the same with each group left out."""
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
    """Return the sum of ``gram`` over each pair of groups, ``[groups, groups]``."""
    by_row = np.zeros((groups, gram.shape[1]))
    np.add.at(by_row, rows, gram)
    by_both = np.zeros((groups, groups))
    np.add.at(by_both, columns, by_row.T)
    return by_both.T.copy()
