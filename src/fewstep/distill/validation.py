"""In training: how far a student's pictures are from its teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fewstep.distill.context import DistillContext
from fewstep.train.preview import decode_uint8

PICTURES = 64
CHUNK = 16


@dataclass(frozen=True)
class KidToTeacher:
    """KID x 1000 between a student's pictures and the teacher's samples of the same prompts; lower is better.

    Attributes:
        lesson: whose teacher's samples are compared.
        pictures: how many prompts.
    """

    lesson: DistillContext
    pictures: int = PICTURES

    metric = "kid-t"

    def __call__(self, velocity: Any) -> float:
        """The score of a student, given as a velocity."""
        from fewstep.evaluate.metrics.kid import kid

        prompts = self._prompts
        seeds = range(2**31, 2**31 + len(prompts))
        made: list[Any] = []
        for at in range(0, len(prompts), CHUNK):
            some = slice(at, at + CHUNK)
            made.append(self._features(self.lesson.sample_student(velocity, prompts[some], seeds[some])))
        groups = list(prompts)
        return 1000 * kid(np.concatenate(made), self._teacher, groups, groups).value

    @cached_property
    def _rows(self) -> list[int]:
        """The first rows of different captions: KID compares no two pictures of one prompt."""
        first = {prompt: row for row, prompt in reversed(list(enumerate(self.lesson.samples.prompts)))}
        return sorted(first.values())[: self.pictures]

    @cached_property
    def _prompts(self) -> list[str]:
        return [self.lesson.samples.prompts[row] for row in self._rows]

    @cached_property
    def _teacher(self) -> Any:
        parts = [self._rows[at : at + CHUNK] for at in range(0, len(self._rows), CHUNK)]
        device = self.lesson.teacher.net.device
        return np.concatenate([self._features(self.lesson.samples.read(p).latents.to(device)) for p in parts])

    def _features(self, latents: Any) -> Any:
        from fewstep.families import common

        with common.on_device(self.lesson.teacher, "vae"):
            return self._extractor(decode_uint8(self.lesson.teacher, latents))

    @cached_property
    def _extractor(self) -> Any:
        from fewstep.evaluate.features import OpenNsfwPool

        return OpenNsfwPool()
