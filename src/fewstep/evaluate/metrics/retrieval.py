"""Retrieval: is the truth of a prompt among the nearest labels of the reference images?

Labels are ranked by the cosine of their nearest reference. Top-k is whether the label that the prompt asks
for is among the first k. Ties count by the chance that a random order puts the right one first, so features
that collapse to a point score as chance.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fewstep.core import stats
from fewstep.core.stats import Interval
from fewstep.evaluate.metric import FEATURES, REFERENCES, TRUTH, References
from fewstep.evaluate.metrics._features import FeatureMetric, rows_by_prompt

DEPTHS = (1, 5)


class Retrieval(FeatureMetric):
    """``top1`` and ``top5`` in [0, 1], means over prompts; ``SPLIT_top1`` … where prompts have splits.

    Against the teacher: the same names with ``_ratio``. A ratio whose denominator is zero is left out.

    Attributes:
        prefix: stands before ``top`` in the names.
    """

    needs: ClassVar[frozenset[str]] = frozenset({FEATURES, REFERENCES, TRUTH})
    prefix = ""

    def __init__(self, references: References) -> None:
        super().__init__()
        self._references = references

    def label(self, truth: Any) -> Hashable:
        """Return the label of a reference that shows ``truth``."""
        return truth

    def accepted(self, truth: Any) -> Sequence[Hashable]:
        """Return the labels of which one must be found for a prompt with ``truth``, at least one."""
        return (self.label(truth),)

    def found(self, k: int) -> NDArray[np.float64]:
        """Return whether an accepted label is among the ``k`` nearest, ``[N]`` in [0, 1], one per image."""
        labels = [self.label(each.truth) for each in self._references.images]
        accepted = [self.accepted(prompt.truth) for prompt in self.prompts]
        return topk_any(self.features, accepted, self._references.features, labels, k)

    def compute(self) -> Mapping[str, Interval]:
        return {name: stats.mean(values) for name, values in self._per_prompt().items()}

    def compare(self, teacher: Retrieval) -> Mapping[str, Interval]:
        theirs = teacher._per_prompt()
        ratios = {f"{name}_ratio": stats.ratio(own, theirs[name]) for name, own in self._per_prompt().items()}
        return {name: ratio for name, ratio in ratios.items() if ratio is not None}

    def _per_prompt(self) -> dict[str, NDArray[np.float64]]:
        """Return the mean over each prompt's images, ``[P']`` per split and depth."""
        rows = rows_by_prompt(self.prompts)
        splits = list(dict.fromkeys(prompt.split for prompt in rows))
        values: dict[str, NDArray[np.float64]] = {}
        for k in DEPTHS:
            found = self.found(k)
            for split in splits:
                name = f"{split}_{self.prefix}top{k}" if split else f"{self.prefix}top{k}"
                values[name] = np.array(
                    [found[own].mean() for each, own in rows.items() if each.split == split]
                )
        return values


METRIC = Retrieval


def topk_any(
    features: NDArray[np.floating],
    accepted: Sequence[Sequence[Hashable]],
    references: NDArray[np.floating],
    labels: Sequence[Hashable],
    k: int,
) -> NDArray[np.float64]:
    """Return whether one of several labels is among the ``k`` nearest, ``[N]`` in [0, 1].

    Args:
        features: of the generated images, ``[N, d]``.
        accepted: the labels of which one must be found, at least one per image.
        references: as for `topk_accuracy`.
        labels: as for `topk_accuracy`.
        k: as for `topk_accuracy`.

    Raises:
        ValueError: a label has no reference.
    """
    most = max(len(each) for each in accepted)
    tries = [[each[min(at, len(each) - 1)] for each in accepted] for at in range(most)]
    return np.max([topk_accuracy(features, wanted, references, labels, k) for wanted in tries], axis=0)


def topk_accuracy(
    features: NDArray[np.floating],
    wanted: Sequence[Hashable],
    references: NDArray[np.floating],
    labels: Sequence[Hashable],
    k: int,
) -> NDArray[np.float64]:
    """Return the probability in [0, 1] that each image's label is among the ``k`` nearest labels, ``[N]``.

    Args:
        features: of the generated images, ``[N, d]``.
        wanted: the label asked for, one per image; each must be among ``labels``.
        references: features of the reference images, ``[M, d]``.
        labels: the label of each reference, ``[M]``; several references may share one.
        k: how many labels count as found.

    Raises:
        ValueError: a wanted label has no reference.
    """
    index = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    missing = [label for label in wanted if label not in index]
    if missing:
        raise ValueError(f"no reference image of {missing[0]!r}")
    similarity = unit(features) @ unit(references).T
    scores = _nearest(similarity, np.array([index[label] for label in labels]), len(index))
    own = scores[np.arange(len(wanted)), [index[label] for label in wanted]][:, None]
    nearer = (scores > own).sum(1)
    tied = (scores == own).sum(1)
    return np.clip((k - nearer) / tied, 0.0, 1.0)


def unit(features: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return features ``[N, d]`` scaled to length one; a zero row stays zero."""
    features = np.asarray(features, np.float64)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length > 0, length, 1.0)


def _nearest(
    similarity: NDArray[np.float64], label_index: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """Return the similarity of the nearest reference of each label: ``[N, M]`` -> ``[N, count]``."""
    order = np.argsort(label_index, kind="stable")
    starts = np.searchsorted(label_index[order], np.arange(count))
    return np.maximum.reduceat(similarity[:, order], starts, axis=1)
