"""KID to the teacher: how far the images are from the teacher's, on the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

from fewstep.core.stats import Interval
from fewstep.evaluate.metric import FEATURES, TEACHER
from fewstep.evaluate.metrics._features import FeatureMetric
from fewstep.evaluate.metrics.kid import FEWEST, kid


class KidToTeacher(FeatureMetric):
    """``kid_teacher``: the KID between a model's images and the teacher's; nothing with fewer than 3 groups.

    A group is a ``truth``; a prompt without one is a group of its own.
    """

    needs: ClassVar[frozenset[str]] = frozenset({FEATURES, TEACHER})

    def group(self, truth: Any) -> Hashable:
        """Return the group of an image that shows ``truth``."""
        return truth

    def compute(self) -> Mapping[str, Interval]:
        return {}

    def compare(self, teacher: KidToTeacher) -> Mapping[str, Interval]:
        groups = [each if each.truth is None else self.group(each.truth) for each in self.prompts]
        if len(set(groups)) < FEWEST:
            return {}
        return {"kid_teacher": kid(self.features, teacher.features, groups, groups)}


METRIC = KidToTeacher
