"""Validation of a student during training: KID between its images and the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from fewstep.core.types import Array, Velocity
from fewstep.distill.context import DistillContext
from fewstep.distill.preview import sample_student
from fewstep.train.preview import decode_uint8

if TYPE_CHECKING:
    from fewstep.evaluate.features import OpenNsfwPool

NUM_IMAGES = 64
BATCH = 16

Features = np.ndarray


@dataclass(frozen=True)
class KidToTeacher:
    """KID × 1000 between a student's images and the teacher's samples of the same prompts; lower is better.

    Attributes:
        context: the distillation.
        num_images: number of prompts, one image per prompt.
    """

    context: DistillContext
    num_images: int = NUM_IMAGES

    metric = "kid-t"

    def __call__(self, velocity: Velocity) -> float:
        """Return the KID of a student, given as a velocity."""
        from fewstep.evaluate.metrics.kid import kid

        prompts = [self.context.samples.prompts[row] for row in self._rows]
        seeds = range(2**31, 2**31 + len(prompts))
        features: list[Features] = []
        for start in range(0, len(prompts), BATCH):
            part = slice(start, start + BATCH)
            features.append(
                self._features(sample_student(self.context, velocity, prompts[part], seeds[part]))
            )
        return 1000 * kid(np.concatenate(features), self._teacher_features, prompts, prompts).value

    @cached_property
    def _rows(self) -> list[int]:
        """The first rows of different captions: KID compares no two images of one prompt."""
        first = {prompt: row for row, prompt in reversed(list(enumerate(self.context.samples.prompts)))}
        return sorted(first.values())[: self.num_images]

    @cached_property
    def _teacher_features(self) -> Features:
        samples, device = self.context.samples, self.context.teacher.net.device
        parts = [self._rows[start : start + BATCH] for start in range(0, len(self._rows), BATCH)]
        return np.concatenate([self._features(samples.read(rows).latents.to(device)) for rows in parts])

    def _features(self, latents: Array) -> Features:
        from fewstep.families import common

        with common.on_device(self.context.teacher, "vae"):
            return self._extractor(decode_uint8(self.context.teacher, latents))

    @cached_property
    def _extractor(self) -> OpenNsfwPool:
        from fewstep.evaluate.features import OpenNsfwPool

        return OpenNsfwPool()
